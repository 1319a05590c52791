"""From the tensors of a file to an `SAE`: every device reads its own rows, one piece in host memory at a time."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax.base import sharding
from saejax.formats.arrays import FLOATS, ArrayFile
from saejax.formats.ranges import FeatureFiles
from saejax.sae import SAEParams, SAESpec, from_tensors, param_shapes, param_shardings, tensors

Tensors = ArrayFile | FeatureFiles


@dataclass(frozen=True)
class Part:
    """A parameter as a file has it: under which name, the other way round or not, or one number for all features."""

    tensor: str
    transposed: bool = False
    fill: float | None = None   # the value of a parameter that the file does not hold, or holds once for all features


def parts_of(spec: SAESpec, names: Mapping[str, str], transposed: tuple[str, ...] = (),
             fills: Mapping[str, float] | None = None) -> dict[str, Part]:
    """{parameter: Part}. names: the tensors of parameters that are called otherwise; fills: parameters with one value."""
    fills = fills or {}
    found = tensors(param_shapes(spec, folded=True))
    return {name: Part(names.get(name, name), name in transposed, fills.get(name)) for name in found}


def expected_shapes(spec: SAESpec, parts: Mapping[str, Part]) -> dict[str, tuple[int, ...]]:
    """{tensor: shape} that a file must hold for these parts."""
    shapes = tensors(param_shapes(spec, folded=True))
    return {part.tensor: shapes[name][::-1] if part.transposed else shapes[name]
            for name, part in parts.items() if part.fill is None}


def read_params(file: Tensors, spec: SAESpec, parts: Mapping[str, Part], mesh: Mesh | None, ignored: tuple[str, ...] = (),
                dtypes: tuple[str, ...] = FLOATS) -> SAEParams:
    """The parameters, float32, placed over `mesh` (None: one device). Names, shapes and dtypes are checked before any tensor is
    read; raises `FormatError`.
    """
    file.check(expected_shapes(spec, parts), ignored, dtypes)
    shapes = tensors(param_shapes(spec, folded=True))
    if mesh is None:
        return from_tensors({name: _whole(file, part, shapes[name]) for name, part in parts.items()})
    sharding.check_features(spec.d_sae, mesh)
    where = tensors(param_shardings(mesh, shapes))
    return from_tensors({name: _placed(file, part, shapes[name], where[name]) for name, part in parts.items()})


def _whole(file: Tensors, part: Part, shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(piece(file, part, shape, tuple(slice(0, n) for n in shape)))


def _placed(file: Tensors, part: Part, shape: tuple[int, ...], where: jax.sharding.NamedSharding) -> jax.Array:
    """Device by device, not all pieces at once: the host never holds more than one of them beside the devices' own copies."""
    pieces, last, value = [], None, None
    for device, index in where.addressable_devices_indices_map(shape).items():
        bounds = tuple(slice(*i.indices(n)[:2]) for i, n in zip(index, shape, strict=True))
        if bounds != last:
            last, value = bounds, piece(file, part, shape, bounds)
        pieces.append(jax.block_until_ready(jax.device_put(value, device)))
    return jax.make_array_from_single_device_arrays(shape, where, pieces)


def piece(file: Tensors, part: Part, shape: tuple[int, ...], bounds: tuple[slice, ...]) -> np.ndarray:
    """The part of a parameter of this shape that lies within bounds, float32."""
    if part.fill is not None:
        return np.full([b.stop - b.start for b in bounds], part.fill, np.float32)
    if part.transposed:
        return np.ascontiguousarray(file.read(part.tensor, bounds[::-1]).T)
    return np.ascontiguousarray(file.read(part.tensor, bounds))


def under(mesh: Mesh | None, function, params: SAEParams, *arguments) -> SAEParams:
    """`function(params, ...)` where the parameters lie."""
    if mesh is None:
        return function(params, *arguments)
    with jax.set_mesh(mesh):
        return jax.jit(function, static_argnums=tuple(range(1, 1 + len(arguments))))(params, *arguments)
