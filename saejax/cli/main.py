"""The `saejax` command: finds the job, turns errors into exit codes. Help and mistaken arguments come before jax is imported."""

import difflib
import os
import sys
import threading
import traceback

from saejax.base.errors import EXIT_PREEMPTED, ConfigError, Preempted, SaejaxError
from saejax.base.version import __version__
from saejax.cli.help import JOBS, family_help, job_help, overview
from saejax.cli.options import Job
from saejax.cli.parsing import declared, flag, parse

EXIT_MISTAKE = 2       # something that the user can repair; one line on stderr
EXIT_BUG = 1
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141
GOODBYE = 3.0          # seconds that one of several processes waits for the others to end as it does
_HELP = {"--help", "-h", "-help"}


def main(argv: list[str] | None = None) -> int:
    """Runs one job and returns the exit code. An unexpected exception passes through with its traceback."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        return _dispatch(argv)
    except SaejaxError as error:
        return _leave(_failed(error))
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except KeyboardInterrupt:
        print("saejax: interrupted; start the same command again to go on", file=sys.stderr)
        return _leave(EXIT_INTERRUPTED)
    except Exception:
        if not _several():
            raise
        traceback.print_exc()
        return _leave(EXIT_BUG)


def _dispatch(argv: list[str]) -> int:
    if not argv:
        raise ConfigError(f"no job given; choose one of {', '.join(JOBS)} (`saejax --help` says what they do)")
    asked = argv[0] == "help" or bool(_HELP & set(argv))
    words = [word for word in argv if word not in _HELP][argv[0] == "help":]
    if asked and not words:
        print(overview())
        return 0
    if words[0] in ("--version", "-version"):
        print(f"saejax {__version__}")
        return 0
    if asked and len(words) == 1 and _ways(words[0]):
        print(family_help(words[0]))
        return 0
    job, rest = _found(*words)
    if asked:
        print(job_help(job))
        return 0
    return _start(job, rest)


def _ways(first: str) -> list[str]:
    """The second words of jobs of two words."""
    return [name.split()[1] for name in JOBS if name.startswith(f"{first} ")]


def _found(first: str, *rest: str) -> tuple[Job, list[str]]:
    """(the job that the first word, or the first two, name; its arguments). Raises `ConfigError`."""
    if first in JOBS:
        return JOBS[first], list(rest)
    ways = _ways(first)
    if not ways:
        near = difflib.get_close_matches(first, {name.split()[0]: None for name in JOBS}, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(JOBS)}"
        raise ConfigError(f"unknown job {first!r}; {hint}")
    if not rest or rest[0] not in ways:
        raise ConfigError(f"saejax {first}: say which of {', '.join(ways)}, for example: {JOBS[f'{first} {ways[0]}'].example}")
    return JOBS[f"{first} {rest[0]}"], list(rest[1:])


def _start(job: Job, rest: list[str]) -> int:
    _quiet()
    if job.name == "plan":  # asks no accelerator
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    options = parse(job, rest)
    if declared(job, "distributed"):
        _join(job, options)
    return job.run(options)


def _join(job: Job, options) -> None:
    """Joins the other processes, where there are some, before anything asks jax for its devices."""
    given = processes(options)
    if given is None:
        return
    from saejax.base import distributed
    distributed.start(**given, timeout=options.start_timeout, heartbeat=options.heartbeat)
    _check_agreement(job, options)


def processes(options) -> dict | None:
    """{coordinator, num_processes, process_id} as options and environment say; None for one process. Raises `ConfigError`."""
    from saejax.base import distributed
    given = {name: getattr(options, name) for name in ("coordinator", "num_processes", "process_id")}
    asked = options.distributed
    if not asked and any(value is not None for value in given.values()):
        raise ConfigError("--coordinator, --num-processes and --process-id need --distributed as well")
    if asked is False or (asked is None and not distributed.announced()):
        return None
    missing = [flag(name) for name, value in given.items() if value is None]
    if missing and len(missing) < 3:
        raise ConfigError(f"--distributed: {', '.join(missing)} missing; give --coordinator, --num-processes and "
                          "--process-id together, or none of them on a cluster that announces itself")
    return given


def _check_agreement(job: Job, options) -> None:
    """Raises `ConfigError` when the processes were not started alike; how each of them shows its progress is its own affair."""
    from saejax.base.distributed import check_agreement
    from saejax.cli.subjects import configs
    from saejax.config import flat
    own = {f.name: getattr(options, f.name) for f in declared(job, "value", "switch", "places")}
    given = {"job": job.name, "options": {name: value for name, value in own.items() if name != "process_id"}}
    for config in configs(options) if declared(job, "config") else ():
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


def _several() -> bool:
    """Whether this is one of several processes that have met."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _leave(code: int) -> int:
    """The exit code; one of several processes ends here and now with it. The interpreter's own end waits in a barrier for the
    others, who wait for this one in another; so they learn of it as of a process that died.
    """
    if not _several():
        return code
    import jax
    goodbye = threading.Thread(target=jax.distributed.shutdown, daemon=True)  # at once where all end alike
    goodbye.start()
    goodbye.join(GOODBYE)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _failed(error: SaejaxError) -> int:
    """The error's one line. `Preempted` is no failure: its message and its own exit code."""
    message = " ".join(str(error).split())
    if isinstance(error, Preempted):
        print(f"saejax: {message}", file=sys.stderr)
        return EXIT_PREEMPTED
    print(f"saejax: error: {message}", file=sys.stderr)
    return EXIT_MISTAKE


if __name__ == "__main__":
    sys.exit(main())
