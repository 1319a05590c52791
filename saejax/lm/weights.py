"""Weights of a decoder from Hugging Face safetensors or from GGUF, tensor by tensor into stacked (and sharded) arrays.

A family is a table: for each parameter of `model.leaves(cfg)`, the names of the tensors it is made of, and how they are
put together. Names and shapes of the whole file are checked before anything is read; every problem is in one
WeightsError. The host holds one stacked parameter at a time, or one shard of it on a mesh with a "model" axis.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from saejax.errors import WeightsError
from saejax.lm.arch import LMConfig
from saejax.lm.gguf_file import GGUFFile
from saejax.lm.model import Decoder, Leaf, leaves

# Mesh axis of each logical axis of a parameter; an axis that the mesh does not have means replicated.
AXIS_TO_MESH = {"vocab": "model", "heads": "model", "mlp": "model", "embed": None, "layers": None}


class TensorSource(Protocol):
    """Named tensors of one model, whatever the file format."""

    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def read(self, name: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Part:
    """A source tensor: name (`{i}` is the layer), shape in the file, and how it looks inside the decoder."""

    name: str
    shape: tuple[int, ...]
    convert: Callable[[np.ndarray], np.ndarray] = lambda value: value


@dataclass(frozen=True)
class Recipe:
    """A decoder parameter (one layer of it for `blocks.*`): its parts, concatenated or stacked along `axis`."""

    parts: tuple[Part, ...]
    axis: int = 0

    def build(self, source: TensorSource, layer: int | None) -> np.ndarray:
        values = [part.convert(source.read(part.name.format(i=layer))) for part in self.parts]
        return values[0] if len(values) == 1 else np.concatenate(values, axis=self.axis)


# Tensor names by family and format; projections are stored [out, in] in both formats.
HF_NAMES = {
    "llama": {
        "embed": "model.embed_tokens.weight",
        "final_norm": "model.norm.weight",
        "unembed": "lm_head.weight",
        "ln1": "model.layers.{i}.input_layernorm",
        "ln2": "model.layers.{i}.post_attention_layernorm",
        "q": "model.layers.{i}.self_attn.q_proj",
        "k": "model.layers.{i}.self_attn.k_proj",
        "v": "model.layers.{i}.self_attn.v_proj",
        "o": "model.layers.{i}.self_attn.o_proj",
        "gate": "model.layers.{i}.mlp.gate_proj",
        "up": "model.layers.{i}.mlp.up_proj",
        "down": "model.layers.{i}.mlp.down_proj",
    },
}
GGUF_NAMES = {
    "llama": {
        "embed": "token_embd.weight",
        "final_norm": "output_norm.weight",
        "unembed": "output.weight",
        "ln1": "blk.{i}.attn_norm",
        "ln2": "blk.{i}.ffn_norm",
        "q": "blk.{i}.attn_q",
        "k": "blk.{i}.attn_k",
        "v": "blk.{i}.attn_v",
        "o": "blk.{i}.attn_output",
        "gate": "blk.{i}.ffn_gate",
        "up": "blk.{i}.ffn_up",
        "down": "blk.{i}.ffn_down",
    },
}
# GGUF families whose query and key rows are stored with the two halves of each head interleaved.
GGUF_PERMUTED = frozenset({"llama"})

# Tensors that some exporters write and that hold nothing new.
_HARMLESS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def recipes(cfg: LMConfig, names: Mapping[str, str], permuted: bool = False) -> dict[str, Recipe]:
    """The recipe of every parameter in `leaves(cfg)`; `permuted` undoes the interleaved q and k rows of GGUF."""
    d, m, k, h, v = cfg.d_model, cfg.d_mlp, cfg.n_kv_heads, cfg.head_dim, cfg.vocab_size
    g = cfg.n_heads // k
    per_kv = (("q", g), ("k", 1), ("v", 1))

    def heads(key: str, kind: str, count: int) -> Part:
        out = k * count * h

        def convert(value: np.ndarray) -> np.ndarray:
            if permuted and key != "v":
                value = value.reshape(k * count, h // 2, 2, -1).swapaxes(1, 2)
            value = value.reshape(k, count, h, -1)
            return np.moveaxis(value, -1, 0) if kind == "weight" else value[..., 0]

        return Part(f"{names[key]}.{kind}", (out, d) if kind == "weight" else (out,), convert)

    def wide(key: str, kind: str) -> Part:
        shape = (m, d) if kind == "weight" else (m,)
        return Part(f"{names[key]}.{kind}", shape, lambda value: value.T[..., None, :])

    whole = {
        "embed": Recipe((Part(names["embed"], (v, d)),)),
        "final_norm": Recipe((Part(names["final_norm"], (d,)),)),
        "unembed": Recipe((Part(names["unembed"], (v, d)),)),
        "blocks.ln1": Recipe((Part(f"{names['ln1']}.weight", (d,)),)),
        "blocks.ln2": Recipe((Part(f"{names['ln2']}.weight", (d,)),)),
        "blocks.qkv": Recipe(tuple(heads(key, "weight", n) for key, n in per_kv), axis=-2),
        "blocks.qkv_bias": Recipe(tuple(heads(key, "bias", n) for key, n in per_kv), axis=-2),
        "blocks.attn_out": Recipe(
            (Part(f"{names['o']}.weight", (d, k * g * h), lambda value: value.T.reshape(k, g, h, d)),)
        ),
        "blocks.attn_out_bias": Recipe((Part(f"{names['o']}.bias", (d,)),)),
        "blocks.gate_up": Recipe((wide("gate", "weight"), wide("up", "weight")), axis=-2),
        "blocks.gate_up_bias": Recipe((wide("gate", "bias"), wide("up", "bias")), axis=-2),
        "blocks.down": Recipe((Part(f"{names['down']}.weight", (d, m), np.transpose),)),
        "blocks.down_bias": Recipe((Part(f"{names['down']}.bias", (d,)),)),
    }
    return {name: whole[name] for name in leaves(cfg)}


def load_decoder(
    cfg: LMConfig,
    source: TensorSource,
    table: Mapping[str, Recipe],
    *,
    dtype: jnp.dtype,
    mesh: Mesh | None = None,
    where: str = "weights",
    ignored: Iterable[str] = (),
) -> Decoder:
    """A `Decoder` whose arrays come from `source`, cast to `dtype`, placed on `mesh` by `AXIS_TO_MESH`.

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


