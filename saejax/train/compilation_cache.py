"""Compiled programs on disk: a run that is started again loads them instead of compiling.

jax's own persistent cache, in a directory beside the run and not in it: a run directory holds nothing that is executed, wherever
it was copied from, and runs of the same shapes share their programs.
"""

import contextlib
import dataclasses
import hashlib
import platform
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from saejax.base.logs import say
from saejax.base.storage import disk_errors
from saejax.config import Config

WORDS = ("auto", "on", "off")
NAME = ".compilation_cache"  # beside the run directory


@contextlib.contextmanager
def kept(wanted: str, run_dir: Path) -> Iterator[None]:
    """Inside, programs are kept as `train.compilation_cache` says. Raises `DiskError`."""
    folder, before = place(wanted, run_dir), jax.config.jax_compilation_cache_dir
    if folder is None or str(folder) == before:
        yield
        return
    with disk_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # who can write to it, can run code here
    _use(str(folder))
    try:
        yield
    finally:
        _use(before)


def place(wanted: str, run_dir: Path) -> Path | None:
    """Where programs are kept; None: nowhere, or where jax was told (`JAX_COMPILATION_CACHE_DIR`)."""
    several, here = jax.process_count() > 1, jax.default_backend()
    if wanted == "off" or (wanted == "auto" and (not several or jax.config.jax_compilation_cache_dir)):
        return None
    if several and here == "cpu":
        if wanted != "auto":
            say("config.train.compilation_cache: not used by several processes on CPUs, whose collectives do not work when they "
                "are loaded")
        return None
    base = run_dir.absolute().parent / NAME if wanted in ("auto", "on") else Path(wanted).absolute()
    return base / (f"cpu-{_processor()}" if here == "cpu" else here)


def trusted(config: Config) -> Config:
    """A config that a run directory keeps, without a directory of programs: a file does not say what to execute."""
    given = config.train.compilation_cache
    return config if given in WORDS else dataclasses.replace(config, train=dataclasses.replace(config.train,
                                                                                               compilation_cache="auto"))


def _processor() -> str:
    """Of the processor's instructions: what was compiled for others may not run, and jax does not ask."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = next(line for line in lines if line.split(":")[0].strip() in ("flags", "Features"))
    except (OSError, StopIteration):
        found = f"{platform.processor()} {platform.node()}"
    return hashlib.sha256(f"{platform.machine()} {found}".encode()).hexdigest()[:8]


def _use(folder: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()  # it keeps the directory that it was first used with
