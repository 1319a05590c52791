"""What the paths and options of a command stand for."""

from pathlib import Path

import numpy as np

from saejax.base.errors import ConfigError
from saejax.cli.arguments import Arguments
from saejax.config import Config
from saejax.features.index.explanations import load_explanations
from saejax.runs.layout import saved_config, without_parts
from saejax.runs.subject import AUTO, Given, Subject, open_all

GIVEN = ("model", "hookpoint", "text", "context", "index", "store", "format")  # options of `Given`


def subjects(arguments: Arguments, **more) -> list[Subject]:
    """The subjects of a command line: those of its paths, or of the run of its config; more: fields of `Given`."""
    given = {name: arguments.options[name] for name in GIVEN if arguments.options.get(name)}
    given = Given(**{"format": AUTO, **given, **more})
    paths = without_parts(arguments.paths) if arguments.config is None else [Path(arguments.config.run_dir)]
    return [subject for path in paths for subject in open_all(_source(path), given, arguments.config)]


def one_subject(arguments: Arguments, job: str, **more) -> Subject:
    """The one subject of a command line. Raises `ConfigError` for several."""
    found = subjects(arguments, **more)
    if len(found) != 1:
        raise ConfigError(f"saejax {job}: takes one SAE, these are {len(found)}: {', '.join(str(s.source) for s in found[:5])}")
    return found[0]


def _source(path: Path) -> str | Path:
    """A path, or the name of a place on the hub, which is none."""
    return path if path.exists() else str(path)


def configs(arguments: Arguments) -> list[Config]:
    """The config given, or those of the runs given."""
    if arguments.config is not None:
        return [arguments.config]
    return [saved_config(path) for path in arguments.paths]


def explanations(arguments: Arguments) -> dict[int, str]:
    """Those of the file that is given; none without one."""
    file = arguments.option("explanations")
    return load_explanations(Path(file)) if file else {}


def prompts_of(file: str) -> list[str]:
    """The prompts of a file, one a line; empty lines do not count."""
    try:
        found = [line for line in Path(file).read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise ConfigError(f"{file}: no readable text file of prompts, one a line ({reason})") from error
    if not found:
        raise ConfigError(f"{file}: holds no prompts; write one a line")
    return found


def array_of(option: str, file: str) -> np.ndarray:
    """The numbers in an .npy file that an option names."""
    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"--{option}={file}: not a readable .npy file of numbers "
                          f"({' '.join(str(error).split())[:150]})") from error


def vector_of(option: str, file: str) -> np.ndarray:
    """The vector [D] float32 in an .npy file that an option names."""
    found = array_of(option, file)
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.number) or not np.isfinite(found).all():
        raise ConfigError(f"--{option}={file}: shape {found.shape}, {found.dtype}; give one vector of finite numbers")
    return found.astype(np.float32)
