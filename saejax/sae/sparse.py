"""The sparse path of kinds with k: a batch's kept activations as (value, feature) pairs, so that decoding and all gradients cost
O(k) per row.

What stays dense is the encoder's product, O(F) per row, computed tile by tile: no array of B x F is in memory. Each row has room
for C pairs on each shard of the dictionary, the larger first; features are counted within the shard. Rounds of one pair for each
row follow each other, and end with the fullest row. Communication: that of the dense path (candidate values or counts, one
all-reduce of [B, D]).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from saejax import sharding
from saejax.sae.params import SAEParams, SAESpec
from saejax.sae.select import kept_per_row
from saejax.sae.select_batch import kept_over_batch

TILE = 2**24  # pre-activations in memory at once (64 MB)
ROOM = 4  # of a row where rows keep k on average (batchtopk), as a multiple of k
WORTH = {"cpu": 64}  # features of a shard for each pair of a row from which on this path is the faster one
WORTH_ELSEWHERE = 800
SAVED = "pairs"  # name of what a `jax.checkpoint` should keep, so that the encoder's product is not done again


@struct.dataclass
class Pairs:
    """values_CB: activations, float32, positive ones first (or not finite ones, which must not get lost), then 0. index_CB:
    features, int32, counted within the shard. count_SB: those that are not 0, of each row on each shard.
    """

    values_CB: jax.Array
    index_CB: jax.Array
    count_SB: jax.Array


def pays(spec: SAESpec, shards: int) -> bool:
    """Whether this path is the faster one: decided by features per kept feature on a shard, and by the hardware."""
    return spec.d_sae // shards >= WORTH.get(jax.default_backend(), WORTH_ELSEWHERE) * spec.k


_CB, _FD, _F = sharding.spec("features", "rows"), sharding.spec("features", None), sharding.spec("features")
_B, _BD, _GBD = sharding.spec("rows"), sharding.spec("rows", None), sharding.spec(None, "rows", None)
_PAIRS = Pairs(_CB, _CB, _CB)


def encode(spec: SAESpec, params: SAEParams, x_BD: jax.Array, k: int, threshold: jax.Array, *, over_batch: bool = False,
           allowed_F: jax.Array | None = None) -> tuple[Pairs, jax.Array, jax.Array]:
    """(`activations.topk` of the pre-activations as pairs, how many pre-activations of each row exceed `threshold` [B], whether
    pairs are missing). over_batch: `activations.batchtopk`; pairs are missing where a row keeps more than `ROOM` x k on a shard.
    allowed_F: the features that may be kept. Gradients flow from the values to the parameters, none to x.
    """
    bias_F = params.b_enc - params.W_enc @ params.b_dec if spec.pre_bias else params.b_enc
    allowed_F = jnp.ones_like(bias_F, bool) if allowed_F is None else allowed_F
    select = functools.partial(_select, k=k, over_batch=over_batch, dtype=jnp.dtype(spec.compute_dtype))
    *found, above_B, missing = _on_shards(select, (_FD, _F, _F, _BD, sharding.spec()), (_CB, _CB, _CB, _B, sharding.spec()))(
        *map(lax.stop_gradient, (params.W_enc, bias_F, allowed_F, x_BD, threshold)))
    pairs = Pairs(*(checkpoint_name(value, SAVED) for value in found))
    return pairs.replace(values_CB=_attached(params.W_enc, bias_F, x_BD, pairs)), above_B, missing


def decode(spec: SAESpec, params: SAEParams, pairs: Pairs) -> jax.Array:
    """recon[b] = sum_c values[c, b] W_dec[index[c, b]] + b_dec, float32 [B, d_out]. One all-reduce of [B, d_out] along `dict`."""
    return decode_groups(spec, params, pairs, (spec.d_sae,))[0]


def decode_groups(spec: SAESpec, params: SAEParams, pairs: Pairs, ends: tuple[int, ...]) -> jax.Array:
    """recon[g] = sum over pairs of features below ends[g], + b_dec, float32 [G, B, d_out]. One all-reduce of it along `dict`."""
    return jnp.cumsum(_decoded(jnp.dtype(spec.compute_dtype), ends, params.W_dec, pairs), axis=0) + params.b_dec


def fired(spec: SAESpec, pairs: Pairs) -> jax.Array:
    """Which features have a positive activation in the batch, bool [F]."""
    def local(values_CB, index_CB, shards):
        found_F = jnp.zeros(spec.d_sae // shards, jnp.int32).at[index_CB].max((values_CB > 0).astype(jnp.int32))
        return _over(lax.pmax, found_F, "data") > 0

    return _on_shards(local, (_CB, _CB), _F)(lax.stop_gradient(pairs.values_CB), pairs.index_CB)


def _on_shards(local: Callable, given, returned) -> Callable:
    """`local` on every device of the mesh, placed as said; it is told the number of shards of the dictionary.
    Where no mesh is set it is called as it is.
    """
    if not sharding.mesh_is_set():
        return functools.partial(local, shards=1)
    # No gradient passes through a shard_map here, so nothing is lost without check_vma, which loops would need help with.
    return jax.shard_map(lambda *values: local(*values, shards=lax.axis_size("dict")), in_specs=given, out_specs=returned,
                         check_vma=False)


def _over(reduce: Callable, value: jax.Array, *axes: str) -> jax.Array:
    """A reduction over axes of the mesh, where one is set."""
    return reduce(value, axes) if sharding.mesh_is_set() else value


def _select(W_enc, bias_F, allowed_F, x_BD, threshold, *, k: int, over_batch: bool, dtype, shards: int):
    W_enc, (B, F) = W_enc.astype(dtype), (len(x_BD), len(bias_F))

    def of_tile(x_TD: jax.Array):
        pre_TF = jnp.einsum("td,fd->tf", x_TD.astype(dtype), W_enc, preferred_element_type=jnp.float32) + bias_F
        pre_TF = jnp.where(allowed_F, pre_TF, -jnp.inf)
        values_TC, index_TC = lax.top_k(pre_TF, min(F, ROOM * k if over_batch else k))
        return values_TC, index_TC, (pre_TF > threshold).sum(1, dtype=jnp.int32)

    tiles = next(n for n in range(1, B + 1) if B % n == 0 and B // n * F <= max(TILE, F))
    values_BC, index_BC, above_B = (value.reshape(B, *value.shape[2:])
                                    for value in lax.map(of_tile, x_BD.reshape(tiles, B // tiles, -1)))
    kept_BC = (kept_over_batch if over_batch else kept_per_row)(values_BC, k, shards)
    last = lax.broadcasted_iota(jnp.int32, kept_BC.shape, 1) == kept_BC.shape[1] - 1
    missing = (kept_BC & last).any() & (over_batch and kept_BC.shape[1] < F)
    values_BC = jnp.where(kept_BC, jax.nn.relu(values_BC), 0.0)
    return (values_BC.T, index_BC.T, (values_BC != 0).sum(1, dtype=jnp.int32)[None], _over(lax.psum, above_B, "dict"),
            _over(lax.pmax, missing.astype(jnp.int32), "data", "dict") > 0)


@jax.custom_vjp
def _attached(W_enc, bias_F, x_BD, pairs: Pairs):
    """The values, as functions of W_enc and bias: values[c, b] = W_enc[index[c, b]] . x[b] + bias[index[c, b]]."""
    return pairs.values_CB


def _attached_backward(saved, gradient_CB):
    x_BD, bias_F, pairs = saved

    def local(gradient_CB, pairs, x_BD, bias_F, shards):
        gradient_CB = jnp.where(pairs.values_CB > 0, gradient_CB, 0.0)
        to_W = _scattered(gradient_CB, pairs, x_BD, None, len(bias_F))
        to_bias = jnp.zeros_like(bias_F).at[pairs.index_CB].add(gradient_CB)
        return tuple(_over(lax.psum, value, "data") for value in (to_W, to_bias))

    to_W, to_bias = _on_shards(local, (_CB, _PAIRS, _BD, _F), (_FD, _F))(gradient_CB, pairs, x_BD, bias_F)
    return to_W, to_bias, jnp.zeros_like(x_BD), None


_attached.defvjp(lambda W_enc, bias_F, x_BD, pairs: (pairs.values_CB, (x_BD, bias_F, pairs)), _attached_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _decoded(dtype, ends, W_dec, pairs: Pairs):
    """What the pairs of each group's features add up to, [G, B, d_out]."""
    def local(W_dec, pairs, shards):
        B = pairs.values_CB.shape[1]

        def add(c, recon_GBD):
            value_B, index_B = pairs.values_CB[c], pairs.index_CB[c]
            row_BD = _rounded(value_B, dtype)[:, None] * _rounded(W_dec[index_B], dtype)
            if len(ends) == 1:
                return recon_GBD + row_BD
            mine_GB = _groups(ends, index_B, len(W_dec)) == jnp.arange(len(ends))[:, None]
            return recon_GBD + jnp.where(mine_GB[:, :, None], row_BD, 0.0)

        start = jnp.zeros((len(ends), B, W_dec.shape[1]), jnp.float32)
        return _over(lax.psum, lax.fori_loop(0, sharding.most_of_members(pairs.count_SB.max()), add, start), "dict")

    return _on_shards(local, (_FD, _PAIRS), _GBD)(W_dec, pairs)


