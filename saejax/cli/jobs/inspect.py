"""`saejax inspect`: what a directory is, whether all of it that has a digest verifies, and what has none."""

import json
from dataclasses import dataclass
from pathlib import Path

from saejax.cli.options import Job, Json, places


@dataclass(frozen=True)
class Options(Json):
    paths: tuple[str, ...] = places("PATH", "PATH")


def run(options: Options) -> int:
    """Prints what every path is; 0 when all of it verifies, 2 otherwise."""
    from saejax.runs.inspect import inspect_path, shown
    bad = False
    for path in options.paths:
        finding = inspect_path(Path(path))
        bad |= bool(finding.problems)
        print(json.dumps(finding.to_json()) if options.json else shown(finding))
    return 2 if bad else 0


JOB = Job(
    "inspect", "operate", "say what a store, run, checkpoint or release is, and verify it", """
    Reads everything under PATH that has a digest and checks it: stores, checkpoints, releases, indices, of a sweep those of all
    its SAEs; writes nothing. Names what it did not read: dashboards, reports, logs, answers of judges, neurons have no digests
    (config.json and cfg.json have none either; they are parsed; nor do the files of other libraries, which are loaded).
    Exit code 0 when all that was read verifies, 2 when not, with one line for every file or array that does not.
    """, "saejax inspect runs/demo", Options, run)
