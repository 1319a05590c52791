"""The language model's mesh ("data", "model") and where each parameter lives on it: one table of logical axes."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from saejax.base.errors import LMError
from saejax.lm.leaves import Leaf, leaves
from saejax.lm.model import Decoder

# Mesh axis of each logical axis of a parameter; an axis that the mesh does not have means replicated.
AXIS_TO_MESH = {"vocab": "model", "heads": "model", "mlp": "model", "embed": None, "layers": None}


def make_mesh(data: int = -1, model: int = 1, *, rows: int | None = None, devices: list | None = None) -> Mesh:
    """Mesh `data` x `model` over this process's devices (or `devices`), automatic axis types.

    `data` -1 takes as many copies of the model as the devices allow and as divide the `rows` of a batch. Raises LMError
    when the sizes do not fit the devices or the rows.
    """
    devices = list(devices or jax.local_devices())
    most = len(devices) // model if model > 0 else 0
    if not most or data > most or data == 0 or data < -1:
        raise LMError(
            f"config.lm.model_parallel: a mesh of data x model = {data} x {model} needs more than the {len(devices)} devices of "
            f"a process; use at most model={len(devices)}, data={max(most, 1)}, or data=-1"
        )
    if data == -1:
        data = max(n for n in range(1, most + 1) if rows is None or rows % n == 0)
    if rows is not None and rows % data:
        raise LMError(f"a mesh of {data} copies of the model does not divide the {rows} contexts of a batch; change one of them")
    grid = np.array(devices[: data * model]).reshape(data, model)
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def place(model: Decoder, mesh: Mesh) -> Decoder:
    """The decoder with every parameter on `mesh`, each device holding its own part only."""
    table = leaves(model.cfg)
    params = {name: leaf[...] for name, leaf in model.whole.items()}
    params |= {f"blocks.{name}": leaf[...] for name, leaf in model.blocks.items()}
    return Decoder(
        model.cfg, {name: jax.device_put(value, leaf_sharding(mesh, table[name])) for name, value in params.items()}
    )


def leaf_sharding(mesh: Mesh, leaf: Leaf) -> NamedSharding:
    """Placement of a parameter: dimensions that map to a mesh axis and divide by its size; replicated otherwise."""
    spec = []
    for size, axis in zip(leaf.shape, leaf.axes, strict=True):
        target = AXIS_TO_MESH[axis] if axis else None
        spec.append(target if target in mesh.shape and size % mesh.shape[target] == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*spec))