def _decoded_backward(dtype, ends, saved, gradient_GBD):
    def local(W_dec, pairs, gradient_GBD, shards):
        G, B, D = gradient_GBD.shape
        gradient_RD = _rounded(gradient_GBD.reshape(G * B, D), dtype)
        row_CB = _groups(ends, pairs.index_CB, len(W_dec)) * B + jnp.arange(B) if G > 1 else None

        def dot(c, to_values):
            gradient_BD = gradient_RD if G == 1 else gradient_RD[row_CB[c]]
            return to_values.at[c].set((gradient_BD * _rounded(W_dec[pairs.index_CB[c]], dtype)).sum(1))

        to_values = lax.fori_loop(0, sharding.most_of_members(pairs.count_SB.max()), dot, jnp.zeros_like(pairs.values_CB))
        to_W = _scattered(_rounded(pairs.values_CB, dtype), pairs, gradient_RD, row_CB, len(W_dec))
        return _over(lax.psum, to_W, "data"), to_values

    to_W, to_values = _on_shards(local, (_FD, _PAIRS, _GBD), (_FD, _CB))(*saved, gradient_GBD)
    return to_W, Pairs(to_values, None, None)


_decoded.defvjp(lambda dtype, ends, *values: (_decoded(dtype, ends, *values), values), _decoded_backward)


