"""Compiled programs on disk: a run that is started again loads them instead of compiling.

jax's own persistent cache, in a directory beside the run and not in it: a run directory holds nothing that is executed, wherever
it was copied from, and runs of the same shapes share their programs.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from saejax.base.storage import disk_errors

NAME = ".compilation_cache"  # beside the run directory


@contextlib.contextmanager
def kept(run_dir: Path) -> Iterator[None]:
    """Inside, programs are kept: beside a run of several processes, or where `JAX_COMPILATION_CACHE_DIR` says.

    Raises `DiskError`.
    """
    folder, before = place(run_dir), jax.config.jax_compilation_cache_dir
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


def place(run_dir: Path) -> Path | None:
    """Where programs are kept; None: nowhere, or where jax was told.

    On CPUs nowhere: collectives of several processes do not work there when their programs are loaded.
    """
    if jax.process_count() == 1 or jax.config.jax_compilation_cache_dir or jax.default_backend() == "cpu":
        return None
    return run_dir.absolute().parent / NAME / jax.default_backend()


def _use(folder: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()  # it keeps the directory that it was first used with
