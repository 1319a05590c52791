"""The compiled step of an index: a batch of rows -> SAE -> positive activations as pairs -> state of every feature."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from saejax.base import sharding
from saejax.config.recipes import WITH_K
from saejax.features.index import state as st
from saejax.features.index.state import FeatureState, Pairs, Peaks
from saejax.sae.inference import SAE, encode_raw

PAIRS_PER_ROW = 64  # of kinds without k: pairs of a row that are taken in one round


def empty_state(features: int, mesh: Mesh) -> FeatureState:
    """The state of no rows, every device making its own part."""
    def local():
        return st.empty(features // mesh.shape["dict"])

    with jax.set_mesh(mesh):
        return jax.jit(jax.shard_map(local, in_specs=(), out_specs=st.specs(), check_vma=False))()


@functools.cache
def merger(mesh: Mesh) -> Callable[[FeatureState, FeatureState], FeatureState]:
    """`state.merge` on a mesh; no communication."""
    return jax.jit(jax.shard_map(st.merge, mesh=mesh, in_specs=(st.specs(), st.specs()), out_specs=st.specs(), check_vma=False))


def make_step(sae: SAE, context: int, contexts: int) -> Callable:
    """step(state, params, x [B, D], keep [B], first row) -> state, for batches of `contexts` whole contexts.

    Beyond the encoder it reads the activations [B, F] once, for the largest of each row; all else works on pairs (feature, row,
    value). Kinds with k have at most k of them; of others `PAIRS_PER_ROW` are taken in a round, and there are as many rounds as
    the fullest row asks for, so that none is lost. Communication: per round one all-gather of the pairs along `data`.
    """
    spec, mesh = sae.cfg.spec, sae.mesh
    exact = spec.kind in WITH_K
    per_row = min(spec.k if exact else PAIRS_PER_ROW, spec.d_sae // mesh.shape["dict"])
    local = functools.partial(_local, per_row=per_row, exact=exact, context=context, contexts=contexts)
    rows = sharding.spec("rows")
    gathered = jax.shard_map(local, mesh=mesh, in_specs=(st.specs(), sharding.spec("rows", "features"), rows, sharding.spec()),
                             out_specs=st.specs(), check_vma=False)

    def step(state, params, x_BD, keep_B, first_row):
        return gathered(state, encode_raw(spec, sae.cfg.input_norm, params, x_BD), keep_B, first_row)

    return jax.jit(step, donate_argnums=0)


def _local(state, acts_BF, keep_B, first_row, *, per_row: int, exact: bool, context: int, contexts: int):
    B, F = acts_BF.shape
    row_B = first_row + (jnp.arange(B) + B * lax.axis_index("data")).astype(jnp.uint32)
    number_F = jnp.arange(F, dtype=jnp.int32) + F * lax.axis_index("dict")
    acts_BF = jnp.where(keep_B[:, None], acts_BF, 0.0)

    def add(state, peaks, acts_BF):
        value_BK, index_BK = lax.top_k(acts_BF, per_row)
        row_BK = jnp.broadcast_to(row_B[:, None], value_BK.shape)
        feature_BK = jnp.where(value_BK > 0, index_BK, F)
        value_P, feature_P, row_P = (lax.all_gather(x.reshape(-1), "data", tiled=True) for x in (value_BK, feature_BK, row_BK))
        pairs = Pairs(feature_P, value_P, row_P, number_F)
        return st.updated(state, pairs), peaks.raised(pairs, first_row, context), index_BK

    def round_(carry):
        state, peaks, acts_BF, left = carry
        state, peaks, index_BK = add(state, peaks, acts_BF)
        return state, peaks, acts_BF.at[jnp.arange(B)[:, None], index_BK].set(0.0), left - 1

    peaks = Peaks.none(F, contexts)
    if exact:
        return st.topped(*add(state, peaks, acts_BF)[:2])
    most = (acts_BF > 0).sum(1, dtype=jnp.int32).max()
    rounds = lax.pmax(-(-most // per_row), ("data", "dict"))  # equal everywhere: the rounds communicate
    return st.topped(*lax.while_loop(lambda carry: carry[3] > 0, round_, (state, peaks, acts_BF, rounds))[:2])


def batch_contexts(mesh: Mesh, context: int, features: int, rows: int = 4096, elements: int = 1 << 28) -> int:
    """Contexts of a batch: about `rows` rows, fewer where [B, F] would pass `elements` on a device; whole per `data` shard."""
    data = mesh.shape["data"]
    most = min(rows, max(1, elements * mesh.size // features))
    return max(1, most // context // data) * data
