"""What all pages have in common: one theme, short lines, files that are used and shipped, scripts without a fault."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import saejax
from saejax.pages import dashboard, plots
from saejax.pages.templates import source

HOME = Path(saejax.__file__).parent
PAGES = HOME / "pages"
FILES = sorted(file for kind in ("html", "css", "js") for file in PAGES.rglob(f"*.{kind}"))
SITE = {file.name for file in (PAGES / "site").iterdir()}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_line_is_wider_than_130_columns(file):
    assert [line for line in file.read_text("utf-8").splitlines() if len(line) > 130] == []


def test_every_file_is_used_and_shipped():
    assert SITE == {*dashboard.STYLES, *dashboard.SCRIPTS, "sheet.js"}
    said = "".join(file.read_text("utf-8") for file in (*PAGES.glob("*.py"), *PAGES.glob("*.html")))
    assert [file.name for file in FILES if f'{file.name}"' not in said] == []
    shipped = tomllib.loads((HOME.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["saejax"]
    assert {*FILES} <= {file for pattern in shipped for file in HOME.glob(pattern)}


def test_colours_stand_in_the_theme_only():
    """Pages name variables; figures, which are pictures, repeat ink and edge."""
    colour = re.compile(r"#[0-9a-f]{3,8}\b|rgba?\(\d", re.IGNORECASE)
    for file in FILES:
        if file.name != "theme.css" and file.suffix != ".js":
            found = colour.findall(re.sub(r"box-shadow: .*|href=\"#.*?\"|&#\d+;", "", file.read_text("utf-8")))
            assert found == [], file.name
    light, dark = source("site/theme.css").split("@media (prefers-color-scheme: dark)")
    for theme, text in (("light", light), ("dark", dark)):
        assert f"--ink: {plots._THEMES[theme]['ink']};" in text and f"--edge: {plots._THEMES[theme]['faint']};" in text


def test_scripts_have_no_fault():
    linter = shutil.which("oxlint") or shutil.which("oxlint", path=str(Path(sys.executable).parent))
    if linter is None:
        pytest.skip("oxlint is not installed (pip install oxlint)")
    done = subprocess.run([linter, "--deny-warnings", PAGES / "site"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
