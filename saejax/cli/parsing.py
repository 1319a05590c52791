"""Arguments of a job -> its options, by argparse; every mistake is one `ConfigError`. Does not import jax."""

import argparse
import dataclasses
import difflib
import itertools
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from saejax.base.errors import ConfigError
from saejax.cli.options import SHARED, Job


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ConfigError(f"{self.prog}: {message}")


def flag(name: str) -> str:
    """How an option is spelled: with dashes."""
    return f"--{name.replace('_', '-')}"


def declared(job: Job, *roles: str) -> list[dataclasses.Field]:
    """Fields of a job's options, its own ones before those that it shares with others."""
    shared = [f.name for options in SHARED for f in fields(options)]
    found = [f for f in fields(job.options) if f.metadata["role"] in roles]
    return sorted(found, key=lambda f: shared.index(f.name) if f.name in shared else -1)


def add_arguments(parser: argparse.ArgumentParser, job: Job) -> None:
    """A job's options as arguments of a parser; values stay texts."""
    for f in declared(job, "value"):
        parser.add_argument(flag(f.name), dest=f.name, metavar=f.metadata["metavar"], choices=f.metadata["choices"] or None,
                            help=f.metadata["help"])
    for f in declared(job, "switch"):
        parser.add_argument(flag(f.name), dest=f.name, action="store_true", help=f.metadata["help"])
    for f in declared(job, "distributed"):
        parser.add_argument(flag(f.name), dest=f.name, action=argparse.BooleanOptionalAction, default=None,
                            help=f.metadata["help"])
    for f in declared(job, "places"):
        parser.add_argument(f.name, nargs="*", metavar=f.metadata["metavar"], help=f.metadata["help"])


def parse(job: Job, arguments: Sequence[str]) -> Any:
    """The options of a job. Raises `ConfigError`: unknown ones, values that are none, too few or too many places, a config that
    cannot be read.
    """
    from saejax.cli.config_flag import config_of
    program = f"saejax {job.name}"
    config, rest = config_of(job.name, list(arguments), takes_config=bool(declared(job, "config")))
    parser = _Parser(prog=program, add_help=False, allow_abbrev=False)
    add_arguments(parser, job)
    rest = _normalised(job, rest)
    _check_once(job, rest)
    found, unknown = parser.parse_known_intermixed_args(rest)
    if unknown:
        raise ConfigError(_unknown(job, unknown[0]))
    given = {f.name: _value(program, f, getattr(found, f.name)) for f in fields(job.options) if f.metadata["role"] != "config"}
    if declared(job, "config"):
        given["config"] = config
    _check(job, given)
    return job.options(**given)


def _normalised(job: Job, arguments: list[str]) -> list[str]:
    """Names with dashes, and a value joined to its name: one may begin with a dash."""
    takes = {flag(f.name) for f in declared(job, "value")}
    out, waiting = [], False
    for argument in arguments:
        if waiting:
            out[-1] += f"={argument}"
            waiting = False
            continue
        name, equals, rest = argument.partition("=")
        if name.startswith("--") and len(name) > 2:
            name = name.replace("_", "-")
            waiting = not equals and name in takes
            argument = name + equals + rest
        out.append(argument)
    return out


def _check_once(job: Job, arguments: list[str]) -> None:
    """Of a value given twice one would be passed over in silence."""
    takes, seen = {flag(f.name) for f in declared(job, "value")}, set()
    for argument in itertools.takewhile(lambda argument: argument != "--", arguments):
        name = argument.split("=")[0]
        if name in takes and name in seen:
            raise ConfigError(f"saejax {job.name}: {name} is given twice; give it once")
        seen.add(name)


def _unknown(job: Job, argument: str) -> str:
    name = argument.split("=")[0]
    if not name.startswith("-"):
        return f"saejax {job.name}: takes no {argument!r}; see `saejax {job.name} --help`"
    known = [flag(f.name) for f in declared(job, "value", "switch", "distributed")]
    near = difflib.get_close_matches(name, known, n=1)
    return f"saejax {job.name}: unknown option {name}; " + (f"did you mean {near[0]}?" if near else
                                                            f"see `saejax {job.name} --help`")


def _value(program: str, f: dataclasses.Field, given: Any) -> Any:
    if f.metadata["role"] == "places":
        return tuple(given)
    if f.metadata["role"] != "value":
        return given
    if given is None:
        return f.default
    kind = f.metadata["kind"]
    try:
        return kind(given)
    except (ValueError, OverflowError):
        raise ConfigError(f"{program}: {flag(f.name)}={given}: expected {kind.__doc__}") from None


def _check(job: Job, given: dict[str, Any]) -> None:
    missing = [f for f in declared(job, "value") if f.metadata["required"] and given[f.name] is None]
    if missing:
        wanted = " and ".join(f"{flag(f.name)}={f.metadata['metavar']}" for f in missing)
        raise ConfigError(f"saejax {job.name}: give {wanted}, for example: {job.example}")
    for f in declared(job, "places"):
        found, least, most = given[f.name], f.metadata["least"], f.metadata["most"]
        if given.get("config") is not None and found:
            raise ConfigError(f"saejax {job.name}: got both --config and {' '.join(found)}; give one of them")
        if len(found) < least and given.get("config") is None:
            what = f"--config=FILE or {f.metadata['help']}" if "config" in given else f.metadata["help"]
            raise ConfigError(f"saejax {job.name}: give {what}, for example: {job.example}")
        if most is not None and len(found) > most:
            extra = " ".join(found[most:])
            raise ConfigError(f"saejax {job.name}: takes {f.metadata['metavar'] if most else 'no path'}, not also {extra}")
