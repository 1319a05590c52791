"""What an SAE makes of a batch, without an array of rows x features: reconstruction, features per row, how often each fired.

Kinds without k go tile by tile through a shard's features (`saejax.sae.tiles`), kinds with k through the pairs that are kept
(`saejax.sae.sparse`). Only `groupmax`, which is read and never trained, takes its activations as a whole.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from saejax.base import sharding
from saejax.config.recipes import WITH_K
from saejax.sae import pairs as lists
from saejax.sae import sparse, tiles
from saejax.sae.activations import activate
from saejax.sae.featurewise import LOSSES
from saejax.sae.model import bias, decode, encode, read, skipped
from saejax.sae.params import SAEParams, SAESpec
from saejax.sae.products import product

_F, _B, _FD, _BD = (sharding.spec(*axes) for axes in (("features",), ("rows",), ("features", None), ("rows", None)))
_REST = sharding.spec("rows_at_rest", None)


@struct.dataclass
class Measured:
    """recon_BD: float32. l0_B: active features of each row. fired_F: in how many of the counted rows each feature is active,
    split over `dict`. Both int32. Rows are at rest.
    """

    recon_BD: jax.Array
    l0_B: jax.Array
    fired_F: jax.Array


def measured(spec: SAESpec, params: SAEParams, x_BD: jax.Array, counted_B: jax.Array) -> Measured:
    """Of rows at rest, in the units of the parameters. Communication along `dict`: one all-gather of the rows, one reduce-scatter
    of the reconstruction, the selection's; along `data` one all-reduce of fired_F.
    """
    read_BD = sharding.gathered(read(spec, params, x_BD))
    counted_B = jax.sharding.reshard(counted_B, _B) if sharding.mesh_is_set() else counted_B
    of = _by_tiles if spec.kind in LOSSES else _by_pairs if spec.kind in WITH_K else _whole
    found = of(spec, params, read_BD, counted_B)
    l0_B = jax.sharding.reshard(found.l0_B, sharding.spec("rows_at_rest")) if sharding.mesh_is_set() else found.l0_B
    return found.replace(recon_BD=found.recon_BD + params.b_dec + skipped(spec, params, x_BD), l0_B=l0_B)


def _by_tiles(spec: SAESpec, params: SAEParams, read_BD: jax.Array, counted_B: jax.Array) -> Measured:
    size, dtype = tiles.tile_here(spec, read_BD), jnp.dtype(spec.compute_dtype)
    own = params.replace(b_dec=None, W_skip=None)

    def local(own, bias_F, read_BD, counted_B, shards):
        def of(found: Measured, tile: tiles.Tile) -> Measured:
            own_T, bias_T = tile.of((own, bias_F))
            acts_BT = activate(spec, own_T, product("bd,fd->bf", read_BD, own_T.W_enc, dtype) + bias_T)
            active_BT = acts_BT > 0
            fired_T = (active_BT & counted_B[:, None]).sum(0, dtype=jnp.int32)
            return Measured(found.recon_BD + product("bf,fd->bd", acts_BT, own_T.W_dec, dtype),
                            found.l0_B + active_BT.sum(1, dtype=jnp.int32), tile.put(found.fired_F, fired_T))

        rows, width = len(read_BD), len(bias_F)
        none = Measured(jnp.zeros((rows, own.W_dec.shape[1])), *(jnp.zeros(n, jnp.int32) for n in (rows, width)))
        return _summed(tiles.each(size, of, none, width), dtype, shards)

    placed = (tiles.placement(own), _F, _BD, _B)
    return sharding.on_shards(local, placed, Measured(_REST, _B, _F))(own, bias(spec, params), read_BD, counted_B)


def _by_pairs(spec: SAESpec, params: SAEParams, read_BD: jax.Array, counted_B: jax.Array) -> Measured:
    pairs = sparse.selected(spec, params, read_BD, spec.k, over_batch=spec.kind == "batchtopk")
    dtype = jnp.dtype(spec.compute_dtype)

    def local(W_dec, pairs, counted_B, shards):
        recon_BD = lists.decoded(dtype, W_dec, pairs, (spec.d_sae,))[0]
        l0_B, fired_F = lists.counts(pairs, len(W_dec), counted_B)
        return _summed(Measured(recon_BD, l0_B, fired_F), dtype, shards)

    return sharding.on_shards(local, (_FD, sparse.placement(pairs), _B), Measured(_REST, _B, _F))(params.W_dec, pairs, counted_B)


def _summed(found: Measured, dtype, shards: int) -> Measured:
    """Over the devices."""
    return Measured(sharding.scattered(found.recon_BD, dtype) if shards > 1 else found.recon_BD,
                    sharding.over(lax.psum, found.l0_B, "dict"), sharding.over(lax.psum, found.fired_F, "data"))


def _whole(spec: SAESpec, params: SAEParams, read_BD: jax.Array, counted_B: jax.Array) -> Measured:
    plain = SAEParams(params.W_enc, params.b_enc, params.W_dec, jnp.zeros_like(params.b_dec), per_feature=params.per_feature)
    acts_BF = encode(spec, plain, read_BD)
    recon_BD = decode(spec, plain, acts_BF)
    recon_BD = jax.sharding.reshard(recon_BD, _REST) if sharding.mesh_is_set() else recon_BD
    return Measured(recon_BD, (acts_BF > 0).sum(1, dtype=jnp.int32), ((acts_BF > 0) & counted_B[:, None]).sum(0, dtype=jnp.int32))
