"""A config with a sweep -> the configs of its members."""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from saejax import config as config_lib
from saejax.base.errors import ConfigError
from saejax.base.storage import text_sha256
from saejax.config import Config, SweepOptions
from saejax.config.recipes import RECIPES
from saejax.config.values import from_text, leaf, nearest

_STREAM, _SHOWN = "all SAEs of a sweep read one stream of the same rows", "it changes nothing of an SAE"
# Keys, or sections with a dot behind, that all members have in common, and why.
COMMON = {
    "text.": _STREAM, "harvest.": _STREAM, "lm.": _STREAM, "stream.": _STREAM, "data_seed": _STREAM, "train.batch": _STREAM,
    "mesh.": "all SAEs of a sweep live on one mesh", "checkpoint.": "all SAEs of a sweep are saved at the same steps",
    "log.": _SHOWN, "eval.": _SHOWN, "train.profile": _SHOWN,
    "run_dir": "it is made from what varies", "name": "it is made from what varies", "sweep.": "a sweep does not nest",
}
_LONGEST = 120  # characters of a member's name; file systems take 255 bytes


def members(config: Config) -> list[Config]:
    """The resolved config of every SAE of a sweep; of a config without one, itself.

    Each has its own run directory `<run_dir>/<name>`, the name made of what varies (`k=16,lr=0.0001`), and the store, text and
    row order of the base config. Raises one `ConfigError` with everything that is wrong, by member.
    """
    if not is_sweep(config):
        return [config]
    problems: list[str] = []
    chosen = list(_assignments(config.sweep, problems))
    if not problems and config.log.wandb:
        problems.append("config.log.wandb: one process writes one Weights & Biases run; leave it empty in a sweep")
    if problems:
        raise ConfigError("; ".join(dict.fromkeys(problems)))
    names, out = _names(chosen), []
    for values, name in zip(chosen, names, strict=True):
        try:
            out.append(_member(config, values, name))
        except ConfigError as error:
            problems.append(f"config.sweep, {name}: {error}")
    problems += [] if problems else _of_all(config, out)
    if problems:
        raise ConfigError("; ".join(problems))
    return out


def is_sweep(config: Config) -> bool:
    """True where a config describes several SAEs."""
    return bool(config.sweep.product or config.sweep.variations)


def _assignments(sweep: SweepOptions, problems: list[str]) -> Iterator[dict[str, object]]:
    """{key: value} of every member, in the order of the config."""
    axes = [_axis(entry, problems) for entry in sweep.product]
    starts = [_variation(entry, problems) for entry in sweep.variations] or [{}]
    keys = [key for axis in axes for key in list(axis[:1] and axis[0])]
    for key in sorted({key for key in keys if keys.count(key) > 1} | {key for key in keys for start in starts if key in start}):
        problems.append(f"config.sweep: {key} is set twice for the same SAE; give it once")
    for start in starts:
        for combination in itertools.product(*axes):
            yield start | {key: value for assignment in combination for key, value in assignment.items()}


def _axis(entry: str, problems: list[str]) -> list[dict[str, object]]:
    """One assignment for every value of `key=a,b,c`."""
    key, equals, values = entry.partition("=")
    if not equals or not values:
        problems.append(f"config.sweep.product: {entry!r} is not KEY=VALUE,VALUE,...")
        return []
    parts = [_assignment(key, value, "product", problems) for value in values.split(",")]
    found = [part for part in parts if part]
    if len({repr(part) for part in found}) < len(found):
        problems.append(f"config.sweep.product: {entry!r} names a value twice")
    return found


def _variation(entry: str, problems: list[str]) -> dict[str, object]:
    """{key: value} of `key=value key=value ...`."""
    out: dict[str, object] = {}
    for word in entry.split():
        key, equals, value = word.partition("=")
        if not equals:
            problems.append(f"config.sweep.variations: {word!r} in {entry!r} is not KEY=VALUE")
        elif key in out:
            problems.append(f"config.sweep.variations: {key} is set twice in {entry!r}")
        else:
            out |= _assignment(key, value, "variations", problems)
    return out


def _assignment(key: str, text: str, where: str, problems: list[str]) -> dict[str, object]:
    """{key: value}, the value read by the type of the config's field; nothing after a problem."""
    if key == "recipe":
        if text not in RECIPES:
            problems.append(f"config.sweep.{where}: no recipe {text!r}; choose one of {', '.join(RECIPES)}")
        return {key: text} if text in RECIPES else {}
    found = leaf(Config, key)
    reason = next((why for common, why in COMMON.items() if key == common or (common[-1] == "." and key.startswith(common))), "")
    if found and reason:
        problems.append(f"config.sweep.{where}: {key} cannot vary: {reason}")
    elif found is None:
        near = nearest(key, config_lib.flat(Config()))
        hint = f"did you mean {near}?" if near else "docs/reference/config.md lists all keys"
        problems.append(f"config.sweep.{where}: unknown key {key!r}; {hint}")
    else:
        try:
            return {key: from_text(text, found[0])}
        except ValueError as error:
            problems.append(f"config.sweep.{where}: {key}: {error}")
    return {}


def _member(base: Config, values: dict[str, object], name: str) -> Config:
    """The base config with a recipe, then the other values. Raises `ConfigError`."""
    plain = dataclasses.asdict(base)
    plain |= {"sweep": {}, "name": f"{base.name} {name}", "run_dir": str(Path(base.run_dir) / name)}
    recipe = RECIPES[values["recipe"]] if "recipe" in values else {}
    for key, value in ({k: v for k, v in recipe.items() if k not in COMMON} | values).items():  # the batch is that of the stream
        if key == "recipe":
            continue
        *sections, last = key.split(".")
        node = plain
        for section in sections:
            node = node[section]
        node[last] = value
    if plain["seed"] != base.seed:
        plain["data_seed"] = base.seed_of_data
    return config_lib.resolve(plain)


def _of_all(config: Config, out: list[Config]) -> list[str]:
    """What is wrong between members."""
    problems = []
    if config.stream.mask_outliers and len({frozenset(c.sae.hookpoints) for c in out}) > 1:
        problems.append("config.stream.mask_outliers: which rows are left out depends on the hookpoints, and these SAEs read "
                        "different ones; set it to False, or make one sweep for each")
    for a, b in itertools.combinations(out, 2):
        if not config_lib.differences(a, dataclasses.replace(b, name=a.name)):
            problems.append(f"config.sweep: {Path(a.run_dir).name} and {Path(b.run_dir).name} are the same SAE; leave one out")
    return problems


def _names(chosen: list[dict[str, object]]) -> list[str]:
    """A directory name for every assignment, unique also where letter case does not count."""
    leaves = [key.rsplit(".", 1)[-1] for key in {key for values in chosen for key in values}]
    plain = []
    for values in chosen:
        parts = []
        for key, value in values.items():
            last = key.rsplit(".", 1)[-1]
            parts.append(f"{last if leaves.count(last) == 1 else key}={_short(value)}")
        plain.append(",".join(parts) or "base")
    out = []
    for name, values in zip(plain, chosen, strict=True):
        if len(name) > _LONGEST or [n.lower() for n in plain].count(name.lower()) > 1:
            name = f"{name[:_LONGEST]}~{text_sha256(repr(values))[:10]}"
        out.append(name)
    return out


def _short(value: object) -> str:
    """A value without a character that a shell or a file system reads otherwise."""
    if isinstance(value, tuple):
        return "+".join(map(_short, value))
    if isinstance(value, float):
        value = f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return re.sub(r"[^A-Za-z0-9_.+-]", "-", str(value))
