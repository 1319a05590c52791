"""The built wheel, away from the source tree: it has every file that pages and prompts need."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.processes import environment

ROOT = Path(__file__).parents[1]
SNIPPET = """
import sys
import saejax
from pathlib import Path
run, bare = sys.argv[1:]
assert Path(saejax.__file__).is_relative_to(bare), saejax.__file__
s = saejax.open(run)
x = s.store.read(s.sae.cfg.hookpoint, 0, 8).astype("float32")
acts = saejax.load(run).encode(x)
assert acts.shape == (8, 64) and s.sae.decode(acts).shape == x.shape
from saejax.features.search.sets import names, parallel, prompt_set
assert prompt_set(names()[0]) and parallel()
from saejax.scaling.concepts.lists import shipped
assert len(shipped()) > 500
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A bare folder with nothing but the installed wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = folder / "source"  # a copy: a build leaves files behind, and takes up those of the one before
    shutil.copytree(ROOT / "saejax", source / "saejax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([*pip, "wheel", str(source), "--no-deps", f"--wheel-dir={folder}"], check=True, timeout=240)
    [wheel] = folder.glob("saejax-*.whl")
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("saejax/")}
    tracked = {path.relative_to(ROOT).as_posix() for path in (ROOT / "saejax").rglob("*")
               if path.is_file() and "__pycache__" not in path.parts}
    assert shipped == tracked
    subprocess.run([*pip, "install", str(wheel), "--no-deps", f"--target={folder / 'bare'}"], check=True, timeout=120)
    return folder / "bare"


@pytest.mark.slow
def test_the_wheel_reads_a_run_and_writes_a_dashboard(installed, finished, tmp_path):
    run, env = finished[1], environment(1) | {"PYTHONPATH": str(installed)}

    def python(*arguments):
        return subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=env, check=True, timeout=240)

    python("-c", SNIPPET, str(run), str(installed))
    command = ["-m", "saejax.cli.main"]
    python(*command, "features", str(run), f"--out={tmp_path / 'features'}")
    python(*command, "dashboard", str(run), f"--index={tmp_path / 'features'}", f"--out={tmp_path / 'site'}")
    assert {"index.html", "app.js", "theme.css"} <= {path.name for path in (tmp_path / "site").iterdir()}
