"""From states to examples: the top contexts, and a uniform sample of every interval of activation; what these tell of tokens."""

from dataclasses import dataclass

import numpy as np

from saejax.features.index import bits
from saejax.features.index.bits import EMPTY
from saejax.features.index.state import SAMPLE_BINS, FeatureState

TOP_EXAMPLES, INTERVALS, PER_INTERVAL, TOP_TOKENS = 20, 10, 5, 10
BEFORE, WINDOW = 23, 32   # tokens shown of a context: up to 23 before the example


@dataclass(frozen=True)
class Examples:
    """Rows of the index' `examples`, by feature, then top examples (interval 0, falling), then intervals 1 (lowest) to 10.

    start: first token shown, counted in the context, as `position` is.
    """

    feature: np.ndarray
    interval: np.ndarray
    value: np.ndarray
    row: np.ndarray


def choose(state: FeatureState, first_feature: int = 0) -> Examples:
    """Examples of a block of features (host arrays), numbered from `first_feature`."""
    keys, values, _ = valid_samples(state)
    F = len(state.max)
    numbers = np.arange(first_feature, first_feature + F)
    rows = bits.row_of_pair_key(np.broadcast_to(numbers[:, None, None], keys.shape), keys)
    parts = [(f, np.zeros(len(f), np.int8), state.top_value[f, i], state.top_row[f, i])
             for f, i in [np.nonzero(state.top_value[:, :TOP_EXAMPLES] > 0)]]
    for interval in range(1, INTERVALS + 1):
        f, slot = interval_sample(state, interval)
        flat = (len(keys), -1)
        parts.append((f, np.full(len(f), interval, np.int8), values.reshape(flat)[f, slot], rows.reshape(flat)[f, slot]))
    feature, intervals, value, row = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((intervals, feature))  # stable: the order within an interval stays
    return Examples((feature[order] + first_feature).astype(np.int32), intervals[order].astype(np.int8),
                    value[order].astype(np.float32), row[order].astype(np.uint32))


def valid_samples(state: FeatureState) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(keys, values, which are there) [F, bins, samples]."""
    keys, values = np.asarray(state.sample_key), np.asarray(state.sample_value)
    return keys, values, values > 0


def interval_sample(state: FeatureState, interval: int, n: int = PER_INTERVAL) -> tuple[np.ndarray, np.ndarray]:
    """(feature, flat slot) of at most n activations a with (interval - 1) / 10 < a / max <= interval / 10, uniform.

    They come in the order of their keys.
    Of a bin that lies in the interval the least keys are known; of a bin across an end those of both sides together, hence all of
    this side up to its last key. Up to the least of these bounds what is chosen are the least keys of the interval, a uniform
    sample; where these are fewer than n the next known keys follow, which favours bins that lie in the interval whole.
    """
    keys, values, there = valid_samples(state)
    low_F, high_F = ((np.asarray(state.max, np.float64) * part / INTERVALS)[:, None, None]
                     for part in (interval - 1, interval))
    inside = there & (values > low_F) & (values <= high_F)
    order_keys = np.where(inside, keys, EMPTY).reshape(len(keys), -1)
    slot = np.argsort(order_keys, axis=1, kind="stable")[:, :n]
    feature, rank = np.nonzero(np.take_along_axis(order_keys, slot, axis=1) != EMPTY)
    return feature, slot[feature, rank]


def bin_counts(state: FeatureState) -> np.ndarray:
    """int64 [F, bins]: activations that fell into each sample bin."""
    hist = np.asarray(state.log_hist, np.int64)
    return np.concatenate([hist[:, :SAMPLE_BINS - 1], hist[:, SAMPLE_BINS - 1:].sum(1, keepdims=True)], axis=1)


def interval_counts(state: FeatureState) -> np.ndarray:
    """[F, intervals] about how many activations each interval has: those of a linear bin across an end are divided by width."""
    hist = np.asarray(state.lin_hist, np.float64)
    top = np.asarray(state.max, np.float64)
    whole = 2.0 ** (np.asarray(bits.exponent(np.asarray(state.max)), np.float64) - 126)
    edges = np.minimum(np.arange(hist.shape[1] + 1)[None] / hist.shape[1] * whole[:, None], top[:, None])
    cumulative = np.concatenate([np.zeros((len(hist), 1)), np.cumsum(hist, 1)], axis=1)
    ends = top[:, None] * np.arange(INTERVALS + 1) / INTERVALS
    last_F = np.maximum((edges < top[:, None]).sum(1) - 1, 0)  # the bin that the maximum lies in
    at_FI = np.minimum((edges[:, None] <= ends[..., None]).sum(2) - 1, last_F[:, None])
    low, high = (np.take_along_axis(edges, at_FI + step, 1) for step in (0, 1))
    before, after = (np.take_along_axis(cumulative, at_FI + step, 1) for step in (0, 1))
    slope = np.divide(after - before, high - low, out=np.zeros(high.shape), where=high > low)
    below_FI = np.where(ends < top[:, None], slope * (ends - low) + before, after)
    return np.where(top[:, None] > 0, np.diff(below_FI, axis=1), 0.0)


def top_tokens(state: FeatureState, tokens_N: np.ndarray, first_feature: int = 0) -> tuple[np.ndarray, ...]:
    """(how many of each feature [F]; token, share of its total activation, mean activation there, of each feature the largest
    share first, at most 10).

    Estimated from the samples: a bin of n activations of which m are sampled counts each n / m times (Horvitz-Thompson).
    """
    keys, values, there = valid_samples(state)
    F = len(keys)
    counts, sampled = bin_counts(state), there.sum(2)
    weight = np.where(there, (counts / np.maximum(sampled, 1))[..., None], 0.0)
    f, b, s = np.nonzero(there)
    token = np.asarray(tokens_N)[bits.row_of_pair_key(f + first_feature, keys[f, b, s]).astype(np.int64)].astype(np.int64)
    w, v = weight[f, b, s], values[f, b, s].astype(np.float64)
    pair, place = np.unique(f << 32 | token, return_inverse=True)
    mass, mean = np.bincount(place, w * v, len(pair)), np.bincount(place, w, len(pair))
    f, token = pair >> 32, pair & 0xFFFFFFFF
    share = mass / np.maximum(np.bincount(f, mass, F), np.finfo(np.float64).tiny)[f]
    order = np.lexsort((token, -mass, f))
    rank = np.arange(len(order)) - np.searchsorted(f, f)  # f rises, before and after
    best = order[rank < TOP_TOKENS]
    return np.bincount(f[best], minlength=F), token[best], share[best], mass[best] / mean[best]
