"""Features near a feature: by the direction of the decoder, and by firing together."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from scipy.sparse import csr_array

from saejax.base import sharding
from saejax.base.errors import FeatureIndexError
from saejax.features.index.bits import EMPTY, row_key

LEAST_SUPPORT = 3  # shared rows in the samples below which two features are not called correlated
AUTO, ALL, SAMPLE, NONE = CHOICES = "auto", "all", "sample", "none"  # whose neighbours by decoder an index has
UP_TO, SAMPLED = 131_072, 16_384  # auto: of all features up to so many, else of so many of them


def resolved(choice: str, features: int) -> str:
    """What `auto` means for so many features: F^2 cosines take too long for a large dictionary."""
    if choice not in CHOICES:
        raise FeatureIndexError(f"neighbours={choice!r}: choose {', '.join(CHOICES)}")
    return choice if choice != AUTO else ALL if features <= UP_TO else SAMPLE


def chosen(choice: str, fired_F: np.ndarray) -> np.ndarray:
    """bool [F]: whose neighbours are found. Of a sample, of those that fire, the ones with the least hash of their number."""
    alive = np.flatnonzero(fired_F)
    found_F = np.full(len(fired_F), choice == ALL)
    if choice == SAMPLE:
        found_F[alive[np.argsort(row_key(alive.astype(np.uint32)), kind="stable")[:SAMPLED]]] = True
    return found_F


def nearest(directions_FD: jax.Array, queries: np.ndarray, n: int, mesh: Mesh | None, *, own: np.ndarray | None = None,
            block: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """(feature [Q, n], cosine [Q, n]) of the n rows of `directions_FD` nearest to each query [Q, D], nearest first.

    directions_FD: split by feature over `dict` of the mesh; None: on one device. own: row numbers of the queries, which are left
    out of their own list.
    A block of queries meets each shard's rows, [block, F / dict] cosines per device, and only n candidates of each shard are
    gathered along `dict`: no array of width F moves. Rows of zeros have cosine 0.
    """
    F = directions_FD.shape[0]
    n = min(n, F - 1 if own is not None else F)
    if n < 1:
        raise FeatureIndexError(f"{F} features: a feature has no neighbours; use a dictionary of several")
    queries = np.asarray(queries, np.float32)
    own = np.full(len(queries), -1) if own is None else np.asarray(own)
    found = []
    if mesh is None:
        mesh = sharding.single_device_mesh(next(iter(directions_FD.devices())))
        directions_FD = jax.device_put(directions_FD, sharding.sharding(mesh, "features", None))
    with jax.set_mesh(mesh):
        for start in range(0, len(queries), block):
            part, mine = queries[start:start + block], own[start:start + block]
            room = block - len(part)
            where = np.pad(part, ((0, room), (0, 0))), np.pad(mine, (0, room)).astype(np.int32)
            found.append([np.asarray(x)[:len(part)] for x in jax.device_get(_nearest(directions_FD, *where, n=n))])
    return tuple(np.concatenate(column) for column in zip(*found, strict=True))


@functools.partial(jax.jit, static_argnames="n")
def _nearest(directions_FD, queries_QD, own_Q, *, n: int):
    def local(rows_FD, queries_QD, own_Q):
        return _highest(jnp.where(_numbers(len(rows_FD)) == own_Q[:, None], -jnp.inf, _cosines(queries_QD, rows_FD)), n)

    return jax.shard_map(local, in_specs=(sharding.spec("features", None), sharding.spec(), sharding.spec()),
                         out_specs=(sharding.spec(), sharding.spec()), check_vma=False)(directions_FD, queries_QD, own_Q)


def _numbers(F: int):
    """Of a shard's F rows in the whole."""
    return jnp.arange(F, dtype=jnp.int32) + F * lax.axis_index("dict")


def _highest(cosine_QF, n: int):
    """(row [Q, n], cosine [Q, n]) of all shards; n candidates of each are gathered."""
    F = cosine_QF.shape[1]
    value_QN, index_QN = lax.top_k(cosine_QF, min(n, F))
    value, index = (lax.all_gather(x, "dict", axis=1, tiled=True) for x in (value_QN, _numbers(F)[index_QN]))
    value, place = lax.top_k(value, n)
    return jnp.take_along_axis(index, place, axis=1), value


def _cosines(queries_QD, rows_FD):
    return jnp.einsum("qd,fd->qf", _unit(queries_QD), _unit(rows_FD), precision="highest")


def _unit(rows):
    rows = rows.astype(jnp.float32)
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny)


