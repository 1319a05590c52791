"""Weights of a decoder from Hugging Face safetensors or from GGUF, tensor by tensor into stacked (and sharded) arrays.

Names and shapes of the whole file are checked before anything is read; every problem is in one WeightsError. The
host holds one stacked parameter at a time, or one shard of it on a mesh with a "model" axis.
"""

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from saejax.base.errors import WeightsError
from saejax.lm.arch import LMConfig
from saejax.lm.gguf_file import GGUFFile
from saejax.lm.leaves import Leaf, leaves
from saejax.lm.mesh import leaf_sharding
from saejax.lm.model import Decoder
from saejax.lm.names import HF_ALIASES, HF_IGNORED, HF_NAMES
from saejax.lm.tensor_layout import Recipe, TensorSource, gguf_recipes, hf_recipes

# Tensors that some exporters write and that hold nothing new: rope frequencies, causal masks.
_HARMLESS = re.compile(r".*\.rotary_emb\.inv_freq|(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)"
                       r"|(gpt_neox\.)?layers\.\d+\.attention\.(bias|masked_bias)|rope_freqs\.weight")


def load_decoder(
    cfg: LMConfig,
    source: TensorSource,
    table: Mapping[str, Recipe],
    *,
    dtype: jnp.dtype,
    mesh: Mesh | None = None,
    where: str,
    ignored: Iterable[str] = (),
) -> Decoder:
    """A `Decoder` whose arrays come from `source`, cast to `dtype`, placed on `mesh` by `saejax.lm.mesh.AXIS_TO_MESH`.

    Raises one WeightsError with every missing, extra and mis-shaped tensor, before any data is read.
    """
    check(cfg, source.shapes(), table, where, ignored)
    return Decoder(
        cfg, {name: _place(name, leaf, table[name], source, dtype, mesh) for name, leaf in leaves(cfg).items()}
    )


def check(
    cfg: LMConfig,
    shapes: Mapping[str, tuple[int, ...]],
    table: Mapping[str, Recipe],
    where: str,
    ignored: Iterable[str] = (),
) -> None:
    """Compares the file's tensors with those the recipes need. Raises one WeightsError that lists all differences."""
    wanted = {
        part.name.format(i=i): part.shape
        for name, recipe in table.items()
        for part in recipe.parts
        for i in (range(cfg.n_layers) if name.startswith("blocks.") else (None,))
    }
    ignored = set(ignored)
    extra = sorted(name for name in set(shapes) - set(wanted) - ignored if not _HARMLESS.fullmatch(name))
    problems = [f"missing {name}" for name in sorted(set(wanted) - set(shapes))] + [f"extra {name}" for name in extra]
    problems += [
        f"{name} has shape {tuple(shapes[name])}, the config says {shape}"
        for name, shape in sorted(wanted.items())
        if name in shapes and tuple(shapes[name]) != shape
    ]
    if problems:
        raise WeightsError(f"{where}: {len(problems)} tensors do not fit the config: {'; '.join(problems)}")


def _place(name: str, leaf: Leaf, recipe: Recipe, source: TensorSource, dtype: jnp.dtype, mesh: Mesh | None) -> Array:
    """One parameter on its devices; each distinct shard is built once and then dropped by the host."""
    if mesh is None:
        # Left uncommitted, so that it follows whatever placement the caller's other arguments have.
        return jnp.asarray(_build(name, leaf, recipe, source, tuple(slice(None) for _ in leaf.shape), dtype))
    sharding = leaf_sharding(mesh, leaf)
    devices: dict[str, list[jax.Device]] = {}
    indices = sharding.addressable_devices_indices_map(leaf.shape)
    for device, index in indices.items():
        devices.setdefault(repr(index), []).append(device)
    shards = []
    for group in devices.values():
        shard = _build(name, leaf, recipe, source, indices[group[0]], dtype)
        shards += [jax.device_put(shard, device) for device in group]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def _build(
    name: str, leaf: Leaf, recipe: Recipe, source: TensorSource, index: tuple[slice, ...], dtype: jnp.dtype
) -> np.ndarray:
    if not name.startswith("blocks."):
        return np.ascontiguousarray(recipe.build(source, None)[index]).astype(dtype, copy=False)
    numbers = range(*index[0].indices(leaf.shape[0]))
    shape = [len(range(*part.indices(size))) for part, size in zip(index, leaf.shape, strict=True)]
    stacked = np.empty(shape, dtype)
    for row, layer in enumerate(numbers):
        stacked[row] = recipe.build(source, layer)[index[1:]]
    return stacked


