"""What the features of a prompt do to its next token: attribution from one gradient, ablation by running the model again.

    attribution = a_i s d_i . grad_x (logit(target) - logit(against))      a feature at a token, all of them from one pass
    ablation    = difference of the logits - the same with that feature at that token set to 0, the error kept

The first is the second to first order. Both are for one feature at one token; logits at the prompt's last token, gradient with
respect to the value that the SAE reconstructs, at that token. Source: Templeton et al. 2024; Transformer Circuits update March
2024.
"""

import functools
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class Attribution:
    """The P pairs (token, feature) that are active on a prompt, by token and then by feature; special tokens have none.

    difference: logit(target) - logit(against) (without it: the mean logit of all tokens). ablation: NaN where it was not
    measured.
    """

    tokens_T: np.ndarray
    target: int
    against: int | None
    difference: float
    position_P: np.ndarray
    feature_P: np.ndarray
    activation_P: np.ndarray
    attribution_P: np.ndarray
    ablation_P: np.ndarray

    def __repr__(self) -> str:
        return f"Attribution(logit difference {self.difference:.4g}, {len(self.position_P):,} active pairs of token and feature)"

    def best(self, n: int) -> np.ndarray:
        """The n pairs of the largest attribution, either sign."""
        return np.argsort(-np.abs(self.attribution_P), kind="stable")[:n]


def attribute(lm_: LM, sae: SAE, prompt: str, target: str, against: str | None = None) -> Attribution:
    """Attribution of every active pair of a prompt, by one pass forward and one back.

    Raises `PromptError` for an empty or too long prompt and for a target of several tokens, `SteeringError` for an SAE that
    does not fit the model. Memory beyond the model's pass: activations [T, F] once on device and host, decoder rows of the active
    features.
    """
    check_place(lm_, sae)
    tokens_T, ids = encoded(lm_, prompt), _ids(lm_, target, against)
    last = len(tokens_T) - 1
    weight_V = _weights(lm_, *ids)
    difference, found, gradient = _gradient(lm_.model, padded(lm_, tokens_T), last, weight_V, sae.cfg.hookpoints, sae.cfg.targets)
    x_TD = jnp.concatenate([found[name][0, :last + 1] for name in sae.cfg.hookpoints], axis=-1)
    gradient_TD = np.concatenate([np.asarray(gradient[name])[0, :last + 1] for name in sae.cfg.targets], axis=-1)
    acts_TF = sharding.to_host(sae.encode(x_TD)) * ~special(lm_, tokens_T)[:, None]
    position_P, feature_P = np.nonzero(acts_TF)
    activation_P = acts_TF[position_P, feature_P]
    gradient_TD = gradient_TD * np.asarray(row_scales(sae, x_TD))
    return Attribution(tokens_T, int(ids[0]), int(ids[1]) if against else None, float(difference), position_P, feature_P,
                       activation_P, activation_P * _along(sae, gradient_TD, position_P, feature_P),
                       np.full(len(position_P), np.nan))


def ablate(lm_: LM, sae: SAE, found: Attribution, pairs: np.ndarray | None = None, *, batch: int = 16,
           progress: bool = True) -> Attribution:
    """`found` with the ablation of these pairs (None: of all): one pass through the layers above the SAE for each.

    Memory: a pass of `batch` copies of the prompt, of logits [batch, V]. Raises `SteeringError` for a crosscoder.
    """
    check_one_place(sae)
    pairs = np.arange(len(found.position_P)) if pairs is None else np.asarray(pairs)
    tokens, last, place = padded(lm_, found.tokens_T), len(found.tokens_T) - 1, sae.cfg.targets[0]
    clean = values(lm_.model, tokens, tuple({*sae.cfg.hookpoints, place}))
    scale = np.broadcast_to(np.asarray(row_scales(sae, clean[sae.cfg.hookpoints[0]][0])), (tokens.shape[1], 1))
    weight_V = _weights(lm_, found.target, -1 if found.against is None else found.against)
    run = functools.partial(_without, lm_.model, tokens, last, weight_V, clean[place], place=place)
    whole = float(run(np.zeros(batch, np.int32), np.zeros((batch, sae.cfg.spec.width_out), np.float32))[0])
    ablation_P = found.ablation_P.copy()
    with Progress("ablation", len(pairs), unit="pair", enabled=progress) as bar:
        for start in range(0, len(pairs), batch):
            part = pairs[start:start + batch]
            room = batch - len(part)
            position, size = found.position_P[part], found.activation_P[part, None] * scale[found.position_P[part]]
            rows = size * rows_at(sae, sae.params.W_dec, found.feature_P[part])
            without = run(np.pad(position, (0, room)).astype(np.int32), np.pad(rows, ((0, room), (0, 0))).astype(np.float32))
            ablation_P[part] = whole - np.asarray(without)[:len(part)]
            bar.advance(len(part))
    return replace(found, ablation_P=ablation_P)


def agreement(founds: list[Attribution]) -> dict:
    """Over the pairs of all these prompts that were ablated: Pearson correlations with the ablation, of attribution and of
    activation (None where one of them does not vary), and how many of a prompt's 10 pairs of the greatest ablation are among
    the 10 of the greatest attribution, and of the highest activation, on average.
    """
    parts = [tuple(x_P[np.isfinite(f.ablation_P)] for x_P in (f.activation_P, f.attribution_P, f.ablation_P)) for f in founds]
    activation, attribution, ablation = (np.concatenate(column) for column in zip(*parts, strict=True))
    shared = np.array([[len(np.intersect1d(_top(abs(p[2])), _top(abs(by)))) for by in (p[1], p[0])] for p in parts])
    return {"prompts": len(founds), "pairs": len(ablation), "attribution": _pearson(attribution, ablation),
            "activation": _pearson(activation, ablation), "top_by_attribution": float(shared[:, 0].mean()),
            "top_by_activation": float(shared[:, 1].mean())}


def _top(values_P: np.ndarray) -> np.ndarray:
    return np.argsort(-values_P, kind="stable")[:TOP]


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
    """(difference, values [1, T, D] at `read`, gradient [1, T, D] at `written`)."""
    def forward(added):
        seen = {}

        def tap(name, value):
            seen[name] = value.astype(jnp.float32)
            return value + added[name].astype(value.dtype) if name in added else value

        taps = {name: functools.partial(tap, name) for name in {*read, *written}}
        return _difference(model, tokens_1T, last, weight_V, taps)[0], {name: seen[name] for name in read}

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
