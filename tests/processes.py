"""What tests need that start processes of their own: their environment and a port to meet at."""

import os
import socket

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
