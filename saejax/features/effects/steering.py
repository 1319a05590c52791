"""Steering: what the language model says with a feature set to a value, without it, or with a direction added.

    x' = x + (value - a_i) s d_i          a_i what the SAE's own encoder gives here, d_i its decoder row

is SAE(x) with feature i at `value`, plus the error x - SAE(x), which stays as it is (s = 1 but for SAEs that normalise every row,
whose reconstruction is scaled back). A transcoder reads a_i at its hookpoint and the change is made at its target. Source:
Templeton et al. 2024, "Feature steering"; value = multiple of the feature's maximum over the SAE's data.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import SingleDeviceSharding
from jax.tree_util import Partial

from saejax.base.errors import FeatureIndexError, SteeringError
from saejax.features.effects.prompting import (
    check_feature,
    check_one_place,
    check_place,
    encoded,
    padded,
    row_scales,
    special,
)
from saejax.features.index.logits import rows_at
from saejax.features.index.reader import FeatureIndex
from saejax.lm import LM, Sampling, generate, prompts
from saejax.lm.prompts import Text, values
from saejax.sae import from_tensors, tensors
from saejax.sae.inference import SAE, SAEConfig

BY_ITSELF = ("relu", "jumprelu", "gated")  # kinds whose features do not compete: one is encoded without the others


@dataclass(frozen=True)
class Change:
    """What is done to one row of a batch; without features and vector nothing.

    features: each set to a value, an activation in the SAE's units (0: ablated). vector [d_out]: added as it is, in raw units.
    """

    label: str = "unsteered"
    features: Mapping[int, float] = field(default_factory=dict)
    vector: np.ndarray | None = None


def clamped(feature: int, scale: float, maximum: float) -> Change:
    """The feature at `scale` times its maximum."""
    return Change(f"feature {feature} x {scale:g}", {feature: scale * maximum})


def ablated(feature: int) -> Change:
    """The feature at 0."""
    return Change(f"feature {feature} ablated", {feature: 0.0})


def maximum(index: FeatureIndex, feature: int) -> float:
    """The largest activation in the index. Raises `FeatureIndexError` for no such feature, `SteeringError` for a dead one."""
    largest = float(index.column("max")[index.check_feature(feature)])
    if largest <= 0:
        raise SteeringError(f"feature {feature}: never active on the {index.manifest['totals']['kept_rows']:,} tokens "
                            f"of {index.path}, so that there is no maximum to multiply; choose another one, or give "
                            "its value")
    return largest


class _Rows(NamedTuple):
    """One entry for each row of a batch, N features in each. column [B, N]: place of a feature in the dictionary that is
    encoded, -1 without one; value [B, N]; direction [B, N, d_out]; vector [B, d_out]. at [B, P]: at which of the first P
    positions there is a change; after [B]: behind them.
    """

    column: Array
    value: Array
    direction: Array
    vector: Array
    at: Array
    after: Array


def plan(lm_: LM, sae: SAE, changes: Sequence[Change], at_BP: np.ndarray | None = None, *, after: bool = True) -> Partial:
    """A `Partial` that makes the taps of a batch whose row b is changed by `changes[b]`.

    `generate(model, prompts, 40, taps=plan(...))` steers every token of the batch, `model(tokens, taps=plan(...)())` one pass.
    at_BP: bool, the prompt positions to change (None: all); after: whether positions behind those are changed. Memory beyond the
    model: of kinds whose features compete (topk) the dictionary and activations [B, T, F]; of others only the features changed.
    Raises `SteeringError`, `HookpointError`.
    """
    check_place(lm_, sae)
    check_one_place(sae)
    chosen = sorted({check_feature(sae, feature) for change in changes for feature in change.features})
    width = sae.cfg.spec.width_out
    for change in changes:
        if change.vector is not None and np.shape(change.vector) != (width,):
            raise SteeringError(f"{change.label}: the direction has shape {np.shape(change.vector)}, {sae.cfg.targets[0]} takes "
                                f"({width},)")
    part, columns = _narrowed(sae, chosen)
    found = dict(zip(chosen, rows_at(sae, sae.params.W_dec, chosen), strict=True)) if chosen else {}
    nothing = np.zeros(width, np.float32)
    most = max([1, *(len(c.features) for c in changes)])
    each = [[*c.features.items(), *[(None, 0.0)] * (most - len(c.features))] for c in changes]
    rows = _Rows(np.array([[columns.get(feature, -1) for feature, _ in row] for row in each], np.int32),
                 np.array([[value for _, value in row] for row in each], np.float32),
                 np.stack([[found.get(feature, nothing) for feature, _ in row] for row in each]),
                 np.stack([nothing if c.vector is None else np.asarray(c.vector, np.float32) for c in changes]),
                 np.zeros((len(changes), 0), bool) if at_BP is None else _in_sixteens(np.asarray(at_BP, bool), after),
                 np.full(len(changes), after))
    return Partial(_maker(part.cfg), part.params if chosen else None, _Rows(*map(jnp.asarray, rows)))


def _in_sixteens(at_BP: np.ndarray, after: bool) -> np.ndarray:
    """A multiple of 16 positions: few shapes, few compilations."""
    return np.pad(at_BP, ((0, 0), (0, -at_BP.shape[1] % 16)), constant_values=after)


@functools.lru_cache(maxsize=64)
def _maker(cfg: SAEConfig):
    """One function for each description of an SAE, so that what is compiled for it is found again."""
    def make(params, rows: _Rows):
        return _taps(cfg, params, rows)

    return make


def _taps(cfg: SAEConfig, params, rows: _Rows) -> dict:
    read, seen = cfg.hookpoints[0], []

    def keep(x_BTD: Array) -> Array:
        seen[:] = [x_BTD]
        return x_BTD

    def change(x_BTD: Array, positions_BT: Array) -> Array:
        added_BTD = rows.vector[:, None]
        if params is not None:
            sae, source_BTD = SAE(params, cfg), (seen[0] if cfg.target else x_BTD).astype(jnp.float32)
            column_B1N = rows.column[:, None]
            act_BTN = jnp.take_along_axis(sae.encode(source_BTD), jnp.maximum(column_B1N, 0), axis=-1)
            step_BTN = jnp.where(column_B1N >= 0, (rows.value[:, None] - act_BTN) * row_scales(sae, source_BTD), 0.0)
            added_BTD += jnp.einsum("btn,bnd->btd", step_BTN, rows.direction, precision="highest")
        here_BT = _here(rows, positions_BT)
        return jnp.where(here_BT[..., None], x_BTD.astype(jnp.float32) + added_BTD, x_BTD).astype(x_BTD.dtype)

    return {read: keep, cfg.target: change} if cfg.target and params is not None else {cfg.targets[0]: change}


def _here(rows: _Rows, positions_BT: Array) -> Array:
    size = rows.at.shape[1]
    behind_BT = jnp.broadcast_to(rows.after[:, None], positions_BT.shape)
    if size == 0:
        return behind_BT
    inside_BT = jnp.take_along_axis(rows.at, jnp.clip(positions_BT, 0, size - 1), axis=1)
    return jnp.where(positions_BT < size, inside_BT, behind_BT)


def _narrowed(sae: SAE, chosen: list[int]) -> tuple[SAE, dict[int, int]]:
    """(an SAE on one device in which these features have the values that they have in `sae`, their places in it)."""
    if sae.cfg.kind in BY_ITSELF and chosen:
        own = {name: value if name in ("b_dec", "W_skip") else rows_at(sae, value, chosen)
               for name, value in tensors(sae.params).items()}
        cfg = SAEConfig(**{**vars(sae.cfg), "d_sae": len(chosen)})
        return SAE(from_tensors(jax.tree.map(jnp.asarray, own)), cfg), {f: n for n, f in enumerate(chosen)}
    if sae.mesh is None or not chosen:
        return sae, {f: f for f in chosen}
    if sae.mesh.size > 1:
        raise SteeringError(f"the features of a {sae.cfg.kind} SAE compete, so that one device must hold all {sae.cfg.d_sae:,} "
                            "of them: load it without a mesh")
    where = SingleDeviceSharding(sae.mesh.devices.flat[0])
    return SAE(jax.device_put(sae.params, where), sae.cfg), {f: f for f in chosen}


def places(lm_: LM, tokens_T: np.ndarray, positions: str | Sequence[int] = "all") -> tuple[np.ndarray, bool]:
    """(bool [T], bool): the prompt's tokens that are changed, and whether those behind it are.

    all: every token of prompt and continuation but the special ones, which the SAE has not seen. last: the prompt's last token
    alone. Numbers: these tokens of the prompt alone, BOS being 0 where there is one. Raises `SteeringError` for others.
    """
    at_T = ~special(lm_, tokens_T) if positions == "all" else np.zeros(len(tokens_T), bool)
    if positions == "all":
        return at_T, True
    chosen = [len(tokens_T) - 1] if positions == "last" else [positions] if isinstance(positions, str) else list(positions)
    wrong = [p for p in chosen if not (isinstance(p, int | np.integer) and 0 <= p < len(tokens_T))]
    if wrong or not chosen:
        raise SteeringError(f"position {wrong[0] if wrong else '(none)'}: the prompt has tokens 0 to {len(tokens_T) - 1}; give "
                            "all, last, or some of these numbers")
    at_T[chosen] = True
    return at_T, False


def continuations(lm_: LM, sae: SAE, prompt: Text, changes: Sequence[Change], *, positions: str | Sequence[int] = "all",
                  tokens: int = 40, sampling: Sampling | None = None, seed: int = 0) -> list[str]:
    """How the prompt goes on under each of the changes, as one batch. Raises `SteeringError`, `FeatureIndexError`, `LMError`."""
    tokens_T = encoded(lm_, prompt)
    at_T, after = places(lm_, tokens_T, positions)
    taps = plan(lm_, sae, changes, np.tile(at_T, (len(changes), 1)), after=after)
    stops = [] if lm_.tokenizer.eos_id is None else [lm_.tokenizer.eos_id]
    rows = generate(lm_.model, [tokens_T.tolist()] * len(changes), tokens, sampling=sampling, seed=seed, stop_ids=stops,
                    taps=taps)
    return ["".join(lm_.tokenizer.token_strings(row, begins=False)) for row in rows]


@dataclass(frozen=True)
class NextToken:
    """What a change does to the token behind the prompt. kl: KL(unsteered || changed) in nats. rises and falls: (token id,
    probability before, after), those of the largest changes.
    """

    kl: float
    rises: list[tuple[int, float, float]]
    falls: list[tuple[int, float, float]]


def next_tokens(lm_: LM, sae: SAE, prompt: Text, changes: Sequence[Change], *, positions: str | Sequence[int] = "all",
                n: int = 3) -> list[NextToken]:
    """For each change what it does to the distribution of the next token; one pass, logits [changes + 1, T, V]."""
    tokens_T, changes = encoded(lm_, prompt), [Change(), *changes]
    at_T, after = places(lm_, tokens_T, positions)
    taps = plan(lm_, sae, changes, np.tile(at_T, (len(changes), 1)), after=after)
    logits_BV = prompts.logits(lm_.model, prompts.padded(lm_.cfg, [tokens_T] * len(changes)), taps)[:, len(tokens_T) - 1]
    clean_V, *changed = np.asarray(jax.nn.log_softmax(logits_BV, axis=-1), np.float64)
    return [_next_token(clean_V, log_V, np.flatnonzero(lm_.known_V), n) for log_V in changed]


def _next_token(clean_V: np.ndarray, log_V: np.ndarray, known: np.ndarray, n: int) -> NextToken:
    before_V, after_V = np.exp(clean_V), np.exp(log_V)
    order = known[np.argsort((after_V - before_V)[known], kind="stable")]

    def of(ids) -> list[tuple[int, float, float]]:
        return [(int(i), float(before_V[i]), float(after_V[i])) for i in ids]

    return NextToken(float((before_V * (clean_V - log_V)).sum()), of(order[::-1][:n]), of(order[:n]))


def few_shot_vector(lm_: LM, hookpoint: str, positives: Sequence[str], negatives: Sequence[str]) -> np.ndarray:
    """mean over positives - mean over negatives of the value [D] at the last token: the baseline of Templeton et al. 2024.

    Raises `FeatureIndexError` where one of the sets is empty.
    """
    if not positives or not negatives:
        raise FeatureIndexError("a few-shot vector needs positive and negative prompts; give at least one of each")

    def last(prompt: str) -> np.ndarray:
        tokens_T = encoded(lm_, prompt)
        return np.asarray(values(lm_.model, padded(lm_, tokens_T), (hookpoint,))[hookpoint][0, len(tokens_T) - 1])

    found = [np.mean([last(prompt) for prompt in prompts], axis=0) for prompts in (positives, negatives)]
    return found[0] - found[1]
