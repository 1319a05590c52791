"""The device mesh ("data", "dict"), the one table of logical axes, and placement without a host ever holding the whole."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from saejax.base import hardware
from saejax.base.errors import ConfigError
from saejax.base.records import MeshOptions

# Logical axis of an array -> mesh axis. Rows of a batch rest over all devices and are gathered along `dict` inside the step.
AXES: dict[str, str | tuple[str, str] | None] = {
    "rows": "data",
    "rows_at_rest": ("data", "dict"),
    "features": "dict",
    "d_in": None,
    "d_out": None,
}
AT_ONCE = 1 << 28  # bytes of an array that a device holds as a whole on its way to the hosts


def spec(*logical: str | None) -> PartitionSpec:
    """PartitionSpec of an array whose dimensions carry these logical axes (None: replicated)."""
    return PartitionSpec(*(AXES[a] if a else None for a in logical))


def mesh_is_set() -> bool:
    """True inside `jax.set_mesh` (or a program traced under it); numeric code also runs without a mesh, on one device."""
    return not jax.sharding.get_abstract_mesh().empty


def shards() -> int:
    """Into how many parts the features are split, by the mesh that is set."""
    return jax.sharding.get_abstract_mesh().shape.get("dict", 1)


def chip() -> hardware.Chip:
    """What a program is made for: the sort of chip of the mesh that is set, else that of the devices here."""
    device = jax.sharding.get_abstract_mesh().abstract_device if mesh_is_set() else None
    return hardware.chip_of(device or jax.local_devices()[0])


def out(*logical: str | None) -> PartitionSpec | None:
    """`spec(...)` for an `out_sharding=` argument where a mesh is set, None where there is none."""
    return spec(*logical) if mesh_is_set() else None


def gathered(x_BD: jax.Array) -> jax.Array:
    """Rows that rest over all devices -> rows split over `data`: one all-gather along `dict`, in the array's dtype."""
    return jax.sharding.reshard(x_BD, spec("rows", None)) if mesh_is_set() else x_BD


def scattered(part_BD: jax.Array, dtype, axis: int = 0) -> jax.Array:
    """Inside `shard_map`, where a mesh is set: the sum over `dict` of what each shard adds, float32, rows (dimension `axis`) at
    rest. One reduce-scatter in `dtype`; its gradient is one all-gather.
    """
    return jax.lax.psum_scatter(part_BD.astype(dtype), "dict", scatter_dimension=axis, tiled=True).astype(np.float32)


def on_shards(local: Callable, given, returned) -> Callable:
    """`local` on every device of the mesh, placed as said; it is told the number of shards of the dictionary.
    Where no mesh is set it is called as it is.
    """
    if not mesh_is_set():
        return functools.partial(local, shards=1)
    # No gradient passes through a shard_map here, so nothing is lost without check_vma, which loops would need help with.
    return jax.shard_map(lambda *values: local(*values, shards=jax.lax.axis_size("dict")), in_specs=given, out_specs=returned,
                         check_vma=False)


def over(reduce: Callable, value: jax.Array, *axes: str) -> jax.Array:
    """A reduction over axes of the mesh, where one is set."""
    return reduce(value, axes) if mesh_is_set() else value


