"""Gradients of the rows that a batch touches, and of no others: arrays of as many rows as can fire, not of the whole dictionary.

Only features with a positive activation have gradients in kinds with k. AuxK adds those of dead features, which are never among
them: a batch's gradient is of one set of rows, or of two without a common row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from saejax.base import sharding
from saejax.config import SAEOptions
from saejax.sae import losses, sparse
from saejax.sae.losses import LossInputs, LossParts
from saejax.sae.model import read
from saejax.sae.normalization import columns
from saejax.sae.objectives import Sparse, objective_of_decoded, read_rows
from saejax.sae.pairs import Backward
from saejax.sae.params import SAEParams, SAESpec
from saejax.sae.prefixes import borders

CHUNK, CHUNK_ELSEWHERE = 2**20, 2**26  # entries of a matrix's rows that are worked on at once: on CPUs, elsewhere
LAZY_SHARE = 8  # with lazy rows gradients have room for 1 / LAZY_SHARE of a shard's features; more take turns


@dataclass(frozen=True)
class RowGradients:
    """Gradients of what is stored by feature, for the chosen features, up to `room` of them on each shard at a time.

    of(rows): W_enc, b_enc and W_dec of these rows, of the means over the batch; a collective along `data`. most: no shard has
    more chosen features.
    """

    chosen_F: jax.Array
    room: int
    most: int
    of: Callable[[sparse.Rows], SAEParams]

    def turn(self, number: jax.Array | int = 0) -> tuple[sparse.Rows, SAEParams]:
        rows = sparse.rows_of(self.chosen_F, self.room, number)
        return rows, self.of(rows)

    def turns(self) -> jax.Array:
        """How many it takes on the shard with the most of them: one at least."""
        return jnp.maximum(1, -(-losses.most_on_a_shard(self.chosen_F) // self.room))


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


def merged(seen: LossParts) -> LossParts:
    """Of parts that are stacked: means, all features that fired, the least activation."""
    fired_F, least = seen.fired_F.any(0), seen.least.min(0)
    means = jax.tree.map(lambda value: value.mean(0), seen.replace(fired_F=None, least=None))
    return means.replace(fired_F=fired_F, least=least)


def rows_with_room(pairs: int, features: int, shards: int, lazy: bool) -> int:
    """Rows of a shard that gradients have room for where a batch has so many pairs: as many as can fire; with lazy rows fewer,
    where few of these will. features: of a shard.
    """
    few = lazy and 4 * pairs <= features * shards
    return min(pairs, -(-features // LAZY_SHARE) if few else features)


def room_for(spec: SAESpec, pairs: int, *, lazy: bool = False) -> int:
    """`rows_with_room` on the mesh that is set, rounded up to whole turns of `turns_of`."""
    n = rows_with_room(pairs, spec.d_sae // sharding.shards(), sharding.shards(), lazy)
    turns = -(-n // _at_once(spec))
    return turns * -(-n // turns)


def turns_of(spec: SAESpec, room: int) -> int:
    """In how many equal parts to work on so many rows: as few as have at most `CHUNK` entries each."""
    return next(n for n in range(-(-room // _at_once(spec)), room + 1) if room % n == 0)


def _at_once(spec: SAESpec) -> int:
    entries = CHUNK if sharding.chip().platform == "cpu" else CHUNK_ELSEWHERE
    return max(1, entries // max(spec.d_in, spec.width_out))


@dataclass(frozen=True)
class Fired:
    """What a batch's pairs give. shared: gradients of b_dec and W_skip, where that of b_dec lacks its share through the encoder,
    -(gradient of b_enc) W_enc. errors: what is left to reconstruct, [n, rows of a part, d_out].
    """

    gradients: RowGradients
    shared: SAEParams
    seen: LossParts
    errors: jax.Array


def of_fired(spec: SAESpec, options: SAEOptions, params: SAEParams, batch: Batch, inputs: LossInputs, room: int) -> Fired:
    """Loss and gradients without AuxK, these with `room` for so many rows at a time. In parts rows and errors are gathered once
    more for the gradients.
    """
    ends = borders(options.groups, spec.d_sae) if options.groups else (spec.d_sae,)
    shared = SAEParams(None, None, None, params.b_dec, W_skip=params.W_skip)

    def of_part(i):
        x_BD = batch.read(i)
        pairs = sparse.selected(spec, params, x_BD, inputs.k(spec), over_batch=spec.kind == "batchtopk")
        seen = Sparse.of(spec, sparse.decoded(spec, params.W_dec, pairs, ends), pairs)

        def loss_of(parts_GBD: jax.Array, shared: SAEParams):
            return objective_of_decoded(spec, options, shared, batch.rows(i), seen.replace(parts_GBD=parts_GBD), inputs)

        value_and_grad = jax.value_and_grad(loss_of, (0, 1), has_aux=True)
        (_, (parts, error_BD)), (to_decoded, to_shared) = value_and_grad(seen.parts_GBD, shared)
        backward = sparse.backward(spec, params.W_dec, pairs, ends, x_BD, to_decoded / batch.n)
        return to_shared, (parts, error_BD, _kept(spec, params, batch, i, backward))

    to_shared, (parts, errors, backward) = batch.over(of_part)
    seen = merged(parts)
    return Fired(_touched(batch, spec.k, seen.fired_F, room, backward), to_shared, seen, errors)


def _kept(spec: SAESpec, params: SAEParams, batch: Batch, i, of_part: Backward) -> Backward:
    """Of one part until weight gradients are made: of several parts rows and gradients rest over all devices again."""
    if batch.n == 1 or not sharding.mesh_is_set():
        return of_part
    x_BD = read(spec, params, columns(spec, batch.rows(i))[0])
    return of_part.replace(read_BD=x_BD, gradient_GBD=jax.sharding.reshard(
        of_part.gradient_GBD, sharding.spec(None, "rows_at_rest", None)))


def _touched(batch: Batch, k: int, chosen_F: jax.Array, room: int, parts: Backward) -> RowGradients:
    def of(rows: sparse.Rows) -> SAEParams:
        return SAEParams(*sparse.weight_gradients(parts, rows, batch.n > 1), None)

    return RowGradients(chosen_F, room, min(batch.size * k, len(chosen_F) // sharding.shards()), of)


@dataclass(frozen=True)
class Dead:
    """What AuxK is computed from: features that count as dead, and the error that is left, [n, rows of a part, d_out]."""

    dead_F: jax.Array
    errors: jax.Array

    def error(self, i) -> jax.Array:
        """Of one part."""
        return lax.dynamic_index_in_dim(self.errors, i, keepdims=False)


def of_dead_in_room(spec: SAESpec, options: SAEOptions, params: SAEParams, batch: Batch, dead: Dead,
                    room: int) -> tuple[jax.Array, RowGradients]:
    """(AuxK, its gradients) where no shard has more dead features than `room`."""
    rows = sparse.rows_of(dead.dead_F, room)

    def of_part(i):
        def of(some: SAEParams):
            some = some.replace(b_dec=lax.stop_gradient(params.b_dec))
            return losses.unexplained(dead.error(i), losses.estimate_in_room(spec, some, rows, batch.read(i), options.aux_k))

        return jax.value_and_grad(of)(losses.some_of(params, rows)), ()

    (aux, gradient), _ = batch.over(of_part)
    gradient = jax.tree.map(lambda value: options.aux_coef * value, gradient.replace(b_dec=None))
    return aux, RowGradients(dead.dead_F, room, room, lambda rows: gradient)


def of_many_dead(spec: SAESpec, options: SAEOptions, params: SAEParams, batch: Batch, dead: Dead,
                 room: int) -> tuple[jax.Array, RowGradients]:
    """(AuxK, its gradients) by one more product of the encoder, with room for so many rows at a time."""
    k, ends = min(options.aux_k, spec.d_sae), (spec.d_sae,)

    def of_part(i):
        x_BD = batch.read(i)
        pairs = sparse.selected(spec, params, x_BD, k, allowed_F=dead.dead_F)
        estimate_BD = sparse.decoded(spec, params.W_dec, pairs, ends)[0]
        aux, to_estimate = jax.value_and_grad(losses.unexplained, 1)(dead.error(i), estimate_BD)
        to_decoded = options.aux_coef / batch.n * to_estimate[None]
        backward = sparse.backward(spec, params.W_dec, pairs, ends, x_BD, to_decoded)
        return aux, (sparse.fired(spec, pairs), _kept(spec, params, batch, i, backward))

    aux, (fired_nF, backward) = batch.over(of_part)
    return aux, _touched(batch, k, fired_nF.any(0), room, backward)
