"""What tests need that start processes of their own: their environment and a port to meet at."""

import os
import socket
from pathlib import Path

# A collective loaded from the compilation cache waits for ever under gloo, and a process that is killed may leave half an entry:
# every process compiles for itself.
_DROPPED = ("JAX_COMPILATION_CACHE_DIR",)


def environment(devices: int) -> dict[str, str]:
    """The environment of one process of several, with this many simulated CPU devices."""
    kept = {name: value for name, value in os.environ.items() if name not in _DROPPED and not name.lower().endswith("_proxy")}
    return kept | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def as_user(root: Path) -> dict[str, str]:
    """The environment of somebody with one device who installed what is in `root`; nothing of the test suite's own."""
    own = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "MPLBACKEND", *_DROPPED)
    kept = {name: value for name, value in os.environ.items() if name not in own}
    return kept | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