def _groups(ends: tuple[int, ...], index: jax.Array, features: int) -> jax.Array:
    """The group of each feature of this shard."""
    start = lax.axis_index("dict") * features if sharding.mesh_is_set() else 0
    return (index[..., None] + start >= jnp.asarray(ends[:-1])).sum(-1)


def _rounded(value: jax.Array, dtype) -> jax.Array:
    """What a product in `dtype` with float32 sums reads."""
    return value.astype(dtype).astype(jnp.float32)


def _scattered(scale_CB: jax.Array, pairs: Pairs, rows_RD: jax.Array, row_CB: jax.Array | None, features: int) -> jax.Array:
    """out[f] = sum over pairs of f of scale[c, b] rows[row[c, b]], [F, D] (row[c, b] = b where there is none); B pairs at a time,
    so that no [C, B, D] is in memory, and no longer than there are pairs.
    """
    C, B = scale_CB.shape
    count_B = pairs.count_SB[0]
    ends_B = jnp.cumsum(count_B)

    def add(s, out_FD):
        slot_B = s * B + jnp.arange(B)
        b = jnp.minimum(jnp.searchsorted(ends_B, slot_B, side="right"), B - 1)
        c = jnp.clip(slot_B - (ends_B - count_B)[b], 0, C - 1)
        scale_B = jnp.where(slot_B < ends_B[-1], scale_CB[c, b], 0.0)
        row_B = b if row_CB is None else row_CB[c, b]
        return out_FD.at[pairs.index_CB[c, b]].add(scale_B[:, None] * rows_RD[row_B])

    rounds = sharding.most_of_members(-(-ends_B[-1] // B))
    return lax.fori_loop(0, rounds, add, jnp.zeros((features, rows_RD.shape[1]), jnp.float32))