def leaf_sharding(mesh: Mesh, leaf: Leaf) -> NamedSharding:
    """Placement of a parameter: dimensions that map to a mesh axis and divide by its size; replicated otherwise."""
    spec = []
    for size, axis in zip(leaf.shape, leaf.axes, strict=True):
        target = AXIS_TO_MESH[axis] if axis else None
        spec.append(target if target in mesh.shape and size % mesh.shape[target] == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


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
    """Decoder from a Hugging Face model directory. A tied `lm_head.weight` is ignored: it is the embedding."""
    names = HF_NAMES[cfg.family]
    source = SafetensorsSource(folder)
    try:
        ignored = {names["unembed"]} if cfg.tied_embeddings else set()
        table = recipes(cfg, names)
        return load_decoder(cfg, source, table, dtype=dtype, mesh=mesh, where=str(folder), ignored=ignored)
    finally:
        source.close()


def from_gguf_file(cfg: LMConfig, file: GGUFFile, *, dtype: jnp.dtype, mesh: Mesh | None = None) -> Decoder:
    """Decoder from an open GGUF file, dequantised tensor by tensor."""
    table = recipes(cfg, GGUF_NAMES[cfg.family], permuted=cfg.family in GGUF_PERMUTED)
    return load_decoder(cfg, file, table, dtype=dtype, mesh=mesh, where=str(file.path))
