"""What the language model loses when its activations are replaced by an SAE's reconstruction.

One policy for every replacement: the value at *unmasked* positions is replaced; masked ones (BOS, EOS and other special
tokens) keep their clean activation, as the SAE never saw them. Cross-entropy and KL are counted at all predicted tokens
of a row: positions 0..T-2, each predicting the next token; not where that only fills the row up.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from saejax.lm.hookpoints import FINAL
from saejax.lm.model import Decoder, capture

_LOGIT_BYTES = 64 << 20  # float32 logits held at once: [chunk, V], never [B, T, V]


@functools.partial(jax.jit, static_argnames="hookpoints")
def prefix(model: Decoder, tokens_BT: Array, *, hookpoints: tuple[str, ...]) -> dict[str, Array]:
    """Activations at the hookpoints, `[B, T, D]` each; nothing above the last of them is computed."""
    return capture(model, tokens_BT, list(hookpoints))


@jax.jit
def suffix(model: Decoder, tokens_BT: Array, values: dict[str, Array]) -> Array:
    """Final normed residual `[B, T, D]` with these values `[B, T, D]` at their hookpoints; what they hide is not computed."""
    if FINAL in values:
        return values[FINAL]
    kept = []

    def keep(value: Array) -> Array:
        kept.append(value)
        return value

    taps = {hookpoint: lambda _, x_BTD=x_BTD: x_BTD.astype(model.dtype) for hookpoint, x_BTD in values.items()}
    model(tokens_BT, taps=taps | {FINAL: keep}, stop_at=FINAL)
    return kept[0]


def _logits(model: Decoder, tokens_1C: Array, final_CD: Array) -> Array:
    """float32 logits `[C, V]`; everything below the final norm is dead code and dropped."""
    return model(tokens_1C, taps={FINAL: lambda _: final_CD[None].astype(model.dtype)})[0].astype(jnp.float32)


def _chunks(model: Decoder, *flat: Array) -> tuple[Array, ...]:
    """[N, ...] -> [n_chunks, C, ...], zero-padded, so that `C x V` float32 logits stay below `_LOGIT_BYTES`."""
    n = flat[0].shape[0]
    size = max(1, min(n, model.cfg.max_context, _LOGIT_BYTES // (4 * model.cfg.vocab_size)))
    pad = -n % size
    return tuple(jnp.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1)).reshape(-1, size, *a.shape[1:]) for a in flat)


@jax.jit
def token_nll(model: Decoder, tokens_BT: Array, final_BTD: Array) -> Array:
    """Negative log likelihood, in nats, of token t+1 given tokens 0..t: `[B, T-1]`, float32."""
    batch, length = tokens_BT.shape
    targets = jnp.roll(tokens_BT, -1, axis=1).reshape(-1)

    def one(chunk):
        target_C, final_CD = chunk
        logits_CV = _logits(model, target_C[None], final_CD)
        return jax.nn.logsumexp(logits_CV, axis=-1) - jnp.take_along_axis(logits_CV, target_C[:, None], axis=-1)[:, 0]

    nll = jax.lax.map(one, _chunks(model, targets, final_BTD.reshape(batch * length, -1)))
    return nll.reshape(-1)[: batch * length].reshape(batch, length)[:, :-1]


@jax.jit
def token_kl(model: Decoder, clean_BTD: Array, other_BTD: Array) -> Array:
    """KL(clean || other) of the next-token distributions, in nats: `[B, T-1]`, float32."""
    batch, length, _ = clean_BTD.shape

    def one(chunk):
        clean_CD, other_CD = chunk
        tokens_1C = jnp.zeros((1, clean_CD.shape[0]), jnp.int32)
        clean_CV, other_CV = (jax.nn.log_softmax(_logits(model, tokens_1C, f)) for f in (clean_CD, other_CD))
        return (jnp.exp(clean_CV) * (clean_CV - other_CV)).sum(-1)

    flat = (f.reshape(batch * length, -1) for f in (clean_BTD, other_BTD))
    kl = jax.lax.map(one, _chunks(model, *flat))
    return kl.reshape(-1)[: batch * length].reshape(batch, length)[:, :-1]


@dataclass
class SpliceSums:
    """float64 sums of cross-entropy (four variants) and KL over predicted tokens."""

    tokens: int = 0
    clean: float = 0.0
    spliced: float = 0.0
    zero: float = 0.0
    mean: float = 0.0
    kl: float = 0.0

    def add(self, model: Decoder, tokens_BT: np.ndarray, keep_BT: np.ndarray, clean: dict[str, Array], recon: dict[str, Array],
            mean: dict[str, np.ndarray], lengths_B: np.ndarray) -> None:
        """One batch, of which the first `lengths_B` tokens of each row count; clean, recon `[B, T, D]` and mean `[D]` by
        hookpoint to be replaced.

        Each variant runs through the same two compiled programs, so that equal activations give bitwise equal losses:
        an SAE that returns its input recovers exactly 1.
        """
        keep_BT1 = np.asarray(keep_BT, bool)[..., None]
        clean_BTD = suffix(model, tokens_BT, clean)
        self.clean += _total(token_nll(model, tokens_BT, clean_BTD), lengths_B)
        for name, values in (("spliced", recon), ("zero", dict.fromkeys(clean, 0.0)), ("mean", mean)):
            mixed = {hookpoint: jnp.where(keep_BT1, jnp.asarray(values[hookpoint], jnp.float32), x_BTD).astype(x_BTD.dtype)
                     for hookpoint, x_BTD in clean.items()}
            final_BTD = suffix(model, tokens_BT, mixed)
            setattr(self, name, getattr(self, name) + _total(token_nll(model, tokens_BT, final_BTD), lengths_B))
            if name == "spliced":
                self.kl += _total(token_kl(model, clean_BTD, final_BTD), lengths_B)
        self.tokens += int(np.maximum(lengths_B - 1, 0).sum())

    @classmethod
    def together(cls, parts: list[dict]) -> "SpliceSums":
        """Of what several processes summed, as `asdict` gives it."""
        return cls(**{name: sum(part[name] for part in parts) for name in parts[0]})

    def result(self) -> dict:
        """Means per predicted token; ce_recovered = (zero - spliced) / (zero - clean), None where that is undefined."""
        clean, spliced, zero, mean, kl = (
            total / max(self.tokens, 1) for total in (self.clean, self.spliced, self.zero, self.mean, self.kl))
        return {
            "predicted_tokens": self.tokens, "ce_clean": clean, "ce_spliced": spliced, "ce_zero": zero, "ce_mean": mean,
            "ce_recovered": _recovered(zero, spliced, clean),
            "ce_recovered_mean": _recovered(mean, spliced, clean), "kl": kl,
        }


def _total(values_BT: Array, lengths_B: np.ndarray) -> float:
    """Sum of [B, T - 1] values, one for each predicted token, over the text of each row."""
    values_BT = np.asarray(values_BT)
    counts_BT = np.arange(1, values_BT.shape[1] + 1) < np.asarray(lengths_B)[:, None]
    return float(values_BT[counts_BT].sum(dtype=np.float64))


def _recovered(ablated: float, spliced: float, clean: float) -> float | None:
    return (ablated - spliced) / (ablated - clean) if ablated != clean else None
