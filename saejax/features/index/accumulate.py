"""The compiled step of an index: a batch of rows -> SAE -> positive activations as pairs -> state of every feature.

Kinds with k give their pairs at once (`saejax.sae.sparse`), the others tile by tile of a shard's features (`saejax.sae.tiles`):
no array of rows x features is in memory. Only `groupmax`, which is read and never trained, takes its activations as a whole.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from saejax.base import hardware, sharding
from saejax.base.errors import FeatureIndexError
from saejax.config.recipes import WITH_K
from saejax.features.index import state as st
from saejax.features.index.state import FeatureState, Pairs, Peaks
from saejax.sae import sparse, tiles
from saejax.sae.activations import activate
from saejax.sae.featurewise import LOSSES
from saejax.sae.inference import SAE, encode_raw, read_raw, selected_raw
from saejax.sae.model import bias
from saejax.sae.pairs import slots
from saejax.sae.products import product
from saejax.sae.select import largest

PAIRS_PER_ROW = 64  # of kinds without k: pairs of a row that are taken in one round, of all features of a shard
ROWS = 16_384       # of a batch, where its memory allows: adding it to the state costs the same for any number
MEMORY = 1 / 16     # of a chip's: what a batch may need
LEAST_PER_ROW = 4   # pairs of a row in a tile that are taken in one round
COUNTED = 2**30      # pairs and features times bins on a device: int32, and a bisection adds two of them
PAIR, PEAK = 64, 24  # bytes of a pair and of a feature's peak in a context, with what is made of them


def empty_state(features: int, mesh: Mesh) -> FeatureState:
    """The state of no rows, every device making its own part."""
    def local():
        return st.empty(features // mesh.shape["dict"])

    with jax.set_mesh(mesh):
        return jax.jit(jax.shard_map(local, in_specs=(), out_specs=st.specs(), check_vma=False))()


def make_step(sae: SAE, context: int, contexts: int) -> Callable:
    """step(state, params, x [B, D], keep [B], first row) -> state, for batches of `contexts` whole contexts. Call it where the
    SAE's mesh is set.

    Behind the encoder all work is on pairs (feature, row, value). Kinds with k give one list of them for a batch. Of others
    `PAIRS_PER_ROW` of a row are taken in a round (of a tile its share), and there are as many rounds as the fullest row asks for,
    so that none is lost. Communication: that of the selection; per round one all-gather of the pairs along `data`.
    """
    spec, norm = sae.cfg.spec, sae.cfg.input_norm

    def step(state, params, x_BD, keep_B, first_row):
        rows = sharding.spec("rows")
        if spec.kind in WITH_K:
            given = selected_raw(spec, norm, params, x_BD)
            local, placed = _of_pairs, sparse.placement(given)
        elif spec.kind in LOSSES:
            own, read_BD = params.replace(b_dec=None, W_dec=None, W_skip=None), read_raw(spec, norm, params, x_BD)
            given = own, bias(spec, params), read_BD
            local = functools.partial(_of_tiles, spec=spec, size=tiles.tile_here(spec, read_BD))
            placed = tiles.placement(own), sharding.spec("features"), sharding.spec("rows", None)
        else:
            given, local, placed = encode_raw(spec, norm, params, x_BD), _of_acts, sharding.spec("rows", "features")
        local = functools.partial(local, context=context, contexts=contexts)
        return jax.shard_map(local, mesh=sae.mesh, in_specs=(st.specs(), rows, sharding.spec(), placed), out_specs=st.specs(),
                             check_vma=False)(state, keep_B, first_row, given)

    return jax.jit(step, donate_argnums=0)


def _of_pairs(state, keep_B, first_row, listed, *, context: int, contexts: int) -> FeatureState:
    """The state with a batch whose pairs are `listed`."""
    value_Ln = jnp.where(keep_B[listed.row_L][:, None], listed.values_Ln, 0.0)
    row_Ln = jnp.broadcast_to(_rows(keep_B, first_row)[listed.row_L][:, None], value_Ln.shape)
    add = functools.partial(_added, number_F=_numbers(len(state.max)), first_row=first_row, context=context)
    return st.topped(*add(state, Peaks.none(len(state.max), contexts), value_Ln, listed.index_Ln, row_Ln))


def _of_tiles(state, keep_B, first_row, given, *, spec, size: int, context: int, contexts: int) -> FeatureState:
    """The state with a batch of rows, each tile's features with their own part of it."""
    own, bias_F, read_BD = given
    F = len(bias_F)
    number_F = _numbers(F)

    def of(state, tile: tiles.Tile):
        own_T, bias_T, number_T, state_T = tile.of((own, bias_F, number_F, state))
        acts_BT = activate(spec, own_T, product("bd,fd->bf", read_BD, own_T.W_enc, jnp.dtype(spec.compute_dtype)) + bias_T)
        per_row = min(PAIRS_PER_ROW, max(LEAST_PER_ROW, -(-PAIRS_PER_ROW * tile.size // F)))
        return tile.put(state, _in_rounds(state_T, keep_B, first_row, acts_BT, number_T, per_row, context, contexts))

    return tiles.each(size, of, state, F)


def _of_acts(state, keep_B, first_row, acts_BF, *, context: int, contexts: int) -> FeatureState:
    """The state with a batch of which all activations are there."""
    return _in_rounds(state, keep_B, first_row, acts_BF, _numbers(len(state.max)), PAIRS_PER_ROW, context, contexts)


def _in_rounds(state, keep_B, first_row, acts_BF, number_F, per_row: int, context: int, contexts: int) -> FeatureState:
    B, F = acts_BF.shape
    per_row, row_B = min(per_row, F), _rows(keep_B, first_row)
    acts_BF = jnp.where(keep_B[:, None], acts_BF, 0.0)

    def round_(carry):
        state, peaks, acts_BF, left = carry
        value_BK, index_BK = largest(acts_BF, per_row)
        row_BK = jnp.broadcast_to(row_B[:, None], value_BK.shape)
        state, peaks = _added(state, peaks, value_BK, index_BK, row_BK, number_F=number_F, first_row=first_row, context=context)
        return state, peaks, acts_BF.at[jnp.arange(B)[:, None], index_BK].set(0.0), left - 1

    most = (acts_BF > 0).sum(1, dtype=jnp.int32).max()
    rounds = lax.pmax(-(-most // per_row), ("data", "dict"))  # equal everywhere: the rounds communicate
    carry = state, Peaks.none(F, contexts), acts_BF, rounds
    return st.topped(*lax.while_loop(lambda carry: carry[3] > 0, round_, carry)[:2])


def _added(state, peaks, value, index, row, *, number_F, first_row, context: int) -> tuple[FeatureState, Peaks]:
    """With the pairs of all devices along `data`; index: of features within the shard or tile, whose numbers are `number_F`."""
    feature = jnp.where(value > 0, index, len(number_F))
    value_P, feature_P, row_P = (lax.all_gather(x.reshape(-1), "data", tiled=True) for x in (value, feature, row))
    pairs = Pairs(feature_P, value_P, row_P, number_F)
    return st.updated(state, pairs), peaks.raised(pairs, first_row, context)


def _rows(keep_B, first_row):
    """The numbers of a device's rows."""
    B = len(keep_B)
    return first_row + (jnp.arange(B) + B * lax.axis_index("data")).astype(jnp.uint32)


def _numbers(F: int):
    """The numbers of a shard's features in the whole dictionary."""
    return jnp.arange(F, dtype=jnp.int32) + F * lax.axis_index("dict")


def pairs_per_row(sae: SAE) -> int:
    """Places for pairs on a device that a row of a batch brings, once those of all devices along `data` are there: for batchtopk
    every device has room for what the whole batch keeps.
    """
    spec, mesh = sae.cfg.spec, sae.mesh
    if spec.kind not in WITH_K:
        return PAIRS_PER_ROW
    unfilled = slots(spec.k, mesh.shape["dict"]) - 1
    if spec.kind == "topk":
        return spec.k + (unfilled if mesh.shape["dict"] > 1 else 0)
    return 1 + unfilled + min(spec.d_sae // mesh.shape["dict"], spec.k * mesh.shape["data"])


def batch_contexts(sae: SAE, context: int, contexts: int, rows: int = ROWS) -> int:
    """Contexts of a batch: about `rows` rows, fewer where a device would need more than its share `MEMORY` for their pairs, the
    peaks of every feature in every context, and the rows themselves, or could not count them; whole per `data` shard, no more
    than there are `contexts`. Raises `FeatureIndexError` where it cannot count the pairs of the smallest batch, or its features.
    """
    spec, data, width = sae.cfg.spec, sae.mesh.shape["data"], sae.cfg.d_sae // sae.mesh.shape["dict"]
    pairs = pairs_per_row(sae) * context  # of a context
    if width * st.SAMPLE_BINS > COUNTED:
        raise FeatureIndexError(f"{width} features on a device: an index holds at most {COUNTED // st.SAMPLE_BINS} there; split "
                                f"them further (config.mesh.dict={sae.mesh.shape['dict']})")
    if pairs * data > COUNTED:
        raise FeatureIndexError(f"{data} contexts of {context} tokens, one for each of config.mesh.data={data}, may have "
                                f"{pairs * data} active features (k={spec.k}), an index counts up to {COUNTED} in a batch; index "
                                "shorter contexts, or use fewer devices along data")
    row = PAIR * pairs_per_row(sae) + 8 * spec.d_in // data
    if spec.kind not in WITH_K and spec.kind not in LOSSES:
        row += 8 * width // data
    room = MEMORY * hardware.chip_of(sae.mesh.devices.flat[0]).memory
    most = min(rows // context, int(room // (row * context + PEAK * width)), contexts + -contexts % data, COUNTED // pairs)
    return max(1, most // data) * data
