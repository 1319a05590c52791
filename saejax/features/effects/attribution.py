"""What the parts of a prompt do to its next token: attribution from one gradient, ablation by running the model again.

    attribution = a_i s d_i . grad_x (logit(target) - logit(against))      a feature at a token, all of them from one pass
    ablation    = difference of the logits - the same with that feature at that token set to 0, all else kept

The first is the second to first order. Both are for one feature at one token; logits at the prompt's last token, gradient with
respect to the value that the SAE reconstructs, at that token. That value is the sum of features, the SAE's error and its bias,
so that what they and the special tokens, which the SAE does not see, are given adds up:

    sum over t of x_t . grad_t = features + error + bias + BOS

Source: Templeton et al. 2024; Transformer Circuits update March 2024; error nodes: Marks et al. 2024 (Sparse Feature Circuits).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.base import sharding
from saejax.base.errors import PromptError
from saejax.base.logs import Progress
from saejax.features.effects.prompting import (
    check_one_place,
    check_place,
    encoded,
    padded,
    row_scales,
    single_token,
    special,
)
from saejax.features.index.logits import rows_at
from saejax.lm import LM, width_of
from saejax.lm.hookpoints import FINAL
from saejax.lm.prompts import values
from saejax.sae.inference import SAE

TOP = 10  # of the most ablating pairs, how many are among the most attributed


class Part(NamedTuple):
    """One part of the value at one token. kind: "feature", "error", "bias" or "BOS"; None: does not apply, was not measured."""

    kind: str
    position: int
    token: str
    feature: int | None
    activation: float | None
    attribution: float
    ablation: float | None


@dataclass(frozen=True)
class Attribution:
    """The P pairs (token, feature) that are active on a prompt, by token and then by feature, and what else has part in it.

    difference: logit(target) - logit(against) (without it: the mean logit of all tokens). error_T: (x - SAE(x)) . grad; bias_T:
    b_dec . grad, with the row's mean and a skip connection where the SAE has them; both 0 at special tokens, which have no
    pairs, and whose x . grad is special_T. ablation_P, error_ablation_T: NaN where it was not measured.
    """

    tokens_T: np.ndarray
    text_T: tuple[str, ...]
    target: int
    against: int | None
    difference: float
    error_T: np.ndarray
    bias_T: np.ndarray
    special_T: np.ndarray
    error_ablation_T: np.ndarray
    position_P: np.ndarray
    feature_P: np.ndarray
    activation_P: np.ndarray
    attribution_P: np.ndarray
    ablation_P: np.ndarray

    @property
    def features_T(self) -> np.ndarray:
        """Sum over the features of every token."""
        return np.bincount(self.position_P, self.attribution_P, minlength=len(self.tokens_T))

    @property
    def sums(self) -> dict[str, float]:
        """Attribution of all features, of the error, the bias and BOS (with it other special tokens), and their sum."""
        out = {"features": self.attribution_P.sum(), "error": self.error_T.sum(), "bias": self.bias_T.sum(),
               "BOS": self.special_T.sum()}
        return {name: float(value) for name, value in (out | {"sum": sum(out.values())}).items()}

    @property
    def summary(self) -> str:
        """The sums and the logit difference in a line."""
        return ", ".join(f"{name} {value:.3g}" for name, value in self.sums.items()) + f"; logit difference {self.difference:.3g}"

    def __repr__(self) -> str:
        return f"Attribution({self.summary}; {len(self.position_P):,} active pairs)"

    def best(self, n: int) -> np.ndarray:
        """The n pairs of the largest attribution, either sign."""
        return _top(np.abs(self.attribution_P), n)

    def largest(self, n: int) -> np.ndarray:
        """The n parts of the largest attribution, either sign: p < P is a pair, P + t the error at token t."""
        every = np.concatenate([self.attribution_P, self.error_T])
        best = _top(np.abs(every), len(every))
        return best[(best < len(self.position_P)) | (every[best] != 0)][:n]

    def part(self, number: int) -> Part:
        """A part as `largest` numbers them."""
        pairs = len(self.position_P)
        if number >= pairs:
            t = int(number) - pairs
            return Part("error", t, self.text_T[t], None, None, float(self.error_T[t]), _known(self.error_ablation_T[t]))
        t = int(self.position_P[number])
        return Part("feature", t, self.text_T[t], int(self.feature_P[number]), float(self.activation_P[number]),
                    float(self.attribution_P[number]), _known(self.ablation_P[number]))

    def parts(self) -> list[Part]:
        """All of it, the largest first; the attributions add up to `sums["sum"]`."""
        out = [self.part(number) for number in self.largest(len(self.position_P) + len(self.tokens_T))]
        for kind, values_T in (("bias", self.bias_T), ("BOS", self.special_T)):
            out += [Part(kind, t, self.text_T[t], None, None, float(v), None) for t, v in enumerate(values_T) if v]
        return sorted(out, key=lambda part: -abs(part.attribution))

    def to_pandas(self):
        """`parts` as a `pandas.DataFrame`."""
        import pandas
        return pandas.DataFrame(self.parts(), columns=Part._fields).astype({"feature": "Int64"})


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def attribute(lm_: LM, sae: SAE, prompt: str, target: str, against: str | None = None) -> Attribution:
    """Attribution of every active pair of a prompt, of error, bias and special tokens, by one pass forward and one back.

    Raises `PromptError` for an empty or too long prompt and for a target of several tokens, `SteeringError` for an SAE that
    does not fit the model. Memory beyond the model's pass: activations [T, F] twice on device, once on host, decoder rows of the
    active features.
    """
    check_place(lm_, sae)
    tokens_T, ids = encoded(lm_, prompt), _ids(lm_, target, against)
    last, unseen_T = len(tokens_T) - 1, special(lm_, tokens_T)
    weight_V = _weights(lm_, *ids)
    difference, found, gradient = _gradient(lm_.model, padded(lm_, tokens_T), last, weight_V, sae.cfg.hookpoints, sae.cfg.targets)
    x_TD, y_TD = (jnp.concatenate([found[name][0, :last + 1] for name in names], axis=-1)
                  for names in (sae.cfg.hookpoints, sae.cfg.targets))
    gradient_TD = np.concatenate([np.asarray(gradient[name])[0, :last + 1] for name in sae.cfg.targets], axis=-1)
    recon_TD, acts_TF = map(sharding.to_host, sae.reconstruct(x_TD))
    value_T, error_T, bias_T = (_dot(rows_TD, gradient_TD) for rows_TD in (
        y_TD, np.asarray(y_TD) - recon_TD, sharding.to_host(sae.offset(x_TD))))
    acts_TF = acts_TF * ~unseen_T[:, None]
    position_P, feature_P = np.nonzero(acts_TF)
    activation_P = acts_TF[position_P, feature_P]
    along_P = _along(sae, gradient_TD * np.asarray(row_scales(sae, x_TD)), position_P, feature_P)
    return Attribution(
        tokens_T, tuple(map(lm_.tokenizer.token, tokens_T)), int(ids[0]), int(ids[1]) if against else None, float(difference),
        np.where(unseen_T, 0, error_T), np.where(unseen_T, 0, bias_T), np.where(unseen_T, value_T, 0),
        np.full(len(tokens_T), np.nan), position_P, feature_P, activation_P, activation_P * along_P,
        np.full(len(position_P), np.nan))


def _dot(rows_TD, gradient_TD: np.ndarray) -> np.ndarray:
    """[T] float64: the outliers of a row are a thousand times what is left of the sum."""
    return np.einsum("td,td->t", np.asarray(rows_TD, np.float64), gradient_TD.astype(np.float64))


def ablate(lm_: LM, sae: SAE, found: Attribution, parts: np.ndarray | None = None, *, batch: int = 16,
           progress: bool = True) -> Attribution:
    """`found` with the ablation of these parts, numbered as by `largest` (None: of all): one pass through the layers above the
    SAE for each.

    Memory: a pass of `batch` copies of the prompt, of logits [batch, V]. Raises `SteeringError` for a crosscoder.
    """
    check_one_place(sae)
    parts = found.largest(len(found.position_P) + len(found.tokens_T)) if parts is None else np.asarray(parts, np.int64)
    tokens, last, place = padded(lm_, found.tokens_T), len(found.tokens_T) - 1, sae.cfg.targets[0]
    clean = values(lm_.model, tokens, tuple({*sae.cfg.hookpoints, place}))
    row_of = _rows(sae, found, clean[sae.cfg.hookpoints[0]][0, :last + 1], clean[place][0, :last + 1])
    weight_V = _weights(lm_, found.target, -1 if found.against is None else found.against)
    run = functools.partial(_without, lm_.model, tokens, last, weight_V, clean[place], place=place)
    whole = float(run(np.zeros(batch, np.int32), np.zeros((batch, sae.cfg.spec.width_out), np.float32))[0])
    ablation = np.concatenate([found.ablation_P, found.error_ablation_T])
    with Progress("ablation", len(parts), unit="part", enabled=progress) as bar:
        for start in range(0, len(parts), batch):
            here = parts[start:start + batch]
            room = batch - len(here)
            position, rows = row_of(here)
            without = run(np.pad(position, (0, room)).astype(np.int32), np.pad(rows, ((0, room), (0, 0))).astype(np.float32))
            ablation[here] = whole - np.asarray(without)[:len(here)]
            bar.advance(len(here))
    pairs = len(found.position_P)
    return replace(found, ablation_P=ablation[:pairs], error_ablation_T=ablation[pairs:])


def drawn(found: Attribution, n: int, seed: int = 0) -> np.ndarray:
    """n of the pairs, or all where there are fewer, drawn at random: of these `agreement` says how they are in all."""
    pairs = len(found.position_P)
    return np.sort(np.random.default_rng(seed).choice(pairs, min(n, pairs), replace=False))


def _rows(sae: SAE, found: Attribution, x_TD, y_TD) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """parts [B] -> (positions [B], what each adds to the value there [B, D])."""
    scale_T = np.broadcast_to(np.asarray(row_scales(sae, x_TD)), (len(found.tokens_T), 1))[:, 0]
    error_TD, pairs = np.asarray(y_TD) - sharding.to_host(sae(x_TD)), len(found.position_P)

    def row_of(parts):
        is_pair = parts < pairs
        chosen, token = parts[is_pair], parts[~is_pair] - pairs
        position, rows = np.empty(len(parts), np.int64), np.empty((len(parts), error_TD.shape[1]), np.float32)
        position[is_pair], position[~is_pair], rows[~is_pair] = found.position_P[chosen], token, error_TD[token]
        if len(chosen):
            size = found.activation_P[chosen] * scale_T[found.position_P[chosen]]
            rows[is_pair] = size[:, None] * rows_at(sae, sae.params.W_dec, found.feature_P[chosen])
        return position, rows

    return row_of


def agreement(founds: list[Attribution], pairs: list[np.ndarray] | None = None) -> dict:
    """Over the pairs of all these prompts that were ablated, or over `pairs` of each (as from `drawn`): Pearson correlations with
    the ablation, of attribution and of activation (None where one of them does not vary), and how many of a prompt's 10 pairs of
    the greatest ablation are among the 10 of the greatest attribution, and of the highest activation, on average.
    """
    pairs = [np.flatnonzero(np.isfinite(f.ablation_P)) for f in founds] if pairs is None else pairs
    parts = [(f.activation_P[p], f.attribution_P[p], f.ablation_P[p]) for f, p in zip(founds, pairs, strict=True)]
    activation, attribution, ablation = (np.concatenate(column) for column in zip(*parts, strict=True))
    shared = np.array([[len(np.intersect1d(_top(abs(p[2])), _top(abs(by)))) for by in (p[1], p[0])] for p in parts])
    return {"prompts": len(founds), "pairs": len(ablation), "attribution": _pearson(attribution, ablation),
            "activation": _pearson(activation, ablation), "top_by_attribution": float(shared[:, 0].mean()),
            "top_by_activation": float(shared[:, 1].mean())}


def _top(values_P: np.ndarray, n: int = TOP) -> np.ndarray:
    return np.argsort(-values_P, kind="stable")[:n]


def _pearson(a: np.ndarray, b: np.ndarray) -> float | None:
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a.astype(np.float64), b.astype(np.float64))[0, 1])


def _ids(lm_: LM, target: str, against: str | None) -> np.ndarray:
    ids = [single_token(lm_, target), single_token(lm_, against) if against else -1]
    if ids[0] == ids[1]:
        raise PromptError(f"{target!r} against itself: the difference is always 0; give another token")
    return np.array(ids, np.int32)


def _weights(lm_: LM, target: int, against: int) -> np.ndarray:
    """float32 [V] whose product with the logits is logit(target) - logit(against), or with against < 0 - the mean logit of all.
    """
    weight_V = np.zeros(lm_.cfg.vocab_size)
    weight_V[lm_.known_V if against < 0 else against] = -1 / lm_.known_V.sum() if against < 0 else -1
    weight_V[target] += 1
    return weight_V.astype(np.float32)


def _along(sae: SAE, gradient_TD: np.ndarray, position_P: np.ndarray, feature_P: np.ndarray) -> np.ndarray:
    """[P] gradient at the token along the feature's decoder row."""
    chosen, at_P = np.unique(feature_P, return_inverse=True)
    rows_UD = rows_at(sae, sae.params.W_dec, chosen) if len(chosen) else np.zeros((0, gradient_TD.shape[1]), np.float32)
    out_P = np.zeros(len(feature_P))
    for t in np.unique(position_P):
        here = position_P == t
        out_P[here] = rows_UD[at_P[here]] @ gradient_TD[t]
    return out_P


