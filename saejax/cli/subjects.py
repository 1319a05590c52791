"""What the paths and options of a command stand for."""

from dataclasses import fields
from pathlib import Path

import numpy as np

from saejax.base.errors import ConfigError
from saejax.config import Config
from saejax.features.index.explanations import load_explanations
from saejax.runs.layout import saved_config, without_parts
from saejax.runs.opening import open_all
from saejax.runs.subject import AUTO, Given, Subject

GIVEN = [field.name for field in fields(Given)]


def subjects(options, **more) -> list[Subject]:
    """The subjects of a command line: those of its paths, or of the run of its config; more: fields of `Given`."""
    config = getattr(options, "config", None)
    given = {name: getattr(options, name) for name in GIVEN if getattr(options, name, None)}
    given = Given(**{"format": AUTO, **given, **more})
    sources = without_parts(map(_source, options.paths)) if config is None else [Path(config.run_dir)]
    return [subject for source in sources for subject in open_all(source, given, config)]


def one_subject(options, **more) -> Subject:
    """The one subject of a command line. Raises `ConfigError` for a sweep of several."""
    found = subjects(options, **more)
    if len(found) != 1:
        raise ConfigError(f"this job takes one SAE, these are {len(found)}: {', '.join(str(s.source) for s in found[:5])}")
    return found[0]


def _source(given: str) -> str | Path:
    """A path, or the name of a place on the hub, which is none."""
    return Path(given) if Path(given).exists() else given


def configs(options) -> list[Config]:
    """The config given, or those of the runs given."""
    if options.config is not None:
        return [options.config]
    return [saved_config(Path(path)) for path in options.paths]


def explanations(options) -> dict[int, str]:
    """Those of the file that is given; none without one."""
    return load_explanations(options.explanations) if options.explanations else {}


def prompts_of(file: Path) -> list[str]:
    """The prompts of a file, one a line; empty lines do not count."""
    try:
        found = [line for line in Path(file).read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise ConfigError(f"{file}: no readable text file of prompts, one a line ({reason})") from error
    if not found:
        raise ConfigError(f"{file}: holds no prompts; write one a line")
    return found


def array_of(option: str, file: Path) -> np.ndarray:
    """The numbers in an .npy file that an option names; "": that stands without a name."""
    given = f"--{option}={file}" if option else str(file)
    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{given}: not a readable .npy file of numbers ({' '.join(str(error).split())[:150]})") from error


def vector_of(option: str, file: Path) -> np.ndarray:
    """The vector [D] float32 in an .npy file that an option names."""
    found = array_of(option, file)
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.number) or not np.isfinite(found).all():
        given = f"--{option}={file}" if option else str(file)
        raise ConfigError(f"{given}: shape {found.shape}, {found.dtype}; give one vector of finite numbers")
    return found.astype(np.float32)
