"""`saejax inspect`: what a directory is, and whether every byte of it verifies."""

import json

from saejax.cli.arguments import Arguments
from saejax.runs.inspect import inspect_path, shown


def start(arguments: Arguments) -> int:
    """Prints what every path is; 0 when all of it verifies, 2 otherwise."""
    bad = False
    for path in arguments.paths:
        finding = inspect_path(path)
        bad |= bool(finding.problems)
        print(json.dumps(finding.to_json()) if arguments.json else shown(finding))
    return 2 if bad else 0
