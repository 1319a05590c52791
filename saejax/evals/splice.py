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

from saejax.base.records import TokenBatch
from saejax.lm.hookpoints import FINAL
from saejax.lm.model import Decoder, capture

_LOGIT_BYTES, _ELSEWHERE = {"cpu": 64 << 20}, 1 << 30  # float32 logits that a device holds at once, never [B, T, V]


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


def _logits(model: Decoder, tokens_Bt: Array, final_BtD: Array) -> Array:
    """float32 logits `[B, t, V]`; everything below the final norm is dead code and dropped."""
    return model(tokens_Bt, taps={FINAL: lambda _: final_BtD.astype(model.dtype)}).astype(jnp.float32)


def _at_once(model: Decoder, final_BTD: Array) -> int:
    """Tokens of each row whose logits the devices hold together."""
    devices = final_BTD.sharding.device_set
    room = len(devices) * _LOGIT_BYTES.get(next(iter(devices)).platform, _ELSEWHERE)
    return max(1, min(final_BTD.shape[1], room // (4 * model.cfg.vocab_size * len(final_BTD))))


def _in_turns(of, size: int, *parts: Array) -> Array:
    """of(`[B, size, ...]` of each) -> `[B, size]`, over all T tokens of a row: rows stay on their devices."""
    B, T = parts[0].shape[:2]
    n = -(-T // size)
    padded = [jnp.pad(x, [(0, 0), (0, n * size - T)] + [(0, 0)] * (x.ndim - 2)) for x in parts]
    turns = [jnp.moveaxis(x.reshape(B, n, size, *x.shape[2:]), 1, 0) for x in padded]
    return jnp.moveaxis(jax.lax.map(lambda turn: of(*turn), tuple(turns)), 0, 1).reshape(B, -1)[:, :T]


def token_nll(model: Decoder, tokens_BT: Array, final_BTD: Array) -> Array:
    """Negative log likelihood, in nats, of token t+1 given tokens 0..t: `[B, T-1]`, float32."""
    return _token_nll(model, tokens_BT, final_BTD, size=_at_once(model, final_BTD))


@functools.partial(jax.jit, static_argnames="size")
def _token_nll(model: Decoder, tokens_BT: Array, final_BTD: Array, *, size: int) -> Array:
    def of(target_Bt, final_BtD):
        logits_BtV = _logits(model, target_Bt, final_BtD)
        own_Bt = jnp.take_along_axis(logits_BtV, target_Bt[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits_BtV, axis=-1) - own_Bt

    return _in_turns(of, size, jnp.roll(tokens_BT, -1, axis=1), final_BTD)[:, :-1]


def token_kl(model: Decoder, clean_BTD: Array, other_BTD: Array) -> Array:
    """KL(clean || other) of the next-token distributions, in nats: `[B, T-1]`, float32."""
    return _token_kl(model, clean_BTD, other_BTD, size=_at_once(model, clean_BTD))


@functools.partial(jax.jit, static_argnames="size")
def _token_kl(model: Decoder, clean_BTD: Array, other_BTD: Array, *, size: int) -> Array:
    def of(*final):
        tokens_Bt = jnp.zeros(final[0].shape[:2], jnp.int32)
        clean_BtV, other_BtV = (jax.nn.log_softmax(_logits(model, tokens_Bt, x_BtD)) for x_BtD in final)
        return (jnp.exp(clean_BtV) * (clean_BtV - other_BtV)).sum(-1)

    return _in_turns(of, size, clean_BTD, other_BTD)[:, :-1]


@dataclass
class SpliceSums:
    """float64 sums of cross-entropy (four variants) and KL over predicted tokens."""

    tokens: int = 0
    clean: float = 0.0
    spliced: float = 0.0
    zero: float = 0.0
    mean: float = 0.0
    kl: float = 0.0

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


@dataclass(frozen=True)
class _Without:
    """A batch without any SAE: its last residual, and sums of cross-entropy as it is, with zeros and with means."""

    final_BTD: Array
    clean: float
    zero: float
    mean: float


class Splicer:
    """A batch of the language model, with the reconstructions of one SAE after the other in it.

    Each variant runs through the same two compiled programs, so that equal activations give bitwise equal losses: an SAE that
    returns its input recovers exactly 1. What does not depend on the SAE is computed once.
    """

    def __init__(self, model: Decoder, batch: TokenBatch, tokens_BT: Array, clean: dict[str, Array]):
        """tokens_BT: the batch's, on the devices of the model; of each row the first `lengths_B` count. clean: `[B, T, D]` by
        hookpoint.
        """
        self._model, self._tokens_BT, self._clean, self._lengths_B = model, tokens_BT, clean, batch.lengths_B
        self._keep_BT1 = np.asarray(batch.keep_BT, bool)[..., None]
        self._without: dict[tuple, _Without] = {}

    def add(self, sums: SpliceSums, recon: dict[str, Array], means: dict[str, np.ndarray]) -> None:
        """Adds the batch to the sums of an SAE; its reconstruction `[B, T, D]` and a mean `[D]` by hookpoint to be replaced."""
        key = tuple((name, np.asarray(means[name]).tobytes()) for name in recon)
        if key not in self._without:
            final_BTD, clean = self._loss({name: self._clean[name] for name in recon})
            zero, mean = (self._replaced(values)[1] for values in (dict.fromkeys(recon, 0.0), means))
            self._without[key] = _Without(final_BTD, clean, zero, mean)
        without = self._without[key]
        final_BTD, spliced = self._replaced(recon)
        kl = _total(token_kl(self._model, without.final_BTD, final_BTD), self._lengths_B)
        more = {"clean": without.clean, "spliced": spliced, "zero": without.zero, "mean": without.mean, "kl": kl,
                "tokens": int(np.maximum(self._lengths_B - 1, 0).sum())}
        for name, value in more.items():
            setattr(sums, name, getattr(sums, name) + value)

    def _replaced(self, values: dict) -> tuple[Array, float]:
        return self._loss({name: jnp.where(self._keep_BT1, jnp.asarray(value, jnp.float32), self._clean[name])
                           .astype(self._clean[name].dtype) for name, value in values.items()})

    def _loss(self, values: dict[str, Array]) -> tuple[Array, float]:
        """(final residual, sum of cross-entropy) with these activations."""
        final_BTD = suffix(self._model, self._tokens_BT, values)
        return final_BTD, _total(token_nll(self._model, self._tokens_BT, final_BTD), self._lengths_B)


def _total(values_BT: Array, lengths_B: np.ndarray) -> float:
    """Sum of [B, T - 1] values, one for each predicted token, over the text of each row."""
    values_BT = np.asarray(values_BT)
    counts_BT = np.arange(1, values_BT.shape[1] + 1) < np.asarray(lengths_B)[:, None]
    return float(values_BT[counts_BT].sum(dtype=np.float64))


def _recovered(ablated: float, spliced: float, clean: float) -> float | None:
    return (ablated - spliced) / (ablated - clean) if ablated != clean else None
