"""How each decoder parameter is made of a file's tensors: names, shapes in the file, and the rearrangement."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from saejax.base.errors import WeightsError
from saejax.lm.arch import LMConfig
from saejax.lm.leaves import leaves
from saejax.lm.names import FUSED_BY_HEAD, GGUF_NAMES, GGUF_PERMUTED, HF_NAMES, TRANSPOSED


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
    """A decoder parameter (one layer of it for `blocks.*`): its parts, concatenated along `axis`."""

    parts: tuple[Part, ...]
    axis: int = 0

    def build(self, source: TensorSource, layer: int | None) -> np.ndarray:
        values = [part.convert(source.read(part.name.format(i=layer))) for part in self.parts]
        return values[0] if len(values) == 1 else np.concatenate(values, axis=self.axis)


def hf_recipes(cfg: LMConfig) -> dict[str, Recipe]:
    """Recipe of every parameter from Hugging Face tensors."""
    return _Maker(cfg, HF_NAMES[cfg.family], transposed=cfg.family in TRANSPOSED).all()


def gguf_recipes(cfg: LMConfig) -> dict[str, Recipe]:
    """Recipe of every parameter from GGUF tensors.

    Undoes what the converter to GGUF does: q and k rows of the llama architecture are interleaved, and norm weights of
    the Gemma architectures have their offset added.
    """
    offset = cfg.norm_offset
    return _Maker(cfg, GGUF_NAMES[cfg.family], permuted=cfg.family in GGUF_PERMUTED, offset=offset).all()


class _Maker:
    def __init__(
        self,
        cfg: LMConfig,
        names: Mapping[str, str],
        transposed: bool = False,
        permuted: bool = False,
        offset: float = 0.0,
    ):
        self.cfg, self.names = cfg, names
        self.transposed, self.permuted, self.offset = transposed, permuted, offset
        self.groups = cfg.n_heads // cfg.n_kv_heads

    def all(self) -> dict[str, Recipe]:
        return {name: self._recipe(name.removeprefix("blocks.")) for name in leaves(self.cfg)}

    def _recipe(self, leaf: str) -> Recipe:
        cfg, kind = self.cfg, "bias" if leaf.endswith("_bias") else "weight"
        d, v = cfg.d_model, cfg.vocab_size
        base = leaf.removesuffix("_bias")
        if base == "qkv":
            return self._qkv(kind)
        if base == "mlp_in":
            return self._mlp_in(kind)
        if base in ("attn_out", "down"):
            return self._out(base, kind)
        if base in ("q_norm", "k_norm"):
            return self._qk_norm(base)
        if base in ("embed", "unembed"):
            return Recipe((self._part(base, kind, (v, d)),))
        if base == "pos_embed":
            return Recipe((self._part(base, kind, (cfg.max_context, d)),))
        return Recipe((self._part(base, kind, (d,), self._without_offset),))

    def _part(self, key: str, kind: str, shape: tuple[int, ...], convert=lambda value: value) -> Part:
        if key not in self.names:
            raise WeightsError(f"model family {self.cfg.family!r} has no name for the tensor {key!r} that the config asks for")
        return Part(f"{self.names[key]}.{kind}", shape, convert)

    def _linear(self, key: str, kind: str, out: int, into: int, convert) -> Part:
        """A projection; `convert` sees `[out, in]`, or `[out]` for a bias."""
        if kind == "bias":
            return self._part(key, kind, (out,), convert)
        if self.transposed:
            return self._part(key, kind, (into, out), lambda value: convert(value.T))
        return self._part(key, kind, (out, into), convert)

    def _without_offset(self, value: np.ndarray) -> np.ndarray:
        return value - np.float32(self.offset) if self.offset else value

    def _heads(self, value: np.ndarray, count: int, permuted: bool = False) -> np.ndarray:
        """`[K * count * h, D]` -> `[D, K, count, h]`, or a bias without D."""
        k, h = self.cfg.n_kv_heads, self.cfg.head_dim
        rest = value.shape[1:]
        if permuted:
            value = value.reshape(k * count, h // 2, 2, *rest).swapaxes(1, 2)
        value = value.reshape(k, count, h, *rest)
        return np.moveaxis(value, -1, 0) if rest else value

    def _qkv(self, kind: str) -> Recipe:
        k, h, d, g = self.cfg.n_kv_heads, self.cfg.head_dim, self.cfg.d_model, self.groups
        if "qkv" not in self.names:
            parts = tuple(
                self._linear(key, kind, k * n * h, d, lambda x, n=n, p=p: self._heads(x, n, p))
                for key, n, p in (("q", g, self.permuted), ("k", 1, self.permuted), ("v", 1, False))
            )
            return Recipe(parts, axis=-2)

        def split(value: np.ndarray) -> np.ndarray:
            if self.cfg.family in FUSED_BY_HEAD:
                return self._heads(value, g + 2)
            ends = (k * g * h, k * (g + 1) * h)
            pieces = zip(np.split(value, ends), (g, 1, 1), strict=True)
            return np.concatenate([self._heads(piece, n) for piece, n in pieces], axis=-2)

        return Recipe((self._linear("qkv", kind, k * (g + 2) * h, d, split),))

    def _mlp_in(self, kind: str) -> Recipe:
        m, d = self.cfg.d_mlp, self.cfg.d_model
        if "gate_up" in self.names and self.cfg.gated:
            return Recipe((self._linear("gate_up", kind, 2 * m, d, lambda x: x.T.reshape(*x.shape[1:], 2, m)),))
        keys = ("gate", "up") if self.cfg.gated else ("up",)
        return Recipe(tuple(self._linear(key, kind, m, d, lambda x: x.T[..., None, :]) for key in keys), axis=-2)

    def _out(self, leaf: str, kind: str) -> Recipe:
        cfg, key = self.cfg, {"attn_out": "o", "down": "down"}[leaf]
        if kind == "bias":
            return Recipe((self._part(key, kind, (cfg.d_model,)),))
        if leaf == "down":
            return Recipe((self._linear(key, kind, cfg.d_model, cfg.d_mlp, np.transpose),))
        shape = (cfg.n_kv_heads, self.groups, cfg.head_dim, cfg.d_model)
        return Recipe(
            (self._linear(key, kind, cfg.d_model, cfg.n_heads * cfg.head_dim, lambda x: x.T.reshape(shape)),)
        )

    def _qk_norm(self, leaf: str) -> Recipe:
        cfg = self.cfg
        if cfg.qk_norm == "head":
            return Recipe((self._part(leaf, "weight", (cfg.head_dim,), self._without_offset),))
        heads = (cfg.n_kv_heads, self.groups) if leaf == "q_norm" else (cfg.n_kv_heads,)
        shape = (*heads, cfg.head_dim)
        size = int(np.prod(shape))
        return Recipe((self._part(leaf, "weight", (size,), lambda x: self._without_offset(x).reshape(shape)),))
