"""Activations of given features at given rows of a batch, without an array of rows x features.

Kinds with k: a feature's activation counts only where it is among the k largest, so it is looked up in the pairs of the row.
Kinds without k: the products of the rows with the feature's encoder row. `groupmax` takes its activations as a whole.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from saejax.base import sharding
from saejax.config.recipes import WITH_K
from saejax.sae import SAEParams, SAESpec, tiles
from saejax.sae.activations import activate
from saejax.sae.featurewise import LOSSES
from saejax.sae.inference import SAE, encode_raw, read_raw, selected_raw
from saejax.sae.model import bias
from saejax.sae.pairs import Pairs
from saejax.sae.products import product
from saejax.sae.sparse import placement

_AT_ONCE = 2**24  # numbers of rows that are gathered at once


@struct.dataclass
class _Sorted:
    """A device's pairs by row and feature. start_B1: where those of a row begin, and at last where all end. most: of a row."""

    feature_P: jax.Array
    value_P: jax.Array
    start_B1: jax.Array
    most: int = struct.field(pytree_node=False)

    @classmethod
    def of(cls, pairs: Pairs, most: int) -> "_Sorted":
        row_Ln = jnp.where(pairs.values_Ln > 0, pairs.row_L[:, None], pairs.rows)
        given = (value.reshape(-1) for value in (row_Ln, pairs.index_Ln, pairs.values_Ln))
        row_P, feature_P, value_P = lax.sort(tuple(given), num_keys=2)
        return cls(feature_P, value_P, jnp.searchsorted(row_P, jnp.arange(pairs.rows + 1)).astype(jnp.int32), most)

    def at(self, row: jax.Array, feature: jax.Array) -> jax.Array:
        """By bisection of the row's pairs."""
        low, end = self.start_B1[row], self.start_B1[row + 1]

        def halved(_, ends):
            low, high = ends
            middle = (low + high) // 2
            less = (low < high) & (self.feature_P[middle] < feature)
            return jnp.where(less, middle + 1, low), jnp.where(less, high, middle)

        low, _ = lax.fori_loop(0, self.most.bit_length(), halved, (low, end))
        return jnp.where((low < end) & (self.feature_P[low] == feature), self.value_P[low], 0.0)


@dataclass(frozen=True)
class Lookup:
    """prepare(params, x [B, D]) -> table; gather(params, table, keep [B], row [E], feature [E]) -> [E, window], a feature's
    activations from a row on; 0 at masked rows, all 0 where there is no such feature. E is a power of two. Call both where the
    SAE's mesh is set.

    Every device looks up what lies on it; one all-reduce of [E, window] puts it together. It is the less work the more
    neighbouring examples lie on one device: those that are sorted by feature.
    """

    prepare: Callable
    gather: Callable

    @classmethod
    def of(cls, sae: SAE, window: int) -> "Lookup":
        spec, norm, mesh = sae.cfg.spec, sae.cfg.input_norm, sae.mesh
        features = spec.d_sae // mesh.shape["dict"]
        where = _where(spec)

        def prepare(params, x_BD):
            if spec.kind not in WITH_K:
                return (read_raw if spec.kind in LOSSES else encode_raw)(spec, norm, params, x_BD)
            pairs = selected_raw(spec, norm, params, x_BD)
            most = min(features, spec.k if spec.kind == "topk" else features)
            local = functools.partial(_Sorted.of, most=most)
            return jax.shard_map(local, mesh=mesh, in_specs=(placement(pairs),), out_specs=where, check_vma=False)(pairs)

        def gather(params, table, keep_B, row_E, feature_E):
            own = params.replace(b_dec=None, W_dec=None, W_skip=None)
            whole = sharding.spec()
            local = functools.partial(_gathered, spec=spec, window=window)
            return jax.shard_map(local, mesh=mesh, out_specs=whole, check_vma=False, in_specs=(
                tiles.placement(own), sharding.spec("features"), where, sharding.spec("rows"), whole, whole))(
                own, bias(spec, params), table, keep_B, row_E, feature_E)

        return cls(jax.jit(prepare), jax.jit(gather))


def _where(spec: SAESpec) -> Any:
    """Where a table lies."""
    if spec.kind in WITH_K:
        return sharding.spec("rows_at_rest")
    return sharding.spec("rows", None if spec.kind in LOSSES else "features")


def _gathered(own, bias_F, table, keep_B, row_E, feature_E, *, spec: SAESpec, window: int) -> jax.Array:
    B, F = len(keep_B), len(bias_F)
    size = _AT_ONCE // (window * (spec.d_in if spec.kind in LOSSES else 1))
    size = min(len(row_E), 1 << max(0, size.bit_length() - 1))

    def some(given):
        row_E, feature_E = given
        row_EW = row_E[:, None] + jnp.arange(window) - B * lax.axis_index("data")
        feature_E = feature_E - F * lax.axis_index("dict")
        here_EW = (row_EW >= 0) & (row_EW < B) & ((feature_E >= 0) & (feature_E < F))[:, None]
        at_EW, of_E = jnp.clip(row_EW, 0, B - 1), jnp.clip(feature_E, 0, F - 1)
        here_EW &= keep_B[at_EW]
        return lax.cond(here_EW.any(), lambda: jnp.where(here_EW, _values(spec, own, bias_F, table, at_EW, of_E), 0.0),
                        lambda: jnp.zeros(here_EW.shape, jnp.float32))

    parts = lax.map(some, (row_E.reshape(-1, size), feature_E.reshape(-1, size)))
    return lax.psum(parts.reshape(-1, window), ("data", "dict"))


def _values(spec: SAESpec, own: SAEParams, bias_F, table, at_EW, of_E) -> jax.Array:
    """Activations [E, window] of features `of_E` at rows `at_EW` of a device."""
    if spec.kind in WITH_K:
        return table.at(at_EW, of_E[:, None])
    if spec.kind not in LOSSES:
        return table[at_EW, of_E[:, None]]
    own_E, bias_E = jax.tree.map(lambda value: value[of_E], (own, bias_F))
    pre_WE = product("ewd,ed->we", table[at_EW], own_E.W_enc, jnp.dtype(spec.compute_dtype)) + bias_E
    return activate(spec, own_E, pre_WE).T
