"""What is kept of every feature while rows stream past: a fixed number of bytes, whatever the number of rows.

The state of a set of rows depends on the set only, never on the order or the grouping in which it was seen (`total` is the one
floating-point sum; its rounding does): `merge` is associative and commutative, so parts made by different processes may be
merged in any order. The maximum of a feature is not known before the end; so nothing is binned relative to it but by the bits of
the floats, in windows that hang on the maximum so far:

log_hist      counts by `bits.code`: the bin of the maximum, the 30 below it, and all that is lower
lin_hist      counts in 64 equal bins of [0, 2^(e+1)) where 2^e <= max < 2^(e+1); when e grows pairs of bins are added up
sample_*      of each of the same log-spaced bins (the upper 15, and all that is lower) the 8 activations with the least hash of
              (feature, row): a uniform sample without replacement. When the maximum grows bins slide down; the sample of two
              bins together is the least of both samples.
sketch        the 64 rows with the least hash of the row, the same for all features: rows that two features share
top_*         the 32 contexts with the highest activation, each at its highest token; equal ones by row
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from saejax.base import sharding
from saejax.features.index import bits
from saejax.features.index.bits import EMPTY

LOG_BINS, LIN_BINS, SAMPLE_BINS, SAMPLES, SKETCH, TOP = 32, 64, 16, 8, 64, 32
MAX_ROWS = 2**32 - 2


@struct.dataclass
class FeatureState:
    """Leading axis: features, split over `dict`. Rows are uint32: at most `MAX_ROWS` rows can be indexed."""

    fired: jax.Array          # [F] uint32, rows with a positive activation
    total: jax.Array          # [F] float32, sum of the activations ...
    total_low: jax.Array      # [F] float32, ... and what its rounding lost
    max: jax.Array            # [F] float32
    log_hist: jax.Array       # [F, 32] uint32, from the maximum's bin downwards; the last is everything lower
    lin_hist: jax.Array       # [F, 64] uint32
    top_value: jax.Array      # [F, 32] float32, falling; 0 where there are fewer
    top_row: jax.Array        # [F, 32] uint32
    sample_key: jax.Array     # [F, 16, 8] uint32, rising; EMPTY where there are fewer
    sample_value: jax.Array   # [F, 16, 8] float32
    sketch: jax.Array         # [F, 64] uint32, `row_key`s, rising; EMPTY where there are fewer


SHAPES = FeatureState(  # of each field: what a feature has, dtype, the value of no rows
    fired=((), jnp.uint32, 0), total=((), jnp.float32, 0), total_low=((), jnp.float32, 0), max=((), jnp.float32, 0),
    log_hist=((LOG_BINS,), jnp.uint32, 0), lin_hist=((LIN_BINS,), jnp.uint32, 0),
    top_value=((TOP,), jnp.float32, 0), top_row=((TOP,), jnp.uint32, EMPTY),
    sample_key=((SAMPLE_BINS, SAMPLES), jnp.uint32, EMPTY), sample_value=((SAMPLE_BINS, SAMPLES), jnp.float32, 0),
    sketch=((SKETCH,), jnp.uint32, EMPTY))
FIELDS = tuple(SHAPES.__dataclass_fields__)
LOGICAL = {name: ("features", *[None] * len(getattr(SHAPES, name)[0])) for name in FIELDS}  # axes, as in `sharding.AXES`
BYTES_PER_FEATURE = sum(4 * int(np.prod(getattr(SHAPES, name)[0])) for name in FIELDS)


def specs() -> FeatureState:
    """PartitionSpec of every field."""
    return FeatureState(**{name: sharding.spec(*logical) for name, logical in LOGICAL.items()})


def empty(features: int) -> FeatureState:
    """The state of no rows; call it inside `shard_map` or `jit`, or on one device."""
    return FeatureState(**{name: jnp.full((features, *shape), fill, dtype)
                           for name, (shape, dtype, fill) in ((n, getattr(SHAPES, n)) for n in FIELDS)})


def merge(a: FeatureState, b: FeatureState) -> FeatureState:
    """The state of the rows of both. No row may be in both, and no context in parts."""
    top_F = jnp.maximum(a.max, b.max)
    return _combined(_aligned(a, top_F), _aligned(b, top_F))


def updated(state: FeatureState, pairs: "Pairs") -> FeatureState:
    """The state with a batch added, all but `top_*`: `merge` without moving the batch's bins once they are counted."""
    F = len(state.max)
    batch_F = jnp.zeros(F, jnp.float32).at[pairs.feature_P].max(pairs.value_P, mode="drop")
    top_F = jnp.maximum(state.max, batch_F)
    return _combined(_aligned(state, top_F), _of_pairs(pairs, top_F, batch_F))


