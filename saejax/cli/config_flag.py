"""`--config=FILE --config.key=value`: what config_flags makes of them, with its errors in one line. Does not import jax."""

import contextlib
import functools
import re
import typing
from dataclasses import is_dataclass
from pathlib import Path

from absl import flags
from ml_collections.config_flags import config_flags

from saejax import config as config_lib
from saejax.base.errors import ConfigError
from saejax.base.storage import plain_path
from saejax.config import Config
from saejax.config.values import nearest, rounder


def config_of(job: str, arguments: list[str], *, takes_config: bool) -> tuple[Config | None, list[str]]:
    """(the resolved config or None, the other arguments). Raises `ConfigError`."""
    mine, rest = _divided(arguments)
    mine = _config_first(mine)
    _check_overrides(mine, takes_config, job)
    if not mine:
        return None, rest
    if not takes_config:
        raise ConfigError(f"saejax {job} takes no --config; see `saejax {job} --help`")
    file, fv = _config_file(mine), flags.FlagValues()
    mine, nothing = _without_none(mine)
    config_flags.DEFINE_config_file("config", None, "config file", flag_values=fv, lock_config=True)
    try:
        with contextlib.ExitStack() as opened:
            if file is not None and ":" in file and Path(file).is_file():  # config_flags takes what is behind it for an argument
                mine[0] = f"--config={opened.enter_context(plain_path(file))}"
            fv["config"]._sys_argv = ["saejax", *mine]
            fv(["saejax", *mine])
    except flags.Error as error:
        raise _flag_error(job, file, error) from None
    except Exception as error:  # whatever a config file can raise
        raise _config_file_error(file, error) from error
    config = _returned(file, fv["config"].value)
    for *parents, key in nothing:
        functools.reduce(getattr, parents, config)[key] = None
    return config_lib.resolve(config), rest


def _without_none(arguments: list[str]) -> tuple[list[str], list[list[str]]]:
    """(the others, the keys that are set to none), where the key may be none: no parser of numbers knows the word."""
    found = [(a, re.fullmatch(r"--?config\.([^=]*)=none", a, re.IGNORECASE)) for a in arguments]
    keys = {a: m[1] for a, m in found if m and "None" in _type_of(f"config.{m[1]}")}
    return [a for a in arguments if a not in keys], [key.split(".") for key in keys.values()]


def _divided(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(what speaks of the config, the rest); a value that stands behind its key goes with it."""
    mine, rest, waiting = [], [], False
    for argument in arguments:
        if waiting and not argument.startswith("--"):
            mine[-1] += f"={argument}"
        elif re.match(r"--?(?:no)?config(?:[.=]|$)", argument):
            mine.append(argument)
        else:
            rest.append(argument)
            waiting = False
            continue
        waiting = not waiting and "=" not in argument and _takes_value(argument)
    return mine, rest


def _takes_value(argument: str) -> bool:
    """False for `--config.key` of a switch, which stands by itself."""
    key = argument.lstrip("-")
    return key == "config" or (not key.startswith("noconfig.") and _type_of(key) != "bool")


def _config_first(arguments: list[str]) -> list[str]:
    """`--config FILE` or `--config=FILE` moved to the front, where config_flags wants it."""
    for i, argument in enumerate(arguments):
        if re.match(r"--?config=", argument):
            return [argument, *arguments[:i], *arguments[i + 1:]]
        if argument in ("--config", "-config") and i + 1 < len(arguments):
            return [f"--config={arguments[i + 1]}", *arguments[:i], *arguments[i + 2:]]
    return arguments


def _config_file(arguments: list[str]) -> str | None:
    if not (arguments and re.match(r"--?config=", arguments[0])):
        return None
    file = arguments[0].split("=", 1)[1]
    if not (Path(file).is_file() or Path(file.split(":", 1)[0]).is_file()):
        raise ConfigError(f"--config={file}: there is no such file; configs/ has examples")
    return file


def _check_overrides(arguments: list[str], takes_config: bool, job: str) -> None:
    """Every `--config.key` must exist, whether or not a config file can be read."""
    keys = [m[1] for a in arguments if (m := re.match(r"--?(?:no)?config\.([^=]*)", a))]
    if not keys:
        return
    if not takes_config:
        raise ConfigError(f"saejax {job} takes no --config.{keys[0]}; see `saejax {job} --help`")
    if _config_file(arguments) is None:
        raise ConfigError(f"--config.{keys[0]} needs --config=FILE")
    known = config_lib.flat(Config())
    problems = []
    for key in keys:
        if key in known:
            continue
        if any(k.startswith(f"{key}.") for k in known):
            problems.append(f"config.{key} is a section; set its keys one by one, as --config.{key}."
                            f"{next(k for k in known if k.startswith(f'{key}.')).removeprefix(f'{key}.')}=...")
            continue
        near = nearest(key, known)
        hint = f"; did you mean --config.{near}?" if near else "; docs/reference/config.md lists all keys"
        problems.append(f"config: unknown key {key!r}{hint}")
    if problems:
        raise ConfigError("; ".join(problems))


def _flag_error(job: str, file: str, error: flags.Error) -> ConfigError:
    """One line for absl's errors; those of a config file come wrapped in them."""
    if _cause(file, error) is not None:
        return _config_file_error(file, error)
    match = re.match(r"flag --([\w.]+)=(.*?): (.*)", " ".join(str(error).split()))
    if match and match[1].startswith("config."):
        return ConfigError(f"{match[1]}: expected {_type_of(match[1])}, got {match[2]!r}{rounder(match[2])}")
    return ConfigError(f"saejax {job}: {' '.join(str(error).split())}")


def _type_of(key: str) -> str:
    node = Config
    for part in key.split(".")[1:]:
        node = typing.get_type_hints(node).get(part, "value")
        if not is_dataclass(node):
            break
    return getattr(node, "__name__", str(node)) if isinstance(node, type) else str(node)


def _config_file_error(file: str, error: BaseException) -> ConfigError:
    inner, line = _cause(file, error) or (error, None)
    where = f"{file}:{line}" if line is not None else file
    message = " ".join(str(inner).split())
    if isinstance(inner, ConfigError):
        return ConfigError(f"{where}: {message}")
    if unknown := re.match(r"""['"]?Key "(\w+)" does not exist""", message):
        near = re.search(r'Did you mean "(\w+)"', message)
        hint = f"did you mean {near[1]!r}?" if near else "docs/reference/config.md lists all keys"
        return ConfigError(f"{where}: unknown key {unknown[1]!r}; {hint}")
    return ConfigError(f"{where}: {type(inner).__name__}: {message[:300]}")


def _cause(file: str, error: BaseException | None) -> tuple[BaseException, int] | None:
    """The exception that left the config file, with the line; the flag libraries wrap it in others."""
    while error is not None:
        line = _line_in(file, error)
        if line is not None:
            return error, line
        error = error.__context__
    return None


def _line_in(file: str, error: BaseException) -> int | None:
    """The line of the config file at which an error left it."""
    path, found = Path(file.split(":", 1)[0]).resolve(), None
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).resolve() == path:
        return error.lineno
    trace = error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename).resolve() == path:
            found = trace.tb_lineno
        trace = trace.tb_next
    return found


def _returned(file: str, value):
    import ml_collections
    if not isinstance(value, ml_collections.ConfigDict):
        raise ConfigError(f"{file}: get_config() returned {type(value).__name__}; return what "
                          "saejax.config.default_config() gave")
    return value
