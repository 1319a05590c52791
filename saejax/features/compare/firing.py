"""Two dictionaries by what they do on the same text: the Pearson correlation of activations, of all pairs that fire together.

    r = (S_ab - S_a S_b / n) / sqrt((S_aa - S_a^2 / n) (S_bb - S_b^2 / n))       S: sums over n rows

Activations are not negative: where S_ab is 0, r is not above 0. So the pairs that fire on one row at least are all that can be a
match, and of these k_A k_B a row are enough: the product of two sparse matrices, exact, with neither F_A F_B memory nor that many
operations. Sums are float64.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy.sparse import csr_array, vstack

from saejax.base import sharding
from saejax.features.index.neighbours import LEAST_SUPPORT
from saejax.sae.inference import SAE, selected_raw

_PIECE, _PRODUCTS = 1 << 24, 1 << 24  # activations [B, F] of a piece; products of a block of features of A, 16 bytes each
_ROWS = 1 << 14  # of a piece of topk


@dataclass(frozen=True)
class Firing:
    """Of dictionaries A and B on `rows` rows. match_A [F_A]: the feature of B whose activations correlate most with those of the
    feature of A, -1 where none is above 0 on `LEAST_SUPPORT` shared rows; r_A [F_A] its correlation, NaN without one; so for B.

    pair_A [F_A], pair_B [F_B]: correlation of a feature with another one that was named, NaN where one of them never fired.
    """

    rows: int
    match_A: np.ndarray
    r_A: np.ndarray
    match_B: np.ndarray
    r_B: np.ndarray
    pair_A: np.ndarray
    pair_B: np.ndarray


def correlate(a: SAE, b: SAE, rows: Iterable[np.ndarray], named_A: np.ndarray, named_B: np.ndarray) -> Firing:
    """Best matches both ways, and the correlation of the pairs (feature of A, named_A) and (named_B, feature of B).

    rows: pieces [N, d_in] of raw activations that both read. Operations: two encodings, and of each row the number of pairs that
    fire on it, twice. Memory: the active pairs of both, 12 bytes each.
    """
    parts = [(active(a, x), active(b, x)) for x in rows if len(x)]
    acts_A, acts_B = (vstack(part, format="csr") for part in zip(*parts, strict=True)) if parts else (
        csr_array((0, sae.cfg.d_sae)) for sae in (a, b))
    return matches(acts_A, acts_B, named_A, named_B)


def active(sae: SAE, x_ND: np.ndarray) -> csr_array:
    """Activations [N, F] of raw rows as a sparse matrix on every host; only active ones leave the devices. topk gives its pairs
    without an array of rows x features.
    """
    size, of = (_ROWS, _listed) if sae.cfg.kind == "topk" else (max(1, _PIECE // sae.cfg.d_sae), _active)
    return vstack([of(sae, x_ND[start:start + size], size) for start in range(0, len(x_ND), size)], format="csr")


def matches(acts_A: csr_array, acts_B: csr_array, named_A: np.ndarray, named_B: np.ndarray) -> Firing:
    """`correlate` of activations [N, F_A] and [N, F_B], all above 0."""
    n, F_A, F_B = acts_A.shape[0], acts_A.shape[1], acts_B.shape[1]
    acts_A, acts_B = acts_A.astype(np.float64), acts_B.astype(np.float64)
    sums_A, spread_A = _moments(acts_A)
    sums_B, spread_B = _moments(acts_B)
    out = Firing(n, np.full(F_A, -1), np.full(F_A, np.nan), np.full(F_B, -1), np.full(F_B, np.nan), np.full(F_A, np.nan),
                 np.full(F_B, np.nan))
    if n == 0:
        return out
    by_feature = acts_A.T.tocsr()  # [F_A, N]
    for first, last in _blocks(by_feature, acts_B):
        cross, shared = _crossed(by_feature[first:last], acts_B)
        a, b = np.repeat(np.arange(first, last), np.diff(cross.indptr)), cross.indices
        r = _pearson(cross.data, sums_A[a], sums_B[b], spread_A[a], spread_B[b], n)
        enough = (shared >= LEAST_SUPPORT) & (r > 0)
        _keep(out.match_A, out.r_A, a[enough], b[enough], r[enough])
        _keep(out.match_B, out.r_B, b[enough], a[enough], r[enough])
        own = np.arange(first, last)
        out.pair_A[own] = _pearson(cross[own - first, named_A[own]], sums_A[own], sums_B[named_A[own]], spread_A[own],
                                   spread_B[named_A[own]], n)
        own = np.flatnonzero((named_B >= first) & (named_B < last))
        out.pair_B[own] = _pearson(cross[named_B[own] - first, own], sums_A[named_B[own]], sums_B[own], spread_A[named_B[own]],
                                   spread_B[own], n)
    return out


def _keep(match: np.ndarray, best: np.ndarray, of: np.ndarray, other: np.ndarray, r: np.ndarray) -> None:
    """Of pairs (of, other) the highest r of each `of` where it is above what is there; of equal ones the lowest number."""
    order = np.lexsort((other, -r, of))
    of, first = np.unique(of[order], return_index=True)
    other, r = other[order][first], r[order][first]
    better = ~(best[of] >= r)  # NaN: nothing there
    match[of[better]], best[of[better]] = other[better], r[better]


def _moments(acts: csr_array) -> tuple[np.ndarray, np.ndarray]:
    """(sum [F], square root of the sum of squares around the mean [F]); the latter NaN for a feature that never fired."""
    total, squares = (np.bincount(acts.indices, weights, acts.shape[1]) for weights in (acts.data, acts.data**2))
    spread = np.sqrt(np.maximum(squares - total**2 / max(acts.shape[0], 1), 0))
    return total, np.where(spread > 0, spread, np.nan)


def _pearson(cross, sum_a, sum_b, spread_a, spread_b, n: int) -> np.ndarray:
    return np.clip((np.asarray(cross) - sum_a * sum_b / n) / (spread_a * spread_b), -1, 1)


def _blocks(by_feature: csr_array, acts_B: csr_array) -> Iterable[tuple[int, int]]:
    """Consecutive features of A whose products with B are about `_PRODUCTS`, at least one feature each."""
    each_N = np.diff(acts_B.indptr)
    total = np.concatenate([[0], np.cumsum(each_N[by_feature.indices])])[by_feature.indptr]
    first, F = 0, by_feature.shape[0]
    while first < F:
        last = min(F, max(first + 1, int(np.searchsorted(total, total[first] + _PRODUCTS, "right")) - 1))
        yield first, last
        first = last


def _crossed(part: csr_array, acts_B: csr_array) -> tuple[csr_array, np.ndarray]:
    """S_ab [f, F_B] of the pairs that share a row, and the number of rows shared, in the same order."""
    cross = part @ acts_B
    shared = _ones(part) @ _ones(acts_B)
    for found in (cross, shared):
        found.sort_indices()
    return cross, shared.data


def _ones(acts: csr_array) -> csr_array:
    return csr_array((np.ones(acts.nnz), acts.indices, acts.indptr), acts.shape)


def _filled(x_ND: np.ndarray, size: int, parts: int = 1) -> np.ndarray:
    """With rows of zeros behind, in parts of equal size: few shapes, few programs."""
    N = len(x_ND)
    n = min(size, 1 << max(N - 1, 0).bit_length())
    return np.pad(x_ND, ((0, n + -n % parts - N), (0, 0)))


def _listed(sae: SAE, x_ND: np.ndarray, size: int) -> csr_array:
    """`_active` by the pair list: of every device lines of pairs, counted within its rows and features."""
    spec, norm, (data, shards) = sae.cfg.spec, sae.cfg.input_norm, (1, 1)
    if sae.mesh is None:
        pairs = _selected(spec, norm, sae.params, _filled(x_ND, size))
        value, index, row = map(np.asarray, (pairs.values_Ln, pairs.index_Ln, pairs.row_L))
    else:
        data, shards = sae.mesh.shape["data"], sae.mesh.shape["dict"]
        with jax.set_mesh(sae.mesh):
            x_BD = jax.device_put(_filled(x_ND, size, data), sharding.sharding(sae.mesh, "rows", None))
            pairs = _selected(spec, norm, sae.params, x_BD)
            value, index, row = map(sharding.to_host, (pairs.values_Ln, pairs.index_Ln, pairs.row_L))
    device = np.arange(len(row)) // (len(row) // (data * shards))
    row, first = row + device // shards * pairs.rows, device % shards * (spec.d_sae // shards)
    line, slot = np.nonzero((value > 0) & (row < len(x_ND))[:, None])
    return csr_array((value[line, slot], (row[line], index[line, slot] + first[line])), (len(x_ND), spec.d_sae))


_selected = jax.jit(selected_raw, static_argnums=(0, 1))


def _active(sae: SAE, x_ND: np.ndarray, size: int) -> csr_array:
    N = len(x_ND)
    acts_NF = sae.encode(_filled(x_ND, size))
    shards = 1 if sae.mesh is None else sae.mesh.shape["dict"]
    most = int(_most(acts_NF))
    room = min(acts_NF.shape[1] // shards, 1 << max(most - 1, 0).bit_length())
    if sae.mesh is None:
        value, feature = _taken(acts_NF, room)
    else:
        with jax.set_mesh(sae.mesh):
            value, feature = map(sharding.to_host, _taken_on_shards(acts_NF, room))
    value, feature = np.asarray(value), np.asarray(feature)
    row, slot = np.nonzero(value[:N] > 0)
    return csr_array((value[row, slot], (row, feature[row, slot])), (N, sae.cfg.d_sae))


@jax.jit
def _most(acts_NF: jax.Array) -> jax.Array:
    """The most active features of a row."""
    return (acts_NF > 0).sum(1, dtype=jnp.int32).max()


@functools.partial(jax.jit, static_argnums=1)
def _taken(acts_NF: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    return lax.top_k(acts_NF, n)


@functools.partial(jax.jit, static_argnums=1)
def _taken_on_shards(acts_NF: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """(value, feature) [N, shards * n]."""
    def local(acts_NF):
        value, feature = lax.top_k(acts_NF, n)
        return value, feature + acts_NF.shape[1] * lax.axis_index("dict")

    split = sharding.spec(None, "features")
    return jax.shard_map(local, in_specs=split, out_specs=(split, split), check_vma=False)(acts_NF)
