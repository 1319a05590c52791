"""The documentation: every relative link and anchor resolves, every page has its place, the site builds without a warning."""

import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def text_of(page: Path) -> str:
    """A page without code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", lambda m: re.sub(r"[\[\]()<>]", "", m[0]), text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings that the site and the usual viewers of a repository spell alike."""
    found = set()
    for title in re.findall(r"^#{1,6} (.+)$", text_of(page), re.MULTILINE):
        title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)
        plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode()
        site = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
        if site == re.sub(r"[^\w\s-]", "", title.strip().lower()).replace(" ", "-"):
            found.add(site)
    return found


def links(page: Path) -> list[str]:
    text = text_of(page)
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    return [link for link in found if not re.match(r"[a-z]+:", link)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_resolve(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file() and target.is_relative_to(ROOT), link
        assert not page.is_relative_to(DOCS) or target.is_relative_to(DOCS), f"{link} leaves the site"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading, or one that not every viewer spells alike"


def test_files_that_code_names_are_there():
    """docs/... in code, configs, scripts and the changelog."""
    folders = ("saejax", "tests", "benchmarks", "configs", "launch")
    files = [f for folder in folders for f in (ROOT / folder).rglob("*") if f.suffix in (".py", ".sh", ".yaml", ".sbatch")]
    files += [ROOT / name for name in ("CHANGELOG.md", "Makefile", "pyproject.toml")]
    named = {(f, name) for f in files for name in re.findall(r"\bdocs/[\w/-]+\.(?:md|csv|png)\b(?! of \w)", f.read_text())}
    assert len(named) > 20
    for file, name in sorted(named):
        assert (ROOT / name).is_file(), f"{file.relative_to(ROOT)}: {name}"


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    named = re.findall(r"[\w/-]+\.(?:md|ipynb)$", text[text.index("\nnav:"):], re.MULTILINE)
    pages = [p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*") if p.suffix in (".md", ".ipynb")]
    assert sorted(named) == sorted(pages)


def test_command_line_reference_is_current():
    from saejax.cli.reference import reference
    assert (DOCS / "reference" / "cli.md").read_text() == reference() + "\n", \
        "run: python -m saejax.cli.reference > docs/reference/cli.md"


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 140


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the docs extra: make docs, or pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page, words in (("index.html", "Four kinds of pages"), ("reference/api.html", "saejax.open"),
                        ("reference/cli.html", "saejax steer"), ("tutorials/notebook.html", "notebook")):
        assert words in (tmp_path / "site" / page).read_text(), page
