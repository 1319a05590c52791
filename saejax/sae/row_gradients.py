"""Gradients of the rows that a batch touches, and of no others: arrays of as many rows as can fire, not of the whole dictionary.

Only features with a positive activation have gradients in kinds with k. AuxK adds those of dead features, which are never among
them: a batch's gradient is one piece, or two without a common row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from saejax import sharding
from saejax.config import SAEOptions
from saejax.sae import losses, sparse
from saejax.sae.losses import LossInputs, LossParts
from saejax.sae.objectives import objective_of_rows, read_rows
from saejax.sae.params import SAEParams, SAESpec

CHUNK = 2**20  # entries of a matrix's rows that are worked on at once


@struct.dataclass
class Piece:
    """gradient: of the means over a batch; of what is stored by feature for `rows` only, of b_dec and W_skip whole, where that of
    b_dec lacks its share through the encoder, -(gradient of b_enc) W_enc. rows None: of all rows, and whole.
    """

    rows: sparse.Rows | None
    gradient: SAEParams


@dataclass(frozen=True)
class Batch:
    """Rows that go through the SAE in n parts, one after the other. rows(i): of a part, at rest; read(i): what the encoder reads
    of them (`objectives.read_rows`).
    """

    n: int
    size: int
    rows: Callable[[jax.Array | int], jax.Array]
    read: Callable[[jax.Array | int], jax.Array]

    def over(self, of: Callable):
        """of(i) = (a, b) of every part: (the mean of a, b stacked)."""
        total, seen = of(0)
        seen = jax.tree.map(lambda value: value[None], seen)
        if self.n > 1:
            def add(total, i):
                more, seen = of(i)
                return jax.tree.map(jnp.add, total, more), seen

            total, others = lax.scan(add, total, jnp.arange(1, self.n))
            seen = jax.tree.map(lambda first, rest: jnp.concatenate([first, rest]), seen, others)
        return jax.tree.map(lambda value: value / self.n, total), seen


def parts_of(spec: SAESpec, params: SAEParams, rows_BW: jax.Array, n: int) -> Batch:
    """Every n-th row is a part: so each device keeps the rows that it has."""
    if n == 1:
        x_BD = read_rows(spec, params, rows_BW)
        return Batch(1, len(rows_BW), lambda i: rows_BW, lambda i: x_BD)
    parts_BnW = rows_BW.reshape(len(rows_BW) // n, n, -1)

    def rows(i):
        return lax.dynamic_index_in_dim(parts_BnW, i, axis=1, keepdims=False)

    return Batch(n, len(rows_BW), rows, lambda i: read_rows(spec, params, rows(i)))


def _part(stacked, i):
    """What is stacked, of one part."""
    return jax.tree.map(lambda value: lax.dynamic_index_in_dim(value, i, keepdims=False), stacked)


def merged(seen: LossParts) -> LossParts:
    """Of parts that are stacked: means, all features that fired, the least activation."""
    fired_F, least = seen.fired_F.any(0), seen.least.min(0)
    means = jax.tree.map(lambda value: value.mean(0), seen.replace(fired_F=None, least=None))
    return means.replace(fired_F=fired_F, least=least)


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


def of_fired(spec: SAESpec, options: SAEOptions, params: SAEParams, batch: Batch,
             inputs: LossInputs) -> tuple[Piece, LossParts, jax.Array]:
    """The piece of the features that fire, what was seen, and the error that is left, [n, rows of a part, d_out]."""
    over_batch = spec.kind == "batchtopk"

    def chosen(counted: bool):
        return batch.over(lambda i: ((), sparse.selected(spec, params, batch.read(i), inputs.k(spec), over_batch=over_batch,
                                                         counted=counted)))[1]

    def of(pairs_n: sparse.Pairs):
        fired_F = batch.over(lambda i: ((), sparse.fired(spec, _part(pairs_n, i))))[1].any(0)
        rows = sparse.rows_of(fired_F, capacity(spec, batch.size * spec.k))

        def gradient(i):
            def of_learned(learned: SAEParams):
                return objective_of_rows(spec, options, params, _part(pairs_n, i), learned, rows, batch.read(i), batch.rows(i),
                                         inputs)

            (_, seen), gradient = jax.value_and_grad(of_learned, has_aux=True)(sparse.zeros_for(params, rows))
            return gradient, seen

        total, (seen, errors) = batch.over(gradient)
        return Piece(rows, total), merged(seen), errors

    pairs_n, missing = chosen(counted=False)
    if not over_batch:
        return of(pairs_n)
    return lax.cond(missing.any(), lambda: of(chosen(counted=True)[0]), lambda: of(pairs_n))


@struct.dataclass
class Dead:
    """What AuxK is computed from: features that count as dead, and the error that is left, [n, rows of a part, d_out]."""

    dead_F: jax.Array
    errors: jax.Array


def of_few_dead(spec: SAESpec, options: SAEOptions, params: SAEParams, batch: Batch, dead: Dead) -> tuple[jax.Array, Piece]:
    """(AuxK, its piece) where no shard has more than `losses.FEW` dead features."""
    rows = sparse.rows_of(dead.dead_F, losses.few(spec))

    def of(some: SAEParams, x_BD: jax.Array, error_BD: jax.Array, i):
        some = some.replace(b_dec=lax.stop_gradient(params.b_dec))
        return losses.unexplained(error_BD, losses.estimate_of_few(spec, some, rows, x_BD, options.aux_k), dead.dead_F)

    return _aux(options, batch, dead, rows, losses.some_of(params, rows), of)


def of_many_dead(spec: SAESpec, options: SAEOptions, params: SAEParams, batch: Batch, dead: Dead) -> tuple[jax.Array, Piece]:
    """(AuxK, its piece) by one more product of the encoder."""
    k = min(options.aux_k, spec.d_sae)

    def chosen(i):
        pairs, _ = sparse.selected(spec, params, batch.read(i), k, allowed_F=dead.dead_F)
        return (), (pairs, sparse.fired(spec, pairs))

    _, (pairs_n, fired_nF) = batch.over(chosen)
    rows = sparse.rows_of(fired_nF.any(0), capacity(spec, batch.size * k))

    def of(learned: SAEParams, x_BD: jax.Array, error_BD: jax.Array, i):
        own, place_P = sparse.attached(spec, _part(pairs_n, i), x_BD, learned, rows)
        estimate_BD = sparse.decode_groups(spec, params, own, len(x_BD), (spec.d_sae,), (learned.W_dec, place_P))[0]
        return losses.unexplained(error_BD, estimate_BD - params.b_dec, dead.dead_F)

    return _aux(options, batch, dead, rows, sparse.zeros_for(params, rows), of)


def _aux(options: SAEOptions, batch: Batch, dead: Dead, rows: sparse.Rows, learned: SAEParams, of: Callable):
    """(mean of `of(learned, what the encoder reads, error, i)` over the parts, the piece of its gradient times `aux_coef`)."""
    def gradient(i):
        return jax.value_and_grad(of)(learned, batch.read(i), _part(dead.errors, i), i), ()

    (aux, total), _ = batch.over(gradient)
    return aux, Piece(rows, jax.tree.map(lambda value: options.aux_coef * value, total))