def _difference(model, tokens_BT, last, weight_V, taps) -> jax.Array:
    """[B] the weighted sum of the logits after token `last`, float32. No logits of other tokens."""
    before = taps.get(FINAL, lambda value: value)
    final = {FINAL: lambda value: lax.dynamic_slice_in_dim(before(value), last, 1, axis=1)}
    logits_BV = model(tokens_BT, taps=taps | final)[:, 0].astype(jnp.float32)
    return (logits_BV * weight_V).sum(-1)


@functools.partial(jax.jit, static_argnames=("read", "written"))
def _gradient(model, tokens_1T, last, weight_V, read: tuple[str, ...], written: tuple[str, ...]):
    """(difference, values [1, T, D] at `read` and `written`, gradient [1, T, D] at `written`)."""
    def forward(added):
        seen = {}

        def tap(name, value):
            seen[name] = value.astype(jnp.float32)
            return value + added[name].astype(value.dtype) if name in added else value

        taps = {name: functools.partial(tap, name) for name in {*read, *written}}
        return _difference(model, tokens_1T, last, weight_V, taps)[0], seen

    zero = {name: jnp.zeros((*tokens_1T.shape, width_of(model.cfg, name))) for name in written}
    (difference, found), gradient = jax.value_and_grad(forward, has_aux=True)(zero)
    return difference, found, gradient


@functools.partial(jax.jit, static_argnames="place")
def _without(model, tokens_1T, last, weight_V, clean_1TD, position_B, part_BD, *, place: str):
    """[B] the difference with `part` taken from the value at one place, at one token; below it nothing is computed again."""
    here_BT = jnp.arange(tokens_1T.shape[1]) == position_B[:, None]
    changed_BTD = (clean_1TD - here_BT[..., None] * part_BD[:, None]).astype(model.dtype)
    tokens_BT = jnp.broadcast_to(tokens_1T, (len(position_B), tokens_1T.shape[1]))
    return _difference(model, tokens_BT, last, weight_V, {place: lambda _: changed_BTD})
