"""The decoder: a Flax NNX module with stacked layer weights, hookpoints, and an early stop.

Runs of untapped layers are one `lax.scan` over the layer index, so that a 70-layer model compiles as fast as a short
one; a tapped layer runs by itself, so that its taps see concrete names and may keep what they see.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from saejax.errors import HookpointError, LMError
from saejax.lm import layers
from saejax.lm.arch import LMConfig
from saejax.lm.hookpoints import EMBED, FINAL, check_hookpoint, hookpoints, layer_of

Tap = Callable[[Array], Array]
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True)
class Leaf:
    """Shape and logical axes of one parameter array."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


def leaves(cfg: LMConfig) -> dict[str, Leaf]:
    """Every parameter by path: `embed`, `final_norm`, `unembed` (untied only) and `blocks.*`, stacked over layers."""
    d, m, k, h, n = cfg.d_model, cfg.d_mlp, cfg.n_kv_heads, cfg.head_dim, cfg.n_layers
    g = cfg.n_heads // k
    block = {
        "ln1": Leaf((d,), ("embed",)),
        "qkv": Leaf((d, k, g + 2, h), ("embed", "heads", None, None)),
        "attn_out": Leaf((k, g, h, d), ("heads", None, None, "embed")),
        "ln2": Leaf((d,), ("embed",)),
        "gate_up": Leaf((d, 2, m), ("embed", None, "mlp")),
        "down": Leaf((m, d), ("mlp", "embed")),
    }
    if cfg.attn_bias:
        block |= {"qkv_bias": Leaf((k, g + 2, h), ("heads", None, None)), "attn_out_bias": Leaf((d,), ("embed",))}
    if cfg.mlp_bias:
        block |= {"gate_up_bias": Leaf((2, m), (None, "mlp")), "down_bias": Leaf((d,), ("embed",))}
    whole = {"embed": Leaf((cfg.vocab_size, d), ("vocab", "embed")), "final_norm": Leaf((d,), ("embed",))}
    if not cfg.tied_embeddings:
        whole["unembed"] = Leaf((cfg.vocab_size, d), ("vocab", "embed"))
    return whole | {f"blocks.{name}": Leaf((n, *leaf.shape), ("layers", *leaf.axes)) for name, leaf in block.items()}


