"""What the command says of itself, made of what the jobs declare."""

import importlib
import textwrap

from saejax.base.version import __version__
from saejax.cli.options import Job
from saejax.cli.parsing import declared, flag

MODULES = ("run", "harvest", "train", "eval", "release", "scaling", "features", "dashboard", "search", "judge", "specificity",
           "compare", "split", "concepts", "steer", "attribute", "neurons", "convert", "push", "plan", "bench", "inspect",
           "completion")
GROUPS = ("make", "understand", "act", "exchange", "operate")
WIDTH, _COLUMN = 110, 27

CONFIG = """\
  --config=FILE            Python file whose get_config() returns the config (it is executed)
  --config.KEY=VALUE       change one key, as --config.train.tokens=2000000; docs/reference/config.md has all
"""
EXIT_CODES = """\
exit codes:
  0   done
  2   a mistake that can be repaired (one line on stderr says what and how)
  75  stopped on request with the state saved (SIGTERM, Ctrl-C while training); the same command goes on
  130 interrupted by Ctrl-C outside training; the same command goes on
  1   a bug, with its traceback
"""


def _jobs() -> dict[str, Job]:
    found = {}
    for name in MODULES:
        module = importlib.import_module(f"saejax.cli.jobs.{name}")
        found |= {job.name: job for job in getattr(module, "JOBS", None) or (module.JOB,)}
    return found


JOBS = _jobs()


def overview() -> str:
    """What `saejax --help` prints."""
    parts = []
    for group in GROUPS:
        lines = [f"  {job.name:<15}{job.summary}" for job in JOBS.values() if job.group == group]
        parts.append("\n".join([f"{group}:", *lines]))
    return (f"saejax {__version__}: sparse autoencoders on language-model activations\n\n"
            "usage: saejax JOB --config=FILE [--config.KEY=VALUE ...]\n       saejax JOB SAE ...\n\n" + "\n\n".join(parts)
            + f"\n\nexample:\n  {JOBS['run'].example}\n\nSAE is a run, a checkpoint step, a release, files of another library, "
            "or org/repo:path of the hub.\n`saejax JOB --help` says what a job reads and writes; `saejax --version` prints the "
            f"version.\n\n{EXIT_CODES}")


def job_help(job: Job) -> str:
    """What `saejax JOB --help` prints."""
    parts = textwrap.dedent(job.text).strip().split("\n\n")
    text = "\n".join(textwrap.fill(part, WIDTH, break_on_hyphens=False) for part in parts)
    options = "".join(_described(*line) for line in option_lines(job))
    config = CONFIG if declared(job, "config") else ""
    return (f"saejax {job.name}: {job.summary}\n\nusage: {usage(job)}\n\n{text}\n\noptions:\n{options}{config}\n"
            f"example:\n  {job.example}\n\n{EXIT_CODES}")


def family_help(first: str) -> str:
    """What `saejax search --help` prints: the jobs whose name begins with this word."""
    lines = [f"  saejax {job.name:<16}{job.summary}" for job in JOBS.values() if job.name.startswith(f"{first} ")]
    return "\n".join([f"saejax {first}: one of", *lines, "", f"`saejax {first} WAY --help` says more.", "", EXIT_CODES])


def usage(job: Job) -> str:
    """How a job is called, a line or two."""
    places = " ".join(f.metadata["metavar"] + (" ..." if f.metadata["most"] is None else "") for f in declared(job, "places"))
    needed = " ".join(f"{flag(f.name)}={f.metadata['metavar']}" for f in declared(job, "value") if f.metadata["required"])
    first = " ".join(filter(None, [f"saejax {job.name}", places, needed, "[--OPTION=VALUE ...]"]))
    more = f"\n       saejax {job.name} --config=FILE [--config.KEY=VALUE ...]" if declared(job, "config") else ""
    return first + more


def option_lines(job: Job) -> list[tuple[str, str]]:
    """(name, text) of every option."""
    out = []
    for f in declared(job, "value", "switch", "distributed"):
        if f.metadata["role"] != "value":
            out.append((flag(f.name), f.metadata["help"]))
            continue
        choices, default = f.metadata["choices"], f.default
        metavar = "|".join(choices) if choices and len("|".join(choices)) < 20 else f.metadata["metavar"]
        more = f" ({', '.join(choices)})" if choices and metavar == f.metadata["metavar"] else ""
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        out.append((f"{flag(f.name)}={metavar}", f.metadata["help"] + more + ("" if default is None else f" (default {shown})")))
    return out


def _described(name: str, help: str) -> str:
    lines = textwrap.wrap(help, WIDTH - _COLUMN, break_on_hyphens=False) or [""]
    first = f"  {name:<{_COLUMN - 2}}" if len(name) < _COLUMN - 2 else f"  {name}\n{' ' * _COLUMN}"
    return first + f"\n{' ' * _COLUMN}".join(lines) + "\n"
