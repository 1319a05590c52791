"""The project's own training step, compiled for a topology ahead of time: what the compiler says of its memory and collectives.

TPU slices are compiled by `libtpu`, which needs no TPU (extra `saejax[tpu-plan]`); `cpu:N` by the CPU compiler, on N simulated
devices. There is no compiler for absent GPUs.
"""

import contextlib
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from saejax.base import sharding
from saejax.base.errors import ConfigError
from saejax.base.hardware import Topology
from saejax.config import Config
from saejax.plan.hlo import moved
from saejax.sae import SAESpec
from saejax.train import step_cost
from saejax.train.member import total_steps
from saejax.train.state import abstract_state
from saejax.train.step import make_step, takes_pairs

# libtpu would ask the network what machine this is, say so when it is none, and refuse a second process beside it.
_COMPILER_ONLY = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost",
                  "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def compile_step(config: Config, spec: SAESpec, topology: Topology, data: int, dict_: int) -> dict:
    """What the compiler reserves and moves. `refused`: its reason, where the step does not fit.

    Raises `ConfigError` where there is no compiler for this topology.
    """
    mesh = mesh_for(topology, data, dict_)
    return outcome(lambda: lowered(config, spec, mesh, topology.chip.platform), data, dict_)


def outcome(lower: Callable, data: int, dict_: int) -> dict:
    """`read` of what `lower` gives, compiled. `refused`: the compiler's reason, where it does not fit."""
    clock = time.monotonic()
    try:
        found = read(lower().compile(), data, dict_)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = {"refused": _reason(str(error))}
    return found | {"seconds_to_compile": round(time.monotonic() - clock, 1)}


def mesh_for(topology: Topology, data: int, dict_: int) -> Mesh:
    """The mesh of devices that need not be here. Raises `ConfigError` where there is no compiler for this topology."""
    return Mesh(_devices(topology).reshape(data, dict_), ("data", "dict"), axis_types=(AxisType.Explicit,) * 2)


def lowered(config: Config, spec: SAESpec, mesh: Mesh, platform: str):
    """The step that training would run on this mesh, on the path that it would take on this platform."""
    pairs = takes_pairs(config, spec, platform)
    config = step_cost.with_path(config, pairs)
    # Outside the mesh: its constants are made at once, on devices that are here.
    step = make_step(config, spec, total_steps(config), platform)
    rows = jax.ShapeDtypeStruct((config.train.batch, spec.d_in + (spec.d_out or 0)), jnp.bfloat16,
                                sharding=sharding.sharding(mesh, "rows_at_rest", None))
    with jax.set_mesh(mesh):
        return step.trace(abstract_state(config, spec, mesh), rows).lower(lowering_platforms=(platform,))


def read(compiled, data: int, dict_: int) -> dict:
    """Bytes on each chip, FLOPs, the compiler's estimate of the time (None where it has none), collectives.

    The peak on a TPU can be less than the sum of the kinds: some temporaries lie where others were.
    """
    stats, cost = compiled.memory_analysis(), compiled.cost_analysis()
    memory = {"arguments": stats.argument_size_in_bytes, "temporaries": stats.temp_size_in_bytes,
              "outputs beside arguments": stats.output_size_in_bytes - stats.alias_size_in_bytes,
              "program": stats.generated_code_size_in_bytes}
    on_cpu = any(device.platform == "cpu" for device in jax.tree.leaves(compiled.input_shardings)[0].device_set)
    try:
        found, unknown = moved(compiled.as_text(), data, dict_), {}
    except jax.errors.JaxRuntimeError as error:  # some versions of the TPU compiler cannot print some of their programs
        found, unknown = [], {"collectives_unknown": _reason(str(error))}
    estimate = cost.get("optimal_seconds", -1.0)
    total: Counter = Counter()
    for m in found:
        total[f"{m.axis}{' in branches' if m.branch else ''}"] += m.bytes
    largest = sorted(found, key=lambda m: -m.bytes)[:12]
    return {
        "memory": memory,
        "peak_bytes": sum(memory.values()) if on_cpu else stats.peak_memory_in_bytes,  # the CPU's leaves temporaries out
        "flops_per_step_per_chip": round(cost.get("flops", 0)), "bytes_accessed": round(cost.get("bytes accessed", 0)),
        "step_seconds": estimate if estimate > 0 else None,
        "collective_bytes": dict(sorted(total.items())),
        "collectives": [{"kind": m.kind, "axis": m.axis, "bytes": m.bytes, "times": m.times, "branch": m.branch,
                         "shapes": list(m.shapes)} for m in largest if m.bytes],
        **unknown,
    }


def _devices(topology: Topology) -> np.ndarray:
    if topology.chip.platform == "cpu":
        with contextlib.suppress(RuntimeError):  # the devices are there already
            jax.config.update("jax_num_cpu_devices", topology.size)
        if topology.size > jax.device_count("cpu"):
            raise ConfigError(f"compiling for {topology.name}: there are {jax.device_count('cpu')} CPU devices here; set "
                              f"JAX_NUM_CPU_DEVICES={topology.size}")
        return np.array(jax.devices("cpu")[:topology.size])
    if topology.chip.platform != "tpu":
        raise ConfigError(f"compiling for {topology.name}: only TPU topologies (with libtpu) and cpu:N can be compiled for while "
                          "they are not there; do without")
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ConfigError(f"compiling for {topology.name} needs the TPU compiler: pip install 'saejax[tpu-plan]', or do "
                          "without") from None
    from jax.experimental import topologies
    try:
        with _as_compiler_only():
            return np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices)
    except Exception as error:  # the compiler's own list of shapes may differ from ours
        raise ConfigError(f"compiling for {topology.name}: the TPU compiler refuses it ({_reason(str(error))})") from error


@contextlib.contextmanager
def _as_compiler_only() -> Iterator[None]:
    """The environment that libtpu is loaded in; what it does not name already is taken back, for those who use a real TPU."""
    added = {name: value for name, value in _COMPILER_ONLY.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _reason(message: str) -> str:
    """The sentence of a compiler's error that says why."""
    found = re.search(r"Ran out of memory[^.]*\.\d+[^.]*\.\d+\w*\)?|[^\n]+", message)
    return " ".join((found[0] if found else message).split())[:240]
