"""The `saejax` command: finds the job, turns errors into exit codes. Help and mistaken arguments come before jax is imported."""

import difflib
import importlib
import os
import sys

from saejax.base.errors import ConfigError, SaejaxError
from saejax.base.version import __version__
from saejax.cli.help import JOBS, job_help, overview

EXIT_MISTAKE = 2       # something that the user can repair; one line on stderr
EXIT_INTERRUPTED = 130
_MODULES = {"push-to-hub": "push"}  # of jobs whose name is none


def main(argv: list[str] | None = None) -> int:
    """Runs one job and returns the exit code. An unexpected exception passes through with its traceback."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        return _dispatch(argv)
    except SaejaxError as error:
        return _failed(error)
    except KeyboardInterrupt:
        print("saejax: interrupted; start the same command again to go on", file=sys.stderr)
        return EXIT_INTERRUPTED


def _dispatch(argv: list[str]) -> int:
    if not argv:
        raise ConfigError(f"no job given; choose one of {', '.join(JOBS)} (`saejax --help` says what they do)")
    job, *rest = argv
    if job in ("--help", "-h", "-help", "help"):
        print(job_help(rest[0]) if rest and rest[0] in JOBS else overview())
        return 0
    if job in ("--version", "-version"):
        print(f"saejax {__version__}")
        return 0
    if job not in JOBS:
        near = difflib.get_close_matches(job, JOBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(JOBS)}"
        raise ConfigError(f"unknown job {job!r}; {hint}")
    if {"--help", "-h", "-help"} & set(rest):
        print(job_help(job))
        return 0
    return _start(job, rest)


def _start(job: str, rest: list[str]) -> int:
    _quiet()
    if job == "plan":  # asks no accelerator
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from saejax.cli.arguments import parse
    arguments = parse(job, rest, takes_config=JOBS[job].takes_config, options=JOBS[job].options)
    if arguments.config is None and not arguments.paths and job != "bench":
        what = {"inspect": "PATH", "convert": "SRC DST --to=FORMAT",
                "push-to-hub": "RELEASE --repo=ORG/NAME"}.get(job)
        what = what or ("--config=FILE or a run directory" if JOBS[job].takes_config else "a run or other files of an SAE")
        raise ConfigError(f"saejax {job}: give {what}, for example: {JOBS[job].example}")
    if arguments.distributed is not None:
        from saejax.base import distributed
        # Must come before anything that asks jax for its devices.
        d = arguments.distributed
        distributed.start(d.coordinator, d.num_processes, d.process_id, timeout=d.timeout, heartbeat=d.heartbeat)
        _check_agreement(job, arguments)
    return importlib.import_module(f"saejax.cli.jobs.{_MODULES.get(job, job)}").start(arguments)


def _check_agreement(job: str, arguments) -> None:
    """Raises `ConfigError` when the processes were not started alike; how each of them shows its progress is its own affair."""
    from saejax.base.distributed import check_agreement
    from saejax.cli.subjects import configs
    from saejax.config import flat
    given = {"job": job, "options": (arguments.paths, dict(arguments.options))}
    for config in configs(arguments) if JOBS[job].takes_config else ():
        given |= {f"config.{key}": value for key, value in flat(config).items() if not key.startswith("log.")}
    check_agreement(given)


def _quiet() -> None:
    """Third-party chatter off, unless the environment asks for it. Before those libraries are imported."""
    for name, value in {"TRANSFORMERS_VERBOSITY": "error", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
                        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
                        "TF_CPP_MIN_LOG_LEVEL": "2", "GRPC_VERBOSITY": "ERROR"}.items():
        os.environ.setdefault(name, value)
    from absl import logging
    logging.set_verbosity(logging.WARNING)


def _failed(error: SaejaxError) -> int:
    """The error's one line. `Preempted` is no failure: its message and its own exit code."""
    preemption = sys.modules.get("saejax.train.preemption")
    message = " ".join(str(error).split())
    if preemption is not None and isinstance(error, preemption.Preempted):
        print(f"saejax: {message}", file=sys.stderr)
        return preemption.EXIT_PREEMPTED
    print(f"saejax: error: {message}", file=sys.stderr)
    return EXIT_MISTAKE


if __name__ == "__main__":
    sys.exit(main())
