"""Arguments of the `saejax` command -> `Arguments`. Every mistake in them is one `ConfigError`. Does not import jax."""

import difflib
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections.config_flags import config_flags

from saejax import config as config_lib
from saejax.base.distributed import announced
from saejax.base.errors import ConfigError
from saejax.config import Config
from saejax.config.values import nearest, rounder

# Options of jobs, by what they take.
SWITCHES = {"json": "JSON output", "jumprelu": "topk as jumprelu", "compile": "compile the step for the topology",
            "approximate": "topk as one threshold", "yes": "upload", "ablate": "the feature at 0",
            "map": "a picture of the features", "rebuild": "begin anew"}
NUMBERS = {"contexts": "held-out contexts", "context": "tokens of a row",
           "d_in": "width of the activations", "tokens": "how many tokens",
           "verify": "examples to run again", "pairs": "pairs to ablate", "sample": "how many features", "d_sae": "features",
           "batch": "rows of a step", "k": "active features", "steps": "steps of a repeat", "repeats": "how often",
           "threads": "processors", "megabytes": "size of the store",
           "draw": "activations of each feature", "concurrency": "requests at a time", "timeout": "seconds of a request"}
CHOICES = {"split": ["train", "heldout"], "export": ["neuronpedia"], "baseline": ["neurons", "directions", "random_sae"]}
TEXTS = {"compute_dtype": "dtype of the products", "out": "output directory", "topology": "chips, as v5p:4x8x8",
         "to": "format to write", "text": "sources of text", "index": "feature index", "store": "activation store",
         "format": "format of the files", "rows": "activations (.npy)",
         "repo": "repository", "license": "licence", "only": "benchmarks", "devices": "numbers of devices", "kind": "recipes",
         "model": "language model", "source": "text", "hookpoint": "hookpoint", "feature": "number of a feature",
         "scale": "multiples of its maximum",
         "vector_scale": "multiples of a vector", "max": "its maximum", "positions": "all, last or numbers",
         "add-direction": "vector (.npy)", "temperature": "of sampling", "token": "next token", "html": "page to write",
         "do": "what to judge", "judge": "who judges", "judge_model": "its name there", "features": "feature numbers",
         "explanations": "JSON lines",
         **dict.fromkeys(("prompt", "answer", "against", "positives", "negatives", "find", "like", "within", "set"),
                         "what to search by")}


@dataclass(frozen=True)
class Distributed:
    """How the processes of a job find each other; None leaves it to the cluster's environment."""

    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    timeout: int | None
    heartbeat: int | None


@dataclass(frozen=True)
class Arguments:
    """What the command line asks for. `config` is resolved; `paths` are runs, checkpoint steps, stores or releases."""

    config: Config | None
    paths: tuple[Path, ...]
    distributed: Distributed | None
    options: Mapping[str, Any]

    def option(self, name: str) -> Any:
        """The value of an option of this job; None (of a switch False) where it was not given."""
        return self.options[name]

    @property
    def out(self) -> Path | None:
        """Where to write."""
        return Path(self.options["out"]) if self.options["out"] else None

    @property
    def json(self) -> bool:
        """Print JSON."""
        return self.options["json"]


def parse(job: str, arguments: list[str], *, takes_config: bool, options: tuple[str, ...]) -> Arguments:
    """Parses what follows the name of a job. Raises `ConfigError`."""
    fv = _flags(takes_config, options)
    arguments = _config_first(arguments) if takes_config else arguments
    _check_overrides(arguments, takes_config, job)
    file = _config_file(arguments) if takes_config else None
    try:
        with_program = ["saejax", *arguments]
        if takes_config and file is not None:
            fv["config"]._sys_argv = with_program
        _, *paths = fv(with_program)
    except flags.Error as error:
        raise _flag_error(job, file, error, [f"--{name}" for name in fv]) from None
    except Exception as error:  # whatever a config file can raise
        raise _config_file_error(file, error) from error
    config = None
    if file is not None:
        config = config_lib.resolve(_returned(file, fv["config"].value))
    if config is not None and paths:
        raise ConfigError(f"saejax {job}: got both --config={file} and {' '.join(paths)}; give one of them")
    return Arguments(config=config, paths=tuple(Path(p) for p in paths), distributed=_distributed(fv),
                     options={name: fv[name].value for name in options if name != "distributed"})


