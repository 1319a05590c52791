"""What an index must say, computed plainly in numpy from all activations at once."""

import numpy as np

from saejax.features.index import bits
from saejax.features.index import state as st


def state_of(acts_NF: np.ndarray, context: int, rows_N: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Every field of the `FeatureState` of these rows; whole contexts, numbered `rows_N`."""
    N, F = acts_NF.shape
    rows_N = np.arange(N) if rows_N is None else rows_N
    out = {name: np.asarray(getattr(st.empty(F), name)).copy() for name in st.FIELDS}
    for f in range(F):
        here = np.flatnonzero(acts_NF[:, f] > 0)
        if not len(here):
            continue
        value, row = acts_NF[here, f].astype(np.float32), rows_N[here].astype(np.uint32)
        top = value.max()
        out["fired"][f], out["total"][f], out["max"][f] = len(here), value.astype(np.float64).sum(), top
        below = (top.view(np.uint32) >> 21).astype(int) - (value.view(np.uint32) >> 21).astype(int)  # two bits of mantissa
        out["log_hist"][f] = np.bincount(np.minimum(below, st.LOG_BINS - 1), minlength=st.LOG_BINS)
        whole = 2.0 ** (np.floor(np.log2(np.float64(top))) + 1)
        out["lin_hist"][f] = np.bincount((value.astype(np.float64) / whole * st.LIN_BINS).astype(int), minlength=st.LIN_BINS)
        order = np.lexsort((row, -value))
        _, first = np.unique(row[order] // context, return_index=True)  # of each context the best, then of these the best
        peaks = order[np.sort(first)[:st.TOP]]
        out["top_value"][f, :len(peaks)], out["top_row"][f, :len(peaks)] = value[peaks], row[peaks]
        keys = bits.pair_key(np.array([f]), row)
        for b in range(st.SAMPLE_BINS):
            inside = np.minimum(below, st.SAMPLE_BINS - 1) == b
            order = np.argsort(keys[inside])[:st.SAMPLES]
            out["sample_key"][f, b, :len(order)] = keys[inside][order]
            out["sample_value"][f, b, :len(order)] = value[inside][order]
        sketch = np.sort(bits.row_key(row))[:st.SKETCH]
        out["sketch"][f, :len(sketch)] = sketch
    return out


def assert_equal(found, expected: dict[str, np.ndarray]) -> None:
    """All fields equal; `total` with its low part to 1e-6, as a sum's rounding depends on its order."""
    for name in st.FIELDS:
        value = np.asarray(getattr(found, name))
        if name == "total":
            total = np.float64(value) + np.asarray(found.total_low)
            np.testing.assert_allclose(total, expected["total"], rtol=1e-6, err_msg=name)
        elif name != "total_low":
            np.testing.assert_array_equal(value, expected[name], err_msg=name)


def random_acts(rng: np.random.Generator, rows: int, features: int, density: float = 0.3) -> np.ndarray:
    """Activations over many octaves, some equal, one feature dead."""
    acts = np.exp(rng.normal(0, 2.5, (rows, features))).astype(np.float32)
    acts = np.where(rng.random((rows, features)) < 0.2, np.float32(1.5), acts)
    acts = np.where(rng.random((rows, features)) < density, acts, np.float32(0))
    acts[:, features - 1] = 0
    return acts


