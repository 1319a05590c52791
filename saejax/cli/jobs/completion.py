"""`saejax completion`: a script that completes jobs and options in bash or zsh."""

import argparse
from dataclasses import dataclass

from saejax.base.errors import ConfigError
from saejax.cli.options import Job, places
from saejax.cli.parsing import add_arguments

SHELLS = ("bash", "zsh")


@dataclass(frozen=True)
class Options:
    paths: tuple[str, ...] = places("SHELL", "bash or zsh", most=1)


def run(options: Options) -> int:
    """Prints the script."""
    import shtab

    from saejax.cli.help import JOBS
    shell = options.paths[0]
    if shell not in SHELLS:
        raise ConfigError(f"saejax completion: {shell!r} is none of {', '.join(SHELLS)}")
    print(shtab.complete(parser(JOBS), shell=shell))
    return 0


def parser(jobs: dict[str, Job]) -> argparse.ArgumentParser:
    """All jobs and their options as one parser, for what reads parsers."""
    root = argparse.ArgumentParser(prog="saejax")
    families: dict[tuple[str, ...], argparse._SubParsersAction] = {(): root.add_subparsers()}
    for job in jobs.values():
        *above, last = job.name.split()
        if tuple(above) not in families:
            families[tuple(above)] = families[()].add_parser(above[0], help=f"one of several ways to {above[0]}").add_subparsers()
        add_arguments(families[tuple(above)].add_parser(last, help=job.summary.replace("%", "%%")), job)
    return root


JOB = Job(
    "completion", "operate", "a script that completes jobs and options in bash or zsh", """
    Reads nothing and writes nothing; prints a script. In bash: `source <(saejax completion bash)`; in zsh write it to a file
    `_saejax` of a folder in $fpath.
    """, "saejax completion bash", Options, run)