def nearest_both_ways(directions_FD: jax.Array, blocks: Iterable[np.ndarray], mesh: Mesh | None, *, block: int = 256,
                      ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(row [Q], cosine [Q], query [F], cosine [F]): of each query the nearest row of `directions_FD`, and of each row the nearest
    query, in one pass over their cosines. Of equal ones the first.

    blocks: the queries [Q, D], in pieces. directions_FD, mesh: as in `nearest`; what is known of a row stays on its shard, so
    that the way back adds no communication.
    """
    if mesh is None:
        mesh = sharding.single_device_mesh(next(iter(directions_FD.devices())))
        directions_FD = jax.device_put(directions_FD, sharding.sharding(mesh, "features", None))
    F, found, first = directions_FD.shape[0], [], 0
    best = [sharding.place(np.full(F, fill, dtype), sharding.sharding(mesh, "features"))
            for fill, dtype in ((0, np.int32), (-np.inf, np.float32))]
    for queries in blocks:  # made where no mesh is set: they may come from another one
        for start in range(0, len(queries), block):
            part = np.asarray(queries[start:start + block], np.float32)
            padded = np.pad(part, ((0, block - len(part)), (0, 0)))
            with jax.set_mesh(mesh):
                *of_queries, best = _both_ways(directions_FD, padded, *best, np.int32(first), np.int32(len(part)))
            found.append([np.asarray(x)[:len(part), 0] for x in jax.device_get(of_queries)])
            first += len(part)
    of_rows = [sharding.to_host(x) for x in best]
    return (*(np.concatenate(column) for column in zip(*found, strict=True)), *of_rows)


@functools.partial(jax.jit, donate_argnums=(2, 3))
def _both_ways(directions_FD, queries_QD, query_F, cosine_F, first, count):
    """(row [Q, 1], cosine [Q, 1], (query [F], cosine [F])): the last two gone on with. first: number of a query."""
    def local(rows_FD, queries_QD, query_F, cosine_F, first, count):
        cosine_QF = _cosines(queries_QD, rows_FD)

        def step(best, row):  # a running maximum: twice as fast on a CPU as `max` along this axis, and the index comes with it
            query_F, cosine_F = best
            number, now_F = row
            better_F = (now_F > cosine_F) & (number < count)
            return (jnp.where(better_F, first + number, query_F), jnp.where(better_F, now_F, cosine_F)), None

        numbers = jnp.arange(len(queries_QD), dtype=jnp.int32)
        best, _ = lax.scan(step, (query_F, cosine_F), (numbers, cosine_QF), unroll=8)
        return *_highest(cosine_QF, 1), best

    whole, split = sharding.spec(), sharding.spec("features")
    return jax.shard_map(local, in_specs=(sharding.spec("features", None), whole, split, split, whole, whole),
                         out_specs=(whole, whole, (split, split)), check_vma=False)(
        directions_FD, queries_QD, query_F, cosine_F, first, count)


class Coactivation:
    """Which features fire together, estimated from coordinated samples: the 64 rows with the least hash of each feature.

    As the hash is of the row alone, two features that fire on the same rows sampled the same rows. Of the rarer feature i those
    sampled rows count that are below the bound up to which the sample of j is complete; the share of them in j's sample
    estimates P(j | i). phi = (n_ij N - n_i n_j) / sqrt(n_i (N - n_i) n_j (N - n_j)), the Pearson correlation of firing, with
    exact n_i, n_j. Shared rows below `LEAST_SUPPORT` are no evidence; so j may fire at most some 20 times as often as i, and a
    phi above 0.22 is within reach of every pair. Memory: 64 rows a feature, whatever F and N.
    """

    def __init__(self, sketch_FS: np.ndarray, fired_F: np.ndarray, rows: int):
        self._sketch, self._fired, self._rows = np.asarray(sketch_FS), np.asarray(fired_F, np.float64), float(rows)
        self._bound = self._sketch[:, -1]  # EMPTY: all rows of the feature are sampled
        there = self._sketch != EMPTY
        pair_P = self._sketch[there].astype(np.uint64)
        pair_P <<= np.uint64(32)
        pair_P |= np.repeat(np.arange(len(there), dtype=np.uint32), there.sum(1))
        pair_P.sort()  # by key, then by feature
        feature_P, key_P = pair_P.view("<u4").reshape(-1, 2).T
        border_K = np.concatenate([[0], 1 + np.flatnonzero(key_P[1:] != key_P[:-1]), [len(key_P)]][len(key_P) == 0:])
        self._keys = key_P[border_K[:-1]]
        self._features_KF = csr_array((np.ones(len(pair_P), np.int8), feature_P.astype(np.int32), border_K),
                                      shape=(len(self._keys), len(there)))

    def of(self, first: int, last: int, n: int) -> tuple[np.ndarray, ...]:
        """(how many of each feature [last - first]; feature, phi, shared sampled rows): of features first .. last - 1 those with
        the highest phi > 0, falling, at most n each.
        """
        keys_S = self._sketch[first:last]
        there = keys_S != EMPTY
        begin = np.concatenate([[0], np.cumsum(there.sum(1))])
        rows = csr_array((np.ones(begin[-1], np.int8), np.searchsorted(self._keys, keys_S[there]), begin),
                         shape=(last - first, len(self._keys)))
        shared = rows @ self._features_KF  # counts up to 64: of all pairs of features that share a row
        a, b = np.repeat(np.arange(first, last), np.diff(shared.indptr)), shared.indices
        enough = (shared.data >= LEAST_SUPPORT) & (a != b)
        a, b, shared = a[enough], b[enough].astype(np.int64), shared.data[enough].astype(np.int64)
        phi = self._phi(a, b, shared)
        order = np.lexsort((b, -phi, a))
        order = order[phi[order] > 0]
        a = a[order]
        best = np.arange(len(a)) - np.searchsorted(a, a) < n
        order, count_F = order[best], np.bincount(a[best] - first, minlength=last - first)
        return count_F, b[order], np.minimum(phi[order], 1.0), shared[order]

    def _phi(self, a: np.ndarray, b: np.ndarray, shared: np.ndarray) -> np.ndarray:
        rare = np.where(self._bound[a] >= self._bound[b], a, b)
        bound = np.minimum(self._bound[a], self._bound[b])
        usable = (self._sketch[rare] <= bound[:, None]).sum(1) - (bound == EMPTY) * (self._sketch[rare] == EMPTY).sum(1)
        both = np.minimum(shared / np.maximum(usable, 1), 1.0) * self._fired[rare]
        n_a, n_b, N = self._fired[a], self._fired[b], self._rows
        spread = np.sqrt(n_a * (N - n_a) * n_b * (N - n_b))
        return np.divide(both * N - n_a * n_b, spread, out=np.zeros(len(a)), where=spread > 0)