_FLOATS = ("F64", "F32", "F16", "BF16")


class SafetensorsSource:
    """Tensors of one `model.safetensors`, or of the shards listed in `model.safetensors.index.json`; memory-mapped."""

    def __init__(self, folder: Path):
        self.files = weight_files(folder)
        self._stack = ExitStack()
        self._where: dict[str, object] = {}
        for path in self.files:
            handle = _open(path)
            self._stack.enter_context(handle)
            for name in handle.keys():
                if name in self._where:
                    raise WeightsError(f"{path}: tensor {name} is in two files: download the model again")
                self._where[name] = handle

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, from the headers alone. Raises WeightsError for integer and 8-bit tensors."""
        found, wrong = {}, []
        for name, handle in self._where.items():
            view = handle.get_slice(name)
            found[name] = tuple(view.get_shape())
            if view.get_dtype() not in _FLOATS:
                wrong.append(f"{name} ({view.get_dtype()})")
        if wrong:
            raise WeightsError(
                f"{self.files[0].parent}: tensors that are not {'/'.join(_FLOATS)}: {', '.join(wrong)}; "
                "use an unquantised checkpoint"
            )
        return found

    def read(self, name: str) -> np.ndarray:
        """The tensor as stored (bfloat16 as `ml_dtypes.bfloat16`)."""
        return self._where[name].get_tensor(name)

    def close(self) -> None:
        self._stack.close()


def _open(path: Path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({error}): download it again") from None


def weight_files(folder: Path) -> list[Path]:
    """Safetensors files of a model directory, sorted. Raises WeightsError for none or an unusable index."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise WeightsError(
                f"{folder}: no model.safetensors and no model.safetensors.index.json: "
                "convert the weights to safetensors"
            )
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{index}: not a safetensors index ({error}): download it again") from None
    bad = [name for name in names if not re.fullmatch(r"[A-Za-z0-9_.\-]+\.safetensors", str(name))]
    missing = [name for name in names if name not in bad and not (folder / name).exists()]
    if bad or missing:
        raise WeightsError(f"{index}: unusable file names {bad}, files not there {missing}: download the model again")
    return [folder / name for name in names]


def from_safetensors(cfg: LMConfig, folder: Path, *, dtype: jnp.dtype, mesh: Mesh | None = None) -> Decoder:
    """Decoder from a Hugging Face model directory. A tied unembedding in the file is ignored: it is the embedding."""
    source = SafetensorsSource(folder)
    try:
        table = hf_recipes(cfg)
        there = source.shapes()
        for old, new in HF_ALIASES.get(cfg.family, ()):
            if not any(name.startswith(old) for name in there) and any(name.startswith(new) for name in there):
                table = {name: _renamed(old, new, recipe) for name, recipe in table.items()}
        # A tied unembedding is asked for by no recipe, so that the loop above does not rename it.
        ignored = {name for name in there if _not_read(cfg, name)}
        return load_decoder(cfg, source, table, dtype=dtype, mesh=mesh, where=str(folder), ignored=ignored)
    finally:
        source.close()


def _not_read(cfg: LMConfig, name: str) -> bool:
    """Whether this tensor is a tied unembedding, under any of its names, or belongs to what is no text model."""
    unembed = f"{HF_NAMES[cfg.family]['unembed']}.weight"
    aliases = HF_ALIASES.get(cfg.family, ())
    names = {unembed, *(new + unembed.removeprefix(old) for old, new in aliases if unembed.startswith(old))}
    beside = HF_IGNORED.get(cfg.family)
    return (cfg.tied_embeddings and name in names) or (beside is not None and re.fullmatch(beside, name) is not None)


def _renamed(old: str, new: str, recipe: Recipe) -> Recipe:
    parts = (replace(part, name=new + part.name.removeprefix(old)) if part.name.startswith(old) else part
             for part in recipe.parts)
    return replace(recipe, parts=tuple(parts))


def from_gguf_file(cfg: LMConfig, file: GGUFFile, *, dtype: jnp.dtype, mesh: Mesh | None = None) -> Decoder:
    """Decoder from an open GGUF file, dequantised tensor by tensor."""
    return load_decoder(cfg, file, gguf_recipes(cfg), dtype=dtype, mesh=mesh, where=str(file.path))
