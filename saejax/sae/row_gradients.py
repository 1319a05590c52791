"""Gradients of the rows that a batch touches, and of no others: arrays of as many rows as can fire, not of the whole dictionary.

Only features with a positive activation have gradients in kinds with k. AuxK adds those of dead features, which are never among
them: a batch's gradient is one piece, or two without a common row.
"""

import jax
from flax import struct
from jax import lax

from saejax import sharding
from saejax.config import SAEOptions
from saejax.sae import losses, sparse
from saejax.sae.losses import LossInputs, LossParts
from saejax.sae.objectives import objective_of_rows
from saejax.sae.params import SAEParams, SAESpec

CHUNK = 2**20  # entries of a matrix's rows that are worked on at once


@struct.dataclass
class Piece:
    """gradient: of W_enc, b_enc and W_dec for `rows` only, of b_dec and W_skip whole; that of b_dec lacks its share through the
    encoder, -(gradient of b_enc) W_enc.
    """

    rows: sparse.Rows
    gradient: SAEParams


def capacity(spec: SAESpec, most: int) -> int:
    """Room for the rows of a shard, `most` of them and not more than it has, rounded up to whole turns of `turns_of`."""
    n = min(most, spec.d_sae // sharding.shards())
    turns = -(-n // _at_once(spec))
    return turns * -(-n // turns)


def turns_of(spec: SAESpec, room: int) -> int:
    """In how many equal parts to work on so many rows: as few as have at most `CHUNK` entries each."""
    return next(n for n in range(-(-room // _at_once(spec)), room + 1) if room % n == 0)


def _at_once(spec: SAESpec) -> int:
    return max(1, CHUNK // max(spec.d_in, spec.width_out))


def of_batch(spec: SAESpec, options: SAEOptions, params: SAEParams, x_BD: jax.Array, rows_BW: jax.Array,
             inputs: LossInputs) -> tuple[Piece, LossParts, jax.Array]:
    """The piece of the features that fire, what was seen, and the error that is left. x_BD: `read_rows` of the batch."""
    over_batch = spec.kind == "batchtopk"

    def of(pairs: sparse.Pairs):
        rows = sparse.rows_of(sparse.fired(spec, pairs), capacity(spec, len(rows_BW) * spec.k))

        def of_learned(learned: SAEParams):
            return objective_of_rows(spec, options, params, pairs, learned, rows, x_BD, rows_BW, inputs)

        (_, (parts, error_BD)), gradient = jax.value_and_grad(of_learned, has_aux=True)(sparse.zeros_for(params, rows))
        return Piece(rows, gradient), parts, error_BD

    k = inputs.k(spec)
    pairs, missing = sparse.selected(spec, params, x_BD, k, over_batch=over_batch)
    if not over_batch:
        return of(pairs)
    return lax.cond(sharding.any_member(missing),
                    lambda: of(sparse.selected(spec, params, x_BD, k, over_batch=True, counted=True)[0]), lambda: of(pairs))


def of_few_dead(spec: SAESpec, options: SAEOptions, params: SAEParams, x_BD: jax.Array, error_BD: jax.Array,
                dead_F: jax.Array) -> tuple[jax.Array, Piece]:
    """(AuxK, its piece) where no shard has more than `losses.FEW` dead features."""
    rows = sparse.rows_of(dead_F, losses.few(spec))

    def of(some: SAEParams):
        estimate_BD = losses.estimate_of_few(spec, some.replace(b_dec=lax.stop_gradient(params.b_dec)), rows, x_BD, options.aux_k)
        return losses.unexplained(error_BD, estimate_BD, dead_F)

    aux, gradient = jax.value_and_grad(of)(losses.some_of(params, rows))
    return aux, Piece(rows, _scaled(options, gradient))


def of_many_dead(spec: SAESpec, options: SAEOptions, params: SAEParams, x_BD: jax.Array, error_BD: jax.Array,
                 dead_F: jax.Array) -> tuple[jax.Array, Piece]:
    """(AuxK, its piece) by one more product of the encoder."""
    k = min(options.aux_k, spec.d_sae)
    pairs, _ = sparse.selected(spec, params, x_BD, k, allowed_F=dead_F)
    rows = sparse.rows_of(sparse.fired(spec, pairs), capacity(spec, len(x_BD) * k))

    def of(learned: SAEParams):
        own, place_P = sparse.attached(spec, pairs, x_BD, learned, rows)
        estimate_BD = sparse.decode_groups(spec, params, own, len(x_BD), (spec.d_sae,), (learned.W_dec, place_P))[0]
        return losses.unexplained(error_BD, estimate_BD - params.b_dec, dead_F)

    aux, gradient = jax.value_and_grad(of)(sparse.zeros_for(params, rows))
    return aux, Piece(rows, _scaled(options, gradient))


def _scaled(options: SAEOptions, gradient: SAEParams) -> SAEParams:
    return jax.tree.map(lambda value: options.aux_coef * value, gradient)