def mesh_sizes(options: MeshOptions, n: int) -> tuple[int, int]:
    """(data, dict) on n devices. Raises `ConfigError` when the sizes do not use all of them."""
    data, dict_ = options.data, options.dict
    if data == -1:
        data = max(1, n // dict_)
    if dict_ == -1:
        dict_ = max(1, n // data)
    if data * dict_ != n:
        fits = ", ".join(f"{d}x{n // d}" for d in range(1, n + 1) if n % d == 0)
        raise ConfigError(f"config.mesh: data x dict = {data} x {dict_} does not use the {n} devices here; choose one of {fits}")
    return data, dict_


def make_mesh(options: MeshOptions, devices=None) -> Mesh:
    """Mesh ("data", "dict") with explicit axis types over all devices. Raises `ConfigError` when the sizes do not fit."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(options, len(devices))
    return Mesh(np.array(devices).reshape(sizes), ("data", "dict"), axis_types=(AxisType.Explicit,) * 2)


def single_device_mesh(device=None) -> Mesh:
    """The 1 x 1 mesh, so that code for one device and for a pod is the same code."""
    return make_mesh(MeshOptions(1, 1), [device or jax.local_devices()[0]])


def check_batch(batch: int, mesh: Mesh, key: str = "config.train.batch", parts: int = 1) -> None:
    """Raises `ConfigError` unless each of the parts of `batch` rows can rest over all devices of the mesh; names the nearest
    valid sizes.
    """
    _check_batch(batch, mesh.shape["data"], mesh.shape["dict"], key, parts)


def _check_batch(batch: int, data: int, dict_: int, key: str = "config.train.batch", parts: int = 1) -> None:
    n = data * dict_ * parts
    if batch % n:
        of_parts = f" in {parts} parts (config.train.accumulate)" if parts > 1 else ""
        raise ConfigError(f"{key}: {batch} rows cannot be split over the {data} x {dict_} mesh{of_parts}; "
                          f"the nearest valid value is {nearest_multiples(batch, n)}")


def nearest_multiples(value: int, n: int) -> str:
    """The multiples of n around a value, for a message; 0 is none."""
    below, above = value // n * n, math.ceil(value / n) * n
    return f"{above}" if below == 0 else f"{below} or {above}"


def check_features(d_sae: int, mesh: Mesh) -> None:
    """Raises `ConfigError` unless the dictionary divides over the mesh's `dict` axis."""
    _check_features(d_sae, mesh.shape["dict"])


def _check_features(d_sae: int, n: int) -> None:
    if d_sae % n:
        raise ConfigError(f"config.sae.d_sae: {d_sae} features cannot be split over mesh.dict = {n}; the nearest valid "
                          f"value is {math.ceil(d_sae / n) * n}")


def check_divides(batch: int, d_sae: int, data: int, dict_: int, parts: int = 1) -> None:
    """`check_batch` and `check_features` for a mesh whose devices are not here."""
    _check_batch(batch, data, dict_, parts=parts)
    _check_features(d_sae, dict_)


def sharding(mesh: Mesh, *logical: str | None) -> NamedSharding:
    """NamedSharding of an array whose dimensions carry these logical axes."""
    return NamedSharding(mesh, spec(*logical))


def place(value: np.ndarray, where: NamedSharding) -> jax.Array:
    """A host array onto devices; each device receives its own piece only, in every process."""
    if where.is_fully_addressable:
        return jax.device_put(value, where)
    return jax.make_array_from_callback(value.shape, where, lambda index: value[index])


def pieces_here(where: NamedSharding, rows: int, size: int) -> list[int]:
    """Which pieces of `size` rows, of an array of `rows` rows, the devices of this process hold a part of; ascending."""
    held = set()
    for index in where.addressable_devices_indices_map((rows, 1)).values():
        start, stop, _ = index[0].indices(rows)
        held.update(range(start // size, -(-stop // size)))
    return sorted(held)


def place_pieces(value: np.ndarray, where: NamedSharding, rows: int, pieces: Sequence[int], size: int) -> jax.Array:
    """An array of `rows` rows onto devices. value: its `pieces` of `size` rows (`pieces_here`), one behind the other. Its memory
    may be used again when this returns.
    """
    first = {piece: at * size for at, piece in enumerate(pieces)}

    kept = where.mesh.devices.flat[0].platform == "cpu"  # whose arrays may be the memory that they are given

    def part(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(rows)
        at = first[start // size] + start % size  # neighbours among the pieces lie side by side
        found = value[(slice(at, at + stop - start), *index[1:])]
        return found.copy() if kept else found

    out = jax.make_array_from_callback((rows, *value.shape[1:]), where, part)
    return out if kept else jax.block_until_ready(out)


def place_rows(value: np.ndarray | jax.Array, mesh: Mesh) -> jax.Array:
    """Rows at rest over all devices: every process gives its own, equally many, a multiple of its number of devices; those of the
    only process may lie on any devices.
    """
    where = sharding(mesh, "rows_at_rest", *[None] * (value.ndim - 1))
    if isinstance(value, jax.Array):
        return jax.device_put(value, where)
    return jax.make_array_from_process_local_data(where, value)


def own_rows(x: jax.Array) -> np.ndarray:
    """The rows of this process of an array whose rows are at rest, as `place_rows` was given them."""
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def to_host(x: jax.Array) -> np.ndarray:
    """The whole array in every process's host memory (a collective where it spans processes: all must call it). What is split
    by rows only is never as a whole on a device.
    """
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(jax.device_get(x))
    if x.nbytes > AT_ONCE and isinstance(x.sharding, NamedSharding) and all(axes is None for axes in x.sharding.spec[1:]):
        return by_blocks(x)
    from jax.experimental import multihost_utils
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def by_blocks(x: jax.Array) -> np.ndarray:
    """An array that is split by rows, in host memory: of every shard some rows at a time pass through each device."""
    axes, mesh = x.sharding.spec[0], x.sharding.mesh
    shards = len(x) // x.sharding.shard_shape(x.shape)[0]
    out = np.empty((shards, len(x) // shards, *x.shape[1:]), x.dtype)
    rows = out.shape[1]
    size = max(1, min(rows, AT_ONCE * rows // x.nbytes))
    for first in range(0, rows, size):
        first = min(first, rows - size)  # the last block begins in the one before
        out[:, first:first + size] = some_of_each(x, np.int32(first), mesh, axes, size).addressable_data(0)
    return out.reshape(x.shape)


@functools.partial(jax.jit, static_argnames=("mesh", "axes", "size"))
def some_of_each(x: jax.Array, first: jax.Array, mesh: Mesh, axes, size: int) -> jax.Array:
    """Rows first to first + size - 1 of every shard, [shards, size, ...], on every device: one all-gather."""
    def local(x, first):
        return jax.lax.all_gather(jax.lax.dynamic_slice_in_dim(x, first, size), axes)

    return jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(axes), PartitionSpec()), out_specs=PartitionSpec(),
                         check_vma=False)(x, first)


def row_shards(x: jax.Array) -> list[tuple[int, int, frozenset[int]]]:
    """How the rows of an array are cut: (first, one past the last, the processes whose devices hold them), in order. What lies on
    devices of one process only, every process has for itself.
    """
    held: dict[tuple[int, int], set[int]] = {}
    for device, index in x.sharding.devices_indices_map(x.shape).items():
        processes = range(jax.process_count()) if x.is_fully_addressable else [device.process_index]
        held.setdefault(index[0].indices(x.shape[0])[:2], set()).update(processes)
    return [(first, stop, frozenset(processes)) for (first, stop), processes in sorted(held.items())]


def rows_here(x: jax.Array, first: int, stop: int) -> np.ndarray:
    """Rows first to stop - 1, all held by devices of this process, in host memory; no other row passes through it."""
    held = {shard.index[0].indices(x.shape[0])[:2]: shard.data for shard in x.addressable_shards}
    parts = [_rows(data, max(first, a) - a, min(stop, b) - a) for (a, b), data in sorted(held.items()) if a < stop and first < b]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _rows(data: jax.Array, first: int, stop: int) -> np.ndarray:
    if next(iter(data.devices())).platform == "cpu":
        return np.asarray(data)[first:stop]  # the device's own memory
    return np.asarray(jax.lax.dynamic_slice_in_dim(data, first, stop - first))