class Decoder(nnx.Module):
    """Decoder-only transformer over the arrays named by `leaves(cfg)`.

    The module is a pytree: pass it as an argument to `jax.jit`, never close over it (its weights would become
    constants). `dtype` is that of the arrays; in float32 every matrix product asks for full precision, because the
    default of GPUs (TF32) and TPUs (bf16 passes) is not float32. Norms and softmax are float32 in either case.
    """

    def __init__(self, cfg: LMConfig, params: Mapping[str, Array]):
        expected = leaves(cfg)
        wrong = sorted(set(expected) ^ set(params)) + sorted(
            name for name in set(expected) & set(params) if tuple(params[name].shape) != expected[name].shape
        )
        if wrong:
            raise LMError(
                f"decoder parameters {', '.join(wrong)} do not fit the config: build them with saejax.lm.load"
            )
        self.cfg = cfg
        self.embed = nnx.Param(params["embed"])
        self.final_norm = nnx.Param(params["final_norm"])
        self.unembed = None if cfg.tied_embeddings else nnx.Param(params["unembed"])
        self.blocks = nnx.Dict(
            {
                name.removeprefix("blocks."): nnx.Param(value)
                for name, value in params.items()
                if name.startswith("blocks.")
            }
        )

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of weights and residual stream."""
        return self.embed[...].dtype

    def __call__(
        self, tokens_BT: Array, *, taps: Mapping[str, Tap] | None = None, stop_at: str | None = None
    ) -> Array | None:
        """Logits `[B, T, V]` of the next token at every position, in the model's dtype; None if `stop_at` is given.

        `taps[name]` is called with the value at that hookpoint (`[B, T, D]`) and returns what the model goes on with:
        the same value to record it, another to replace it, a sum to steer. `stop_at` computes nothing above that
        hookpoint. Under `jit` a tap that ignores its argument drops everything below it. Raises HookpointError for a
        name the model does not have or a tap above `stop_at`, and LMError for a context longer than
        `cfg.max_context`.
        """
        taps = dict(taps or {})
        for name in (*taps, *([stop_at] if stop_at is not None else [])):
            check_hookpoint(self.cfg, name)
        self._refuse_dead_taps(taps, stop_at)
        if tokens_BT.shape[-1] > self.cfg.max_context:
            raise LMError(f"context of {tokens_BT.shape[-1]} tokens is longer than the model's {self.cfg.max_context}")
        x_BTD = self.embed[...][tokens_BT]
        if EMBED in taps:
            x_BTD = taps[EMBED](x_BTD)
        if stop_at == EMBED:
            return None
        x_BTD = self._layers(x_BTD, taps, stop_at)
        return None if x_BTD is None else self._head(x_BTD, taps, stop_at)

    def _refuse_dead_taps(self, taps: Mapping[str, Tap], stop_at: str | None) -> None:
        order = hookpoints(self.cfg)
        above = [name for name in taps if stop_at is not None and order.index(name) > order.index(stop_at)]
        if above:
            raise HookpointError(f"tap at {', '.join(above)} lies above stop_at={stop_at!r} and would never be called")

    def _layers(self, x_BTD: Array, taps: Mapping[str, Tap], stop_at: str | None) -> Array | None:
        rope = layers.rope_tables(self.cfg, x_BTD.shape[1])
        weights = {name: param[...] for name, param in self.blocks.items()}
        stop = layer_of(stop_at) if stop_at is not None else None
        alone = {layer_of(name) for name in taps} - {None} | ({stop} - {None})
        start = 0
        for layer in sorted(alone | {self.cfg.n_layers}):
            x_BTD = self._scan(weights, x_BTD, rope, start, layer)
            if layer == self.cfg.n_layers:
                return x_BTD
            x_BTD = self._tapped(weights, x_BTD, rope, layer, taps, stop_at)
            if layer == stop:
                return None
            start = layer + 1

    def _scan(self, weights: Mapping[str, Array], x_BTD: Array, rope: layers.Rope, start: int, end: int) -> Array:
        """Layers start..end-1 without taps. Scans the index: slicing the stack would copy its weights at each call."""
        if start >= end:
            return x_BTD

        def step(x_BTD, layer):
            return layers.walk(self._steps(weights, x_BTD, rope, layer), lambda _, value: value), None

        return jax.lax.scan(step, x_BTD, jnp.arange(start, end))[0]

    def _tapped(
        self,
        weights: Mapping[str, Array],
        x_BTD: Array,
        rope: layers.Rope,
        layer: int,
        taps: Mapping[str, Tap],
        stop_at: str | None,
    ) -> Array:
        prefix = f"blocks.{layer}."
        stop = stop_at.removeprefix(prefix) if stop_at is not None and stop_at.startswith(prefix) else None

        def visit(hook: str, value: Array) -> Array:
            return taps[prefix + hook](value) if prefix + hook in taps else value

        return layers.walk(self._steps(weights, x_BTD, rope, layer), visit, stop)

    def _steps(self, weights: Mapping[str, Array], x_BTD: Array, rope: layers.Rope, layer: Array | int):
        own = {name: jax.lax.dynamic_index_in_dim(value, layer, keepdims=False) for name, value in weights.items()}
        return layers.block_steps(self.cfg, own, x_BTD, rope, self._precision)

    def _head(self, x_BTD: Array, taps: Mapping[str, Tap], stop_at: str | None) -> Array | None:
        normed_BTD = layers.normalise(x_BTD, self.cfg.norm_eps)
        if FINAL in taps:
            normed_BTD = taps[FINAL](normed_BTD)
        if stop_at == FINAL:
            return None
        table_VD = (self.embed if self.unembed is None else self.unembed)[...]
        return jnp.einsum("BTD,VD->BTV", normed_BTD * self.final_norm[...], table_VD, precision=self._precision)

    @property
    def _precision(self) -> str | None:
        return "highest" if self.dtype == jnp.float32 else None


def capture(model: Decoder, tokens_BT: Array, names: Sequence[str]) -> dict[str, Array]:
    """Values `[B, T, D]` at the hookpoints `names`, from one pass that stops at the highest of them.

    Raises HookpointError for a name that the model does not have.
    """
    for name in names:
        check_hookpoint(model.cfg, name)
    order = hookpoints(model.cfg)
    kept: dict[str, Array] = {}

    def keep(name: str) -> Tap:
        def tap(x_BTD: Array) -> Array:
            kept[name] = x_BTD
            return x_BTD

        return tap

    if names:
        model(tokens_BT, taps={name: keep(name) for name in names}, stop_at=max(names, key=order.index))
    return kept


def cross_entropy(logits_BTV: Array, tokens_BT: Array) -> Array:
    """Negative log likelihood, in nats, of token t+1 given tokens 0..t: `[B, T-1]`, float32.

    nll = logsumexp(logits) - logits[target]. The last position is dropped after the reduction over the vocabulary, so
    that under `jit` the shift makes no second `[B, T, V]` array (XLA's CPU backend still widens bfloat16 logits whole).
    """
    target_BT = jnp.roll(tokens_BT, -1, axis=1)
    hit_BT = jnp.take_along_axis(logits_BTV, target_BT[..., None], axis=-1)[..., 0].astype(jnp.float32)
    norm_BT = jax.nn.logsumexp(logits_BTV.astype(jnp.float32), axis=-1)
    return (norm_BT - hit_BT)[:, :-1]
