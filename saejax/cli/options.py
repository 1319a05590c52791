"""How a job declares its options: a frozen dataclass whose fields carry type, default, help and choices. Does not import jax."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from saejax.base.errors import ConfigError
from saejax.base.storage import bucket_trouble

SPLITS, BASELINES = ("train", "heldout"), ("neurons", "directions", "sparse_directions", "random_sae")


def text(given: str) -> str:
    """any text"""
    return given


def path(given: str) -> Path:
    """a path"""
    if trouble := bucket_trouble(given):
        raise ConfigError(trouble)
    return Path(given)


def count(given: str) -> int:
    """a whole number of at least 1"""
    return _least(whole(given), 1)


def whole(given: str) -> int:
    """a whole number, not negative"""
    try:
        return _least(int(given), 0)
    except ValueError:
        value = float(given)  # 1e6
        if not value.is_integer():
            raise
        return _least(int(value), 0)


def number(given: str) -> float:
    """a number that is not negative"""
    value = float(given)
    if not math.isfinite(value):
        raise ValueError
    return _least(value, 0)


def numbers(given: str) -> tuple[float, ...]:
    """numbers as -5,0,5"""
    values = tuple(float(part) for part in given.split(","))
    if not all(map(math.isfinite, values)):
        raise ValueError
    return values


def sizes(given: str) -> tuple[int, int]:
    """features and tokens as 8192,1e6"""
    found, tokens = given.split(",")
    return whole(found), whole(tokens)


def features(given: str) -> tuple[int, ...]:
    """feature numbers as 1,2,3"""
    values = tuple(_least(int(part), 0) for part in given.split(","))
    if len(set(values)) < len(values):
        raise ValueError
    return values


def ablated(given: str) -> tuple[str, int]:
    """top:N, random:N or all"""
    way, _, n = given.partition(":")
    if way == "all" and not n:
        return way, 0
    if way not in ("top", "random"):
        raise ValueError
    return way, count(n)


def words(given: str) -> tuple[str, ...]:
    """words with commas between"""
    values = tuple(part.strip() for part in given.split(","))
    if not all(values):
        raise ValueError
    return values


def _least(value, least):
    if value < least:
        raise ValueError
    return value


def value(help: str, metavar: str, kind: Callable[[str], Any] = text, *, default=None, choices: tuple[str, ...] = (),
          required: bool = False) -> Any:
    """An option `--name=METAVAR`. kind: what makes its value of the text; its docstring says what is expected."""
    return field(default=default, metadata={"role": "value", "help": help, "metavar": metavar, "kind": kind, "choices": choices,
                                            "required": required})


def switch(help: str) -> Any:
    """An option `--name` without a value."""
    return field(default=False, metadata={"role": "switch", "help": help})


def places(metavar: str, help: str, *, least: int = 1, most: int | None = None) -> Any:
    """What stands without a name: paths, or names of places on the hub. most: None for any number."""
    return field(default=(), metadata={"role": "places", "help": help, "metavar": metavar, "least": least, "most": most})


def refuse(job: str, options: Any, names: tuple[str, ...], why: str) -> None:
    """Raises `ConfigError` where options that have no effect here, and why, are given other values than their defaults."""
    changed = [f.name for f in fields(options) if f.name in names and getattr(options, f.name) != f.default]
    given = [f"--{name.replace('_', '-')}" for name in changed]
    if given:
        has, them = ("has", "it") if len(given) == 1 else ("have", "them")
        raise ConfigError(f"saejax {job}: {', '.join(given)} {has} no effect {why}; leave {them} out")


@dataclass(frozen=True)
class Json:
    """Output."""

    json: bool = switch("print JSON")


@dataclass(frozen=True)
class SubjectOptions:
    """What the files of an SAE do not say."""

    model: str | None = value("language model, instead of the one that run or files name", "MODEL")
    hookpoint: str | None = value("where in it the SAE reads, as blocks.9.hook_resid_post or model.layers.9", "NAME")
    format: str | None = value("of the files, where several fit", "NAME")


@dataclass(frozen=True)
class CorpusOptions:
    """The text that activations come from."""

    text: tuple[str, ...] | None = value("its text: presets, files, directories or hub ids, with commas between", "SOURCES",
                                         words)
    context: int | None = value("tokens of a row of the text", "N", count)
    store: Path | None = value("an activation store, for statistics (and the index) instead of the text", "DIR", path)


@dataclass(frozen=True)
class IndexOptions:
    """The index."""

    index: Path | None = value("an index that lies elsewhere than in the run", "DIR", path)


@dataclass(frozen=True)
class ConfigOptions:
    """The config."""

    config: Any = field(default=None, metadata={"role": "config"})


@dataclass(frozen=True)
class DistributedOptions:
    """Several processes."""

    distributed: bool | None = field(default=None, metadata={"role": "distributed", "help":
                                     "this is one of several processes; a TPU pod needs nothing more, Slurm, GKE and "
                                     "launch/jobset.yaml not even this (--no-distributed: it is not)"})
    coordinator: str | None = value("elsewhere the address of process 0,", "HOST:PORT")
    num_processes: int | None = value("how many there are,", "N", count)
    process_id: int | None = value("and the number of this one, from 0", "I", whole)
    start_timeout: int | None = value("until all of them must be there (300)", "SECONDS", count)
    heartbeat: int | None = value("until a silent process counts as dead and ends the others (100)", "SECONDS", count)


SHARED = (IndexOptions, SubjectOptions, CorpusOptions, Json, ConfigOptions, DistributedOptions)  # in the order of the help


@dataclass(frozen=True)
class Job:
    """A job of the command line. options: a dataclass of this module's fields; run: options -> exit code, imports what it needs.
    """

    name: str
    group: str
    summary: str
    text: str
    example: str
    options: type
    run: Callable[[Any], int]