@struct.dataclass
class Pairs:
    """Positive activations of a batch, each (feature, row) once, on one shard of the dictionary; a free slot names feature F.

    number_F: of each feature in the whole dictionary.
    """

    feature_P: jax.Array
    value_P: jax.Array
    row_P: jax.Array
    number_F: jax.Array


@struct.dataclass
class Peaks:
    """The highest activation of every feature in every context of a batch, and its first row: T times less than [B, F]."""

    value_FC: jax.Array
    row_FC: jax.Array

    @classmethod
    def none(cls, features: int, contexts: int) -> "Peaks":
        return cls(jnp.zeros((features, contexts), jnp.float32), jnp.full((features, contexts), EMPTY))

    def raised(self, pairs: Pairs, first_row: jax.Array, context: int) -> "Peaks":
        """With more pairs of the same batch, whose first row is `first_row`."""
        at = pairs.feature_P, ((pairs.row_P - first_row) // jnp.uint32(context)).astype(jnp.int32)
        value_FC = self.value_FC.at[at].max(pairs.value_P, mode="drop")
        best_P = pairs.value_P == value_FC.at[at].get(mode="clip")
        row_FC = jnp.where(value_FC > self.value_FC, EMPTY, self.row_FC)
        return Peaks(value_FC, row_FC.at[at].min(jnp.where(best_P, pairs.row_P, EMPTY), mode="drop"))


def topped(state: FeatureState, peaks: Peaks) -> FeatureState:
    """The state with the contexts of a batch among its top contexts."""
    value, index = lax.top_k(peaks.value_FC, min(TOP, peaks.value_FC.shape[1]))  # of equal values the first: the lower row
    row = jnp.where(value > 0, jnp.take_along_axis(peaks.row_FC, index, axis=1), EMPTY)
    room = ((0, 0), (0, TOP - value.shape[1]))
    return _top_of_both(state, state.replace(top_value=jnp.pad(value, room), top_row=jnp.pad(row, room, constant_values=EMPTY)))


def _top_of_both(a: FeatureState, b: FeatureState) -> FeatureState:
    negative, row, _ = bits.smallest((-a.top_value, a.top_row, a.top_row), (-b.top_value, b.top_row, b.top_row))
    return a.replace(top_value=jnp.abs(negative), top_row=row)


def _of_pairs(pairs: Pairs, top_F: jax.Array, batch_F: jax.Array) -> FeatureState:
    """State of a batch, without its top contexts, whose windows hang on `top_F`, which is at least the batch's own maximum."""
    F, f_P, v_P = len(top_F), pairs.feature_P, pairs.value_P
    top_P = top_F.at[f_P].get(mode="clip")
    below_P = bits.code(top_P) - bits.code(v_P)
    one_P = jnp.ones(len(f_P), jnp.uint32)
    new = empty(F)
    keys, samples = _samples(pairs, jnp.minimum(below_P, SAMPLE_BINS - 1), F)
    return new.replace(
        fired=new.fired.at[f_P].add(one_P, mode="drop"), total=new.total.at[f_P].add(v_P, mode="drop"), max=batch_F,
        log_hist=new.log_hist.at[f_P, jnp.minimum(below_P, LOG_BINS - 1)].add(one_P, mode="drop"),
        lin_hist=new.lin_hist.at[f_P, bits.linear_bin(v_P, top_P, LIN_BINS)].add(one_P, mode="drop"),
        sample_key=keys, sample_value=samples, sketch=_sketch(pairs, F))


def _samples(pairs: Pairs, bin_P: jax.Array, F: int) -> tuple[jax.Array, jax.Array]:
    """(keys, values) [F, SAMPLE_BINS, SAMPLES]: the least keys of every bin."""
    number_P = pairs.number_F.at[pairs.feature_P].get(mode="clip")
    key_P = bits.pair_key(number_P, pairs.row_P)
    bin_P = pairs.feature_P * SAMPLE_BINS + jnp.where(pairs.feature_P < F, bin_P, 0)
    bin_P, key_P, value_P = lax.sort((bin_P, key_P, pairs.value_P), num_keys=2)
    slot_P = bits.ranks(bin_P)
    keys = jnp.full((F * SAMPLE_BINS, SAMPLES), EMPTY).at[bin_P, slot_P].set(key_P, mode="drop")
    values = jnp.zeros((F * SAMPLE_BINS, SAMPLES), jnp.float32).at[bin_P, slot_P].set(value_P, mode="drop")
    shape = (F, SAMPLE_BINS, SAMPLES)
    return keys.reshape(shape), values.reshape(shape)


def _sketch(pairs: Pairs, F: int) -> jax.Array:
    feature_P, key_P = lax.sort((pairs.feature_P, bits.row_key(pairs.row_P)), num_keys=2)
    return jnp.full((F, SKETCH), EMPTY).at[feature_P, bits.ranks(feature_P)].set(key_P, mode="drop")


def _combined(a: FeatureState, b: FeatureState) -> FeatureState:
    """The sum of two states whose windows hang on the same maximum."""
    total = a.total + b.total
    part = total - a.total
    lost = (a.total - (total - part)) + (b.total - part)  # Knuth's TwoSum: exactly what the sum rounded away
    best = _top_of_both(a, b)
    keys, values = bits.smallest((a.sample_key, a.sample_value), (b.sample_key, b.sample_value))
    sketch, _ = bits.smallest((a.sketch, a.sketch), (b.sketch, b.sketch))
    return FeatureState(fired=a.fired + b.fired, total=total, total_low=a.total_low + b.total_low + lost,
                        max=jnp.maximum(a.max, b.max), log_hist=a.log_hist + b.log_hist, lin_hist=a.lin_hist + b.lin_hist,
                        top_value=best.top_value, top_row=best.top_row, sample_key=keys, sample_value=values, sketch=sketch)


def _aligned(state: FeatureState, top_F: jax.Array) -> FeatureState:
    """The state with its windows hung on `top_F`, which is at least its maximum."""
    fresh_F = state.max == 0  # nothing to move
    down_F = jnp.where(fresh_F, 0, bits.code(top_F) - bits.code(state.max))
    double_F = jnp.where(fresh_F, 0, bits.exponent(top_F) - bits.exponent(state.max))
    keys, values = _slid_samples(state.sample_key, state.sample_value, jnp.minimum(down_F, SAMPLE_BINS))
    return state.replace(log_hist=_slid_counts(state.log_hist, down_F), sample_key=keys, sample_value=values,
                         lin_hist=_halved(state.lin_hist, jnp.minimum(double_F, LIN_BINS.bit_length())))


def _slid_counts(hist_FW: jax.Array, down_F: jax.Array) -> jax.Array:
    """Counts `down_F` bins lower; the last bin takes what falls out."""
    W = hist_FW.shape[1]
    place_W, from_FW = jnp.arange(W), jnp.arange(W) - down_F[:, None]
    moved_FW = jnp.where(from_FW >= 0, jnp.take_along_axis(hist_FW, jnp.clip(from_FW, 0, W - 1), axis=1), 0)
    fallen_F = jnp.where(place_W + down_F[:, None] >= W - 1, hist_FW, 0).sum(1, dtype=jnp.uint32)
    return moved_FW.at[:, -1].set(fallen_F)


def _halved(hist_FL: jax.Array, times_F: jax.Array) -> jax.Array:
    """Counts with neighbouring bins added up, `times_F` times."""
    F, L = hist_FL.shape

    def step(carry):
        hist_FL, left_F = carry
        half_FL = jnp.pad(hist_FL.reshape(F, L // 2, 2).sum(2, dtype=jnp.uint32), ((0, 0), (0, L // 2)))
        return jnp.where(left_F[:, None] > 0, half_FL, hist_FL), left_F - 1

    return lax.while_loop(lambda carry: (carry[1] > 0).any(), step, (hist_FL, times_F))[0]


def _slid_samples(keys: jax.Array, values: jax.Array, down_F: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Samples `down_F` bins lower; the last bin keeps the least of what falls into it. One bin at a time: mostly none moves."""
    def step(carry):
        keys, values, left_F = carry
        last = bits.smallest((keys[:, -1], values[:, -1]), (keys[:, -2], values[:, -2]))
        moving = (left_F > 0)[:, None, None]
        out = []
        for old, end, fill in zip((keys, values), last, (EMPTY, 0), strict=True):
            first = jnp.full_like(old[:, :1], fill)
            out.append(jnp.where(moving, jnp.concatenate([first, old[:, :-2], end[:, None]], axis=1), old))
        return *out, left_F - 1

    return lax.while_loop(lambda carry: (carry[2] > 0).any(), step, (keys, values, down_F))[:2]