def _flags(takes_config: bool, options: tuple[str, ...]) -> flags.FlagValues:
    fv = flags.FlagValues()
    fv.set_gnu_getopt(True)
    if takes_config:
        config_flags.DEFINE_config_file("config", None, "config file", flag_values=fv, lock_config=True)
    for name in options:
        if name == "distributed":
            _define_distributed(fv)
        elif name in SWITCHES:
            flags.DEFINE_bool(name, False, SWITCHES[name], flag_values=fv)
        elif name in NUMBERS:
            flags.DEFINE_integer(name, None, NUMBERS[name], lower_bound=1, flag_values=fv)
        elif name in CHOICES:
            flags.DEFINE_enum(name, None, CHOICES[name], "one of these", flag_values=fv)
        else:
            flags.DEFINE_string(name, None, TEXTS[name], flag_values=fv)
    return fv


def _define_distributed(fv: flags.FlagValues) -> None:
    flags.DEFINE_bool("distributed", None, "one of several processes", flag_values=fv)
    flags.DEFINE_string("coordinator", None, "host:port of process 0", flag_values=fv)
    flags.DEFINE_integer("num_processes", None, "processes in all", lower_bound=1, flag_values=fv)
    flags.DEFINE_integer("process_id", None, "number of this process", lower_bound=0, flag_values=fv)
    flags.DEFINE_integer("start_timeout", None, "seconds to wait for the others", lower_bound=1, flag_values=fv)
    flags.DEFINE_integer("heartbeat", None, "seconds until a silent process is dead", lower_bound=1, flag_values=fv)


def _distributed(fv: flags.FlagValues) -> Distributed | None:
    if "distributed" not in fv:
        return None
    given = {name: fv[name].value for name in ("coordinator", "num_processes", "process_id")}
    asked, several = fv["distributed"].value, announced()
    if not asked and any(value is not None for value in given.values()):
        raise ConfigError("--coordinator, --num_processes and --process_id need --distributed as well")
    if asked is False or (asked is None and not several):
        return None
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if missing and len(missing) < 3:
        raise ConfigError(f"--distributed: {', '.join(missing)} missing; give --coordinator, --num_processes and "
                          "--process_id together, or none of them on a cluster that announces itself")
    return Distributed(**given, timeout=fv["start_timeout"].value, heartbeat=fv["heartbeat"].value)


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
    if not Path(file.split(":", 1)[0]).is_file():
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
        hint = f"; did you mean --config.{near}?" if near else "; docs/config.md lists all keys"
        problems.append(f"config: unknown key {key!r}{hint}")
    if problems:
        raise ConfigError("; ".join(problems))


def _flag_error(job: str, file: str | None, error: flags.Error, known: list[str]) -> ConfigError:
    """One line for absl's errors; those of a config file come wrapped in them."""
    if file is not None and _cause(file, error) is not None:
        return _config_file_error(file, error)
    if isinstance(error, flags.UnrecognizedFlagError):
        near = difflib.get_close_matches(f"--{error.flagname}", known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"see `saejax {job} --help`"
        return ConfigError(f"saejax {job}: unknown flag --{error.flagname}; {hint}")
    match = re.match(r"flag --([\w.]+)=(.*?): (.*)", " ".join(str(error).split()))
    if match and match[1].startswith("config."):
        return ConfigError(f"{match[1]}: expected {_type_of(match[1])}, got {match[2]!r}{rounder(match[2])}")
    return ConfigError(f"saejax {job}: {' '.join(str(error).split())}")


def _type_of(key: str) -> str:
    node = Config
    for part in key.split(".")[1:]:
        node = typing.get_type_hints(node)[part]
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
        hint = f"did you mean {near[1]!r}?" if near else "docs/config.md lists all keys"
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
