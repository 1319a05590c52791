"""What the objectives of all kinds share: what they read, what they report, error measures and AuxK."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from saejax.base import sharding
from saejax.sae import sparse
from saejax.sae.activations import topk
from saejax.sae.model import bias, pre_activations_of
from saejax.sae.params import SAEParams, SAESpec
from saejax.sae.prefixes import decode_at_rest
from saejax.sae.select import UpTo


@struct.dataclass
class LossInputs:
    """What an objective reads besides params and batch.

    sparsity: lambda at this step. target_l0: what jumprelu's penalty of that name aims at. inverse_variance:
    1 / E||x - E x||^2 of the normalised data (a constant of the run).
    tokens_since_fired_F, dead_after: counters before this batch, and the bound beyond which a feature counts as dead.
    k_now: active features at this step, at most `SAESpec.k`; None: so many.
    """

    sparsity: jax.Array
    target_l0: jax.Array
    inverse_variance: jax.Array
    tokens_since_fired_F: jax.Array
    dead_after: jax.Array
    k_now: jax.Array | None = None

    def k(self, spec: SAESpec) -> UpTo:
        """How many features are kept at this step."""
        return UpTo(spec.k, self.k_now)


@struct.dataclass
class LossParts:
    """Scalars of a batch for the log, and which features fired [F].

    own: terms that only this kind has, by name. least: the smallest positive activation (infinite where there is none).
    """

    loss: jax.Array
    mse: jax.Array
    l0: jax.Array
    fvu: jax.Array
    fired_F: jax.Array
    own: dict[str, jax.Array]
    least: jax.Array


def squared_error(x_BD: jax.Array, recon_BD: jax.Array) -> jax.Array:
    """||x - recon||^2 per row [B], summed over d_in."""
    return jnp.square(x_BD - recon_BD).sum(-1)


def variance_total(x_BD: jax.Array) -> jax.Array:
    """sum_b ||x_b - mean_b x||^2, the denominator of the batch's FVU."""
    return jnp.square(x_BD - x_BD.mean(0)).sum()


FEW = 1024  # dead features of a shard up to which the smaller room is enough (`rooms_of_dead`)
SHARE, MEMORY = 8, 1 / 50  # the larger one: 1 / SHARE of a shard, and pre-activations of so much of a chip's memory at most


@dataclasses.dataclass(frozen=True)
class AuxK:
    """k: of `sae.aux_k`. as_pairs: no array of [B, F] where many features are dead."""

    k: int
    as_pairs: bool = False


def aux_loss(spec: SAESpec, aux: AuxK, params: SAEParams, x_BD: jax.Array, error_BD: jax.Array, dead_F: jax.Array) -> jax.Array:
    """AuxK: how much of the residual error the k_aux best dead features leave unexplained.

    aux = ||e - e^||^2 / ||e - mean e||^2, e = stop_gradient(x - x^), e^ = topk_aux(pre of dead features) W_dec; 0 when
    nothing is dead (nothing is then computed) or when the ratio is not finite. x_BD: rows as `model.read` gives them. Cost: O of
    the room per row as long as no shard has more dead features than the largest (`rooms_of_dead`), else one product of the
    encoder more. Source: Gao et al. 2024, A.2.
    """
    k = min(aux.k, spec.d_sae)

    def in_room(room: int):
        def of(params: SAEParams, x_BD: jax.Array) -> jax.Array:
            rows = sparse.rows_of(dead_F, room)
            return ratio(estimate_in_room(spec, some_of(params, rows), rows, x_BD, k))
        return jax.checkpoint(of)

    def of_many(params: SAEParams, x_BD: jax.Array) -> jax.Array:
        if aux.as_pairs:
            return ratio(_by_pairs(spec, k, params.W_enc, bias(spec, params), params.W_dec, x_BD, dead_F))
        pre_BF = jnp.where(dead_F, pre_activations_of(spec, params, x_BD), -jnp.inf)
        return ratio(decode_at_rest(spec, params, topk(pre_BF, k)) - params.b_dec)

    def ratio(estimate_BD: jax.Array) -> jax.Array:
        return unexplained(error_BD, estimate_BD)

    # Recomputed in the backward pass: residuals of a branch that is not taken would still be written out as zeros.
    rooms = rooms_here(spec, len(x_BD))
    return lax.switch(level(dead_F, rooms), [lambda params, x_BD: jnp.zeros((), jnp.float32), *map(in_room, rooms),
                                             jax.checkpoint(of_many)], params, x_BD)


def dead_features(inputs: LossInputs, fired_F: jax.Array) -> jax.Array:
    """Those that AuxK may use in this batch, bool [F]."""
    return (inputs.tokens_since_fired_F > inputs.dead_after) & ~fired_F


