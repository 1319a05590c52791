"""What the documents tell people to type works: every marked block (`blocks`) is run, in one folder, one after the other."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import blocks
from tests.processes import as_user

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]  # the README makes what the pages go on with
MARKED = [block for page in PAGES for block in blocks(page, page.relative_to(ROOT).as_posix())]

# The demo with its own language model and text, but ready in a minute.
SHORT = f'''
import runpy

def get_config():
    c = runpy.run_path({str(ROOT / "configs/demo.py")!r})["get_config"]()
    c.harvest.tokens, c.train.tokens, c.train.batch = 8192, 16_384, 512
    c.sae.d_sae, c.sae.dead_tokens, c.checkpoint.every_tokens, c.eval.contexts = 3072, 8192, 16_384, 4
    c.log.progress = False
    return c
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder as that of somebody who has the demo: configs/, runs/demo, `saejax` and `python` of this checkout."""
    folder = tmp_path_factory.mktemp("documents")
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "configs/demo.py").write_text(SHORT)
    (folder / "bin").mkdir()
    for name, start in (("saejax", " -m saejax.cli.main"), ("python", "")):
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{start} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    assert run(folder, "saejax run --config=configs/demo.py")
    return folder


def run(folder: Path, script: str, language: str = "bash") -> bool:
    """Runs a block; True when its exit code is 0, else the test fails with what it said."""
    env = as_user(ROOT)
    env |= {"PATH": f"{folder / 'bin'}:{env['PATH']}", "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
    command = ["bash", "-euo", "pipefail", "-c", script] if language == "bash" else ["python", "-c", script]
    done = subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True)
    if done.returncode:
        pytest.fail(f"exit code {done.returncode} of\n{script}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}", pytrace=False)
    return True


def test_marks_stand_before_blocks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- run, but not: judge -->\n```bash\nsaejax a\nsaejax judge b\n```\n\n```bash\nnot this\n```\n")
    assert [(b.line, b.language, b.body) for b in blocks(page, "page")] == [(3, "bash", "saejax a")]
    for text, wrong in (("<!-- run -->\n\n```bash\na\n```\n", "before no block"),
                        ("<!-- run, but not: b -->\n```bash\na\n```\n", "'b'")):
        page.write_text(text)
        with pytest.raises(ValueError, match=wrong):
            blocks(page, "page")


def test_there_are_marked_blocks():
    assert len(MARKED) >= 5 and any(b.page == "README.md" and b.language == "python" for b in MARKED)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("block", MARKED, ids=lambda block: f"{block.page}:{block.line}")
def test_marked_blocks_run(block, place):
    assert run(place, block.body, block.language)
