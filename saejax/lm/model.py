"""The decoder: a Flax NNX module with stacked layer weights, hookpoints, and an early stop.

Runs of untapped layers are one `lax.scan` over the layer index, so that a 70-layer model compiles as fast as a short
one; a tapped layer runs by itself, so that its taps see concrete names and may keep what they see.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from saejax.base.errors import HookpointError, LMError
from saejax.lm import attention, layers
from saejax.lm.arch import LMConfig
from saejax.lm.hookpoints import EMBED, FINAL, check_hookpoint, hookpoints, layer_of
from saejax.lm.leaves import leaves
from saejax.lm.rope import Rope, table_index, tables

# tap(x) or tap(x, positions_BT): called with the value at a hookpoint, returns what the model goes on with.
Tap = Callable[..., Array]
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Cache(NamedTuple):
    """Keys and values of the slots seen so far, `[L, B, S, K, h]`; a row's text begins at slot `start_B`."""

    k: Array
    v: Array
    start_B: Array


class Pass(NamedTuple):
    """What all layers of one pass share: rope tables at the tokens' positions, slots of the tokens, positions."""

    rope: Rope | None
    slots_T: Array
    positions_BT: Array
    start_B: Array | None


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
        whole = {name: value for name, value in params.items() if not name.startswith("blocks.")}
        self.whole = nnx.Dict({name: nnx.Param(value) for name, value in whole.items()})
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
        return self.whole["embed"][...].dtype

    @property
    def precision(self) -> str | None:
        """Precision asked of matrix products."""
        return "highest" if self.dtype == jnp.float32 else None

    def __call__(
        self, tokens_BT: Array, *, taps: Mapping[str, Tap] | None = None, stop_at: str | None = None
    ) -> Array | None:
        """Logits `[B, T, V]` of the next token at every position, in the model's dtype; None if `stop_at` is given.

        `taps[name]` is called with the value at that hookpoint (`[B, T, width]`) and returns what the model goes on
        with: the same value to record it, another to replace it, a sum to steer. A tap with two parameters also gets
        the tokens' positions `[B, T]`. `stop_at` computes nothing above that hookpoint. Under `jit` a tap that ignores
        its argument drops everything below it. Raises HookpointError for a name the model does not have or a tap above
        `stop_at`, and LMError for a context longer than `cfg.max_context`.
        """
        taps = self.check_taps(taps, stop_at)
        length = tokens_BT.shape[-1]
        if length > self.cfg.max_context:
            raise LMError(f"context of {length} tokens is longer than the model's {self.cfg.max_context}")
        slots_T = jnp.arange(length)
        here = Pass(tables(self.cfg, length), slots_T, jnp.broadcast_to(slots_T, tokens_BT.shape), None)
        return self.run(tokens_BT, here, taps, stop_at)[0]

    def check_taps(self, taps: Mapping[str, Tap] | None, stop_at: str | None) -> dict[str, Tap]:
        """The taps, checked. Raises HookpointError for a name the model does not have or a tap above `stop_at`."""
        taps = dict(taps or {})
        for name in (*taps, *([stop_at] if stop_at is not None else [])):
            check_hookpoint(self.cfg, name)
        order = hookpoints(self.cfg)
        above = [name for name in taps if stop_at is not None and order.index(name) > order.index(stop_at)]
        if above:
            raise HookpointError(f"tap at {', '.join(above)} lies above stop_at={stop_at!r} and would never be called")
        return taps

    def run(
        self,
        tokens_BT: Array,
        here: Pass,
        taps: Mapping[str, Tap],
        stop_at: str | None = None,
        cache: Cache | None = None,
        last_only: bool = False,
    ) -> tuple[Array | None, Cache | None]:
        """(logits, or None above `stop_at`; the cache with these tokens added). `last_only`: logits `[B, 1, V]`."""
        x_BTD = self.whole["embed"][...][tokens_BT]
        if self.cfg.embed_scale != 1.0:
            x_BTD = x_BTD * jnp.asarray(self.cfg.embed_scale, x_BTD.dtype)
        if EMBED in taps:
            x_BTD = _call(taps[EMBED], x_BTD, here.positions_BT)
        if stop_at == EMBED:
            return None, cache
        if self.cfg.learned_positions:
            positions = here.slots_T if here.start_B is None else here.positions_BT
            x_BTD = x_BTD + self.whole["pos_embed"][...][positions]
        x_BTD, cache = self._layers(x_BTD, here, taps, stop_at, cache)
        if x_BTD is None:
            return None, cache
        return self._head(x_BTD[:, -1:] if last_only else x_BTD, here, taps, stop_at), cache

    def _layers(
        self, x_BTD: Array, here: Pass, taps: Mapping[str, Tap], stop_at: str | None, cache: Cache | None
    ) -> tuple[Array | None, Cache | None]:
        stop = layer_of(stop_at) if stop_at is not None else None
        alone = {layer_of(name) for name in taps} - {None} | ({stop} - {None})
        start = 0
        for layer in sorted(alone | {self.cfg.n_layers}):
            x_BTD, cache = self._scan(x_BTD, here, cache, start, layer)
            if layer == self.cfg.n_layers:
                return x_BTD, cache
            x_BTD, cache = self._tapped(x_BTD, here, cache, layer, taps, stop_at)
            if layer == stop:
                return None, cache
            start = layer + 1

    def _scan(self, x_BTD: Array, here: Pass, cache: Cache | None, start: int, end: int):
        """Layers start..end-1 without taps. Scans the index: slicing the stack would copy its weights at each call."""
        if start >= end:
            return x_BTD, cache

        def step(carry, layer):
            return self._layer(*carry, here, layer, lambda _, value: value), None

        return jax.lax.scan(step, (x_BTD, cache), jnp.arange(start, end))[0]

    def _tapped(
        self, x_BTD: Array, here: Pass, cache: Cache | None, layer: int, taps: Mapping[str, Tap], stop_at: str | None
    ):
        prefix = f"blocks.{layer}."
        stop = stop_at.removeprefix(prefix) if stop_at is not None and stop_at.startswith(prefix) else None

        def visit(hook: str, value: Array) -> Array:
            return _call(taps[prefix + hook], value, here.positions_BT) if prefix + hook in taps else value

        return self._layer(x_BTD, cache, here, layer, visit, stop)

    def _layer(
        self,
        x_BTD: Array,
        cache: Cache | None,
        here: Pass,
        layer: Array | int,
        visit: Callable[[str, Array], Array],
        stop: str | None = None,
    ) -> tuple[Array, Cache | None]:
        cfg = self.cfg
        own = {
            name: jax.lax.dynamic_index_in_dim(param[...], layer, keepdims=False) for name, param in self.blocks.items()
        }
        how = attention.Scoring(
            _of_layer(cfg.attn_scales, layer), _of_layer(cfg.windows, layer), cfg.attn_softcap, self.precision
        )
        rope = here.rope
        if rope is not None:
            index = _of_layer(table_index(cfg), layer)
            rope = jax.tree.map(lambda table: jax.lax.dynamic_index_in_dim(table, index, keepdims=False), rope)
        grown = [cache]

        def attend(q_BTKGh: Array, k_BTKh: Array, v_BTKh: Array) -> Array:
            if cache is None:
                return attention.causal(q_BTKGh, k_BTKh, v_BTKh, how, here.start_B)
            grown[0] = _store(cache, k_BTKh, v_BTKh, layer, here.slots_T[0])
            if q_BTKGh.shape[1] > 1:
                return attention.causal(q_BTKGh, k_BTKh, v_BTKh, how, cache.start_B)
            keys, values = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in grown[0][:2])
            slots_S = jnp.arange(keys.shape[1])
            return attention.attend(q_BTKGh, keys, values, how, here.slots_T, slots_S, cache.start_B)

        x_BTD = layers.walk(layers.block_steps(cfg, own, x_BTD, rope, attend, self.precision), visit, stop)
        return x_BTD, grown[0]

    def _head(self, x_BTD: Array, here: Pass, taps: Mapping[str, Tap], stop_at: str | None) -> Array | None:
        def visit(_: str, value: Array) -> Array:
            return _call(taps[FINAL], value, here.positions_BT[:, -x_BTD.shape[1] :]) if FINAL in taps else value

        whole = {name: param[...] for name, param in self.whole.items()}
        normed_BTD = layers.walk(layers.norm_steps(self.cfg, whole, "final_norm", x_BTD, FINAL), visit, stop_at)
        if stop_at == FINAL:
            return None
        table_VD = whole["embed" if self.cfg.tied_embeddings else "unembed"]
        logits_BTV = jnp.einsum("BTD,VD->BTV", normed_BTD, table_VD, precision=self.precision)
        if cap := self.cfg.final_softcap:
            logits_BTV = cap * jnp.tanh(logits_BTV / cap)
        return logits_BTV


def _of_layer(values: tuple, layer: Array | int):
    """The layer's value; a constant where all layers agree or the layer is known, else gathered by its index."""
    if len(set(values)) == 1:
        return values[0]
    return values[layer] if isinstance(layer, int) else jnp.asarray(values)[layer]


def _store(cache: Cache, k_BTKh: Array, v_BTKh: Array, layer: Array | int, slot: Array) -> Cache:
    """The cache with keys and values of one layer written from `slot` on."""
    at = (layer, 0, slot, 0, 0)
    k, v = (
        jax.lax.dynamic_update_slice(x, new[None].astype(x.dtype), at)
        for x, new in ((cache.k, k_BTKh), (cache.v, v_BTKh))
    )
    return cache._replace(k=k, v=v)


def _call(tap: Tap, value: Array, positions_BT: Array) -> Array:
    return tap(value, positions_BT) if _wants_positions(tap) else tap(value)


def _wants_positions(tap: Tap) -> bool:
    """Whether a tap has a second positional parameter without default."""
    try:
        parameters = inspect.signature(tap).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters) >= 2


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