def unexplained(error_BD: jax.Array, estimate_BD: jax.Array) -> jax.Array:
    """||e - e^||^2 / ||e - mean e||^2 of a batch; 0 where all errors are equal (a batch of one row), or it is not finite."""
    total = variance_total(error_BD)
    ratio = squared_error(error_BD, estimate_BD).sum() / jnp.where(total > 0, total, 1.0)  # else its gradient would not be finite
    return jnp.where(jnp.isfinite(ratio) & (total > 0), ratio, 0.0)


def rooms_of_dead(rows: int, features: int, memory: float) -> tuple[int, ...]:
    """How many of a shard's features AuxK takes for an SAE of their own, rising: `FEW`, and what `SHARE` and `MEMORY` allow.

    rows: of a device at once; memory: bytes of a chip.
    """
    few, many = min(FEW, features), min(features // SHARE, int(MEMORY * memory) // (4 * rows))
    return (few, many) if many > few else (few,)


def rooms_here(spec: SAESpec, rows: int) -> tuple[int, ...]:
    """`rooms_of_dead` on the mesh that is set; rows: of all devices at once."""
    rows = rows // jax.sharding.get_abstract_mesh().shape.get("data", 1)
    return rooms_of_dead(rows, spec.d_sae // sharding.shards(), sharding.chip().memory)


def level(dead_F: jax.Array, rooms: tuple[int, ...]) -> jax.Array:
    """0: no feature is dead, i: at most rooms[i - 1] on every shard, one more: more than the largest."""
    most = most_on_a_shard(dead_F)
    return sum((most > room).astype(jnp.int32) for room in (0, *rooms))


def estimate_in_room(spec: SAESpec, some: SAEParams, rows: sparse.Rows, x_BD: jax.Array, k: int) -> jax.Array:
    """What the k largest activations of `some_of` the features add up to, [B, d_out]."""
    valid_M = rows.index_C < spec.d_sae // sharding.shards()
    pre_BM = jnp.where(valid_M, pre_activations_of(spec, some, x_BD), -jnp.inf)  # relu(-inf) = 0 where fewer are dead
    return decode_at_rest(spec, some, topk(pre_BM, min(k, len(valid_M)))) - some.b_dec


def some_of(params: SAEParams, rows: sparse.Rows) -> SAEParams:
    """An SAE of some features of each shard, with zeros where there are fewer than rows. No communication.

    Every index is another one, also of those beyond the end: gradients then need no atomics on a GPU.
    """
    def local(index_C, *values):
        index_C = index_C + jnp.where(index_C < len(values[0]), 0, jnp.arange(len(index_C), dtype=index_C.dtype))
        return tuple(value.at[index_C].get(mode="fill", fill_value=0, unique_indices=True) for value in values)

    if sharding.mesh_is_set():
        row, matrix = sharding.spec("features"), sharding.spec("features", None)
        local = jax.shard_map(local, in_specs=(row, matrix, row, matrix), out_specs=(matrix, row, matrix))
    W_enc, b_enc, W_dec = local(rows.index_C, params.W_enc, params.b_enc, params.W_dec)
    return SAEParams(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=params.b_dec)


def most_on_a_shard(chosen_F: jax.Array) -> jax.Array:
    """The largest number of chosen features on one shard of the dictionary."""
    if not sharding.mesh_is_set():
        return chosen_F.sum()
    return jax.shard_map(lambda chosen_F: lax.pmax(chosen_F.sum(), "dict"), in_specs=sharding.spec("features"),
                         out_specs=sharding.spec())(chosen_F)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_pairs(spec: SAESpec, k: int, W_enc: jax.Array, bias_F: jax.Array, W_dec: jax.Array, x_BD: jax.Array,
              allowed_F: jax.Array) -> jax.Array:
    """What the k largest activations of the allowed features add up to, [B, d_out], without an array of [B, F]."""
    return _by_pairs_forward(spec, k, W_enc, bias_F, W_dec, x_BD, allowed_F)[0]


def _by_pairs_forward(spec, k, W_enc, bias_F, W_dec, x_BD, allowed_F):
    pairs = sparse.selected(spec, SAEParams(W_enc, bias_F, W_dec, None), x_BD, k, allowed_F=allowed_F)
    return sparse.decoded(spec, W_dec, pairs, (spec.d_sae,))[0], (pairs, W_dec, x_BD)


def _by_pairs_backward(spec, k, saved, gradient_BD):
    pairs, W_dec, x_BD = saved
    backward = sparse.backward(spec, W_dec, pairs, (spec.d_sae,), x_BD, gradient_BD[None])
    parts = jax.tree.map(lambda value: value[None], backward)
    return (*sparse.weight_gradients(parts, sparse.every_row(spec), False), jnp.zeros_like(x_BD), None)


_by_pairs.defvjp(_by_pairs_forward, _by_pairs_backward)
