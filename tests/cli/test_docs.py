"""Every command in the documents is one that the command line takes."""

import re
import shlex
from pathlib import Path

import pytest

from saejax.cli.main import JOBS
from saejax.cli.parsing import parse

ROOT = Path(__file__).parents[2]
FIRST = {name.split()[0] for name in JOBS}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page: Path) -> list[str]:
    """Lines that begin with saejax, in code blocks and indented, and what stands in backticks without dots and capitals."""
    found = []
    text = page.read_text().replace("\\\n", " ")
    for line in text.splitlines():
        for part in re.split(r"&&|;(?=\s)", line):
            if match := re.match(r"\s*(?:\.venv/bin/)?(saejax\s[^:]+.*)", part):
                found.append(match[1])
    inline = re.findall(r"`(saejax\s[^`]+)`", text)
    return found + [c for c in inline if re.search(r"runs/|--config=", c) and not re.search(r"\.\.\.|[A-Z]{2}|\|", c)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_parse(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in commands(page):
        words = shlex.split(command, comments=True)[1:]
        if words[0].startswith("--") or set(words) & {"SRC", "--help"} or re.search(r"\||\[--", command) or words[0] not in FIRST:
            continue  # a pattern, or a sentence
        job = JOBS.get(" ".join(words[:2])) or JOBS.get(words[0])
        assert job is not None, command
        rest = words[len(job.name.split()):]
        rest = [re.sub(r"--config=(?!configs/)\S+", "--config=configs/demo.py", word) for word in rest]
        parse(job, rest)


def test_there_are_commands():
    assert len([c for page in PAGES for c in commands(page)]) > 50


@pytest.mark.parametrize("name", JOBS)
def test_examples_of_the_help_parse(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(JOBS[name].example)[1:]
    assert " ".join(words[:len(name.split())]) == name
    parse(JOBS[name], words[len(name.split()):])


@pytest.mark.parametrize("given, expected", [("--tokens=1e6", 1_000_000), ("--tokens=1_000", 1000), ("--tokens 7", 7)])
def test_numbers_as_the_config_takes_them(given, expected):
    assert parse(JOBS["features"], ["runs/demo", *given.split()]).tokens == expected


def test_dashes_and_underscores():
    for spelled in ("--judge-model=m", "--judge_model=m"):
        assert parse(JOBS["judge"], ["r", "--judge=local:m", spelled]).judge_model == "m"
    assert parse(JOBS["steer"], ["r", "--prompt=a", "--scale", "-5,5"]).scale == (-5.0, 5.0)
    given = [f"--config={ROOT / 'configs/demo.py'}", "--config.train.lr", "0.5", "--config.sae.center"]
    config = parse(JOBS["train"], given).config
    assert config.train.lr == 0.5 and config.sae.center


def test_completion_knows_every_job_and_option(capsys):
    from saejax.cli.main import main
    for shell in ("bash", "zsh"):
        assert main(["completion", shell]) == 0
        script = capsys.readouterr().out
        assert all(word in script for name in JOBS for word in name.split()) and "--add-direction" in script
    assert main(["completion", "fish"]) == 2
