"""The row pass: Adam and the constraints, dictionary row by dictionary row, over all rows or over those that have a gradient.

A step's gradient is that of all rows, or of some sets of rows (`sae.row_gradients`). The pass reads a row's parameters, moments
and gradient once, and writes parameters and moments once, in place; on CPUs some rows at a time, which stay in the cache.

Lazy rows (`train.optimizer` lazy, beta1 = 0): only rows with a gradient are read and written, and that is exact. A row without
one is not moved by Adam; its second moment only decays, v beta2^n over n updates, which is made up for when it has one again:
`Moments.seen_F` remembers at which update that was. Its decoder row keeps its norm.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

from saejax.base import sharding
from saejax.config import Config, TrainOptions
from saejax.sae import SAEParams, SAESpec, losses, row_gradients, sparse
from saejax.sae.losses import LossInputs, LossParts
from saejax.sae.products import product
from saejax.sae.row_gradients import RowGradients
from saejax.train import moments, optim
from saejax.train.moments import Moments

BLOCK = {"cpu": 2**18}
_FD, _F, _ONE = sharding.spec("features", None), sharding.spec("features"), sharding.spec()


@dataclass(frozen=True)
class Step:
    """What an update reads besides parameters, state and rows. allowed: whether it may change anything."""

    config: Config
    spec: SAESpec
    inputs: LossInputs
    lr: jax.Array
    allowed: jax.Array


class Gradient(NamedTuple):
    """Of the means over a batch. by_row: of what is stored by feature, of all rows; or of sets of rows without a common one: then
    that of b_dec in `shared` (b_dec and W_skip) lacks its share through the encoder, -(gradient of b_enc) W_enc.
    """

    shared: SAEParams
    by_row: "SAEParams | Sequence[RowGradients]"


class _Piece(NamedTuple):
    """The gradient of some rows, or of all (None)."""

    rows: sparse.Rows | None
    gradient: SAEParams


class Updated(NamedTuple):
    """norm: of the gradient; good: whether the step counts: `allowed`, loss and gradient finite."""

    params: SAEParams
    opt_state: Moments
    parts: LossParts
    norm: jax.Array
    good: jax.Array


@struct.dataclass
class _Scalars:
    count: jax.Array
    lr: jax.Array
    scale: jax.Array
    good: jax.Array


def updated(step: Step, params: SAEParams, opt_state: Moments, rows_BW: jax.Array) -> Updated:
    """A step on the sparse path."""
    spec, options, train = step.spec, step.config.sae, step.config.train
    batch = row_gradients.parts_of(spec, params, rows_BW, train.accumulate)
    room = functools.partial(row_gradients.room_for, spec, lazy=train.lazy)
    found = row_gradients.of_fired(spec, options, params, batch, step.inputs, room(batch.size * spec.k))
    parts, dead = found.seen, row_gradients.Dead(losses.dead_features(step.inputs, found.seen.fired_F), found.errors)

    def fired_only(params: SAEParams, opt_state: Moments) -> Updated:
        return applied(step, params, opt_state, Gradient(found.shared, [found.gradients]), parts)

    def with_dead(of: Callable, room: int) -> Callable:
        def case(params: SAEParams, opt_state: Moments) -> Updated:
            aux, second = of(spec, options, params, batch, dead, room)
            seen = parts.replace(own={"aux": aux}, loss=parts.loss + options.aux_coef * aux)
            return applied(step, params, opt_state, Gradient(found.shared, [found.gradients, second]), seen)
        return case

    cases, which = [fired_only], jnp.int32(0)
    if options.aux_k:
        parts, rooms = parts.replace(own={"aux": jnp.float32(0)}), losses.rooms_here(spec, batch.size // batch.n)
        cases += [with_dead(row_gradients.of_dead_in_room, size) for size in rooms]
        cases.append(with_dead(row_gradients.of_many_dead, room(batch.size * options.aux_k)))
        which = losses.level(dead.dead_F, rooms)
    return _one_of(cases, which, Updated(params, opt_state, parts, jnp.float32(0), jnp.bool_(False)))


def _one_of(cases: Sequence[Callable], which: jax.Array, start: Updated) -> Updated:
    """`lax.switch`, each case a loop of one round or none: what a loop changes, XLA changes in place, and what a branch changes
    it copies first.
    """
    if len(cases) == 1:
        return cases[0](start.params, start.opt_state)
    kept = which, start
    for number, case in enumerate(cases):
        kept = lax.while_loop(lambda kept, number=number: kept[0] == number,
                              lambda kept, case=case: (jnp.int32(-1), case(kept[1].params, kept[1].opt_state)), kept)
    return kept[1]


def applied(step: Step, params: SAEParams, opt_state: Moments, gradient: Gradient, parts: LossParts) -> Updated:
    """Clipping by the norm of the whole gradient, Adam and the constraints."""
    shared, by_row, train = gradient.shared, gradient.by_row, step.config.train
    if isinstance(by_row, SAEParams):
        pieces, squares = [_Piece(None, by_row)], _squares(optim.projected(step.config.sae, by_row, params))
    else:
        pieces, of_rows, through = zip(*(_measured_in_turns(step, params, some) for some in by_row), strict=True)
        shared, squares = shared.replace(b_dec=shared.b_dec - sum(through)) if step.spec.pre_bias else shared, sum(of_rows)
    squares += sum(jnp.square(g).sum() for g in (shared.b_dec, shared.W_skip) if g is not None)
    norm = jnp.sqrt(squares)
    good = jnp.isfinite(parts.loss) & jnp.isfinite(norm) & step.allowed
    scale = jnp.where(norm < train.clip, 1.0, train.clip / norm) if train.clip is not None else jnp.ones_like(norm)
    scalars = _Scalars(opt_state.count + 1, step.lr, scale, good)
    params, opt_state = _shared_moved(train, params, opt_state, shared, scalars)
    if train.lazy:
        for some, last in zip(by_row, pieces, strict=True):
            params, opt_state = _rows_moved(step, params, opt_state, last, scalars)
            if some.most > some.room:  # the gradients of the other turns are made again
                params, opt_state = lax.fori_loop(0, some.turns() - 1, lambda turn, kept, some=some: _rows_moved(
                    step, *kept, _Piece(*some.turn(turn)), scalars), (params, opt_state))
    else:
        params, opt_state = _every_row_moved(step, params, opt_state, pieces, scalars)
    return Updated(params, opt_state.replace(count=opt_state.count + good), parts, norm, good)


def _squares(tree: SAEParams) -> jax.Array:
    return sum(jnp.square(g).sum() for g in jax.tree.leaves(_by_feature(tree)))


def _measured_in_turns(step: Step, params: SAEParams, some: RowGradients) -> tuple[_Piece, jax.Array, jax.Array]:
    """(piece of the last turn, and of all turns what `_measured` says)."""
    def measured(turn):
        piece = _Piece(*some.turn(turn))
        return (piece, *_measured(step, params, piece))

    def another(turn, found):
        piece, squares, through_D = measured(turn)
        return piece, found[1] + squares, found[2] + through_D

    found = measured(0)
    return found if some.most <= some.room else lax.fori_loop(1, some.turns(), another, found)


def _measured(step: Step, params: SAEParams, piece: _Piece) -> tuple[jax.Array, jax.Array]:
    """(squared norm of the gradient after projection, (gradient of b_enc) W_enc: what the gradient of b_dec lacks through the
    encoder). One all-reduce of [D] along `dict`.
    """
    def local(rows, gradient, params, shards):
        turns, of = _turns(step.spec, rows)

        def add(i, total):
            index, g = of(rows.index_C, i), jax.tree.map(lambda value: of(value, i), gradient)
            p = jax.tree.map(lambda value: value.at[index].get(mode="clip"), params)
            squares = _squares(optim.projected(step.config.sae, g, p))
            return total[0] + squares, total[1] + product("f,fd->d", g.b_enc, p.W_enc, step.spec.compute_dtype)

        zero = jnp.zeros((), gradient.W_enc.dtype), jnp.zeros(params.W_enc.shape[1], gradient.W_enc.dtype)
        return sharding.over(lax.psum, lax.fori_loop(0, turns, add, zero), "dict")

    gradient, of_rows = _by_feature(piece.gradient), _by_feature(params)
    return sharding.on_shards(local, (sparse.ROWS, _placed(gradient), _placed(of_rows)), (_ONE, _ONE))(
        piece.rows, gradient, of_rows)


def _every_row_moved(step: Step, params: SAEParams, state: Moments, pieces: Sequence[_Piece],
                     scalars: _Scalars) -> tuple[SAEParams, Moments]:
    """Parameters and moments after Adam's update of all rows; where not `good`, as they were."""
    kept = tuple(None if tree is None else _by_feature(tree) for tree in (params, state.first, state.second))
    given = tuple((piece.rows, _by_feature(piece.gradient)) for piece in pieces)
    where = tuple((None if rows is None else sparse.ROWS, _placed(gradient)) for rows, gradient in given)
    kept_where = tuple(None if tree is None else _placed(tree) for tree in kept)

    def local(given, kept, scalars, shards):
        ways = {name: functools.partial(_blocks_moved, step, max(1, entries // max(step.spec.d_in, step.spec.width_out)))
                for name, entries in BLOCK.items()}
        whole = functools.partial(_blocks_moved, step, len(kept[0].b_enc))
        return lax.platform_dependent(given, kept, scalars, **ways, default=whole)

    run = sharding.on_shards(local, (where, kept_where, jax.tree.map(lambda _: _ONE, scalars)), kept_where)
    p, first, second = run(given, kept, scalars)
    state = state.replace(second=_with(state.second, second), first=None if first is None else _with(state.first, first))
    return _with(params, p), state


def _blocks_moved(step: Step, size: int, given, kept, scalars: _Scalars):
    """`size` rows after `size` rows."""
    F = len(kept[0].b_enc)
    start = lax.axis_index("dict") * F if sharding.mesh_is_set() else 0

    def move(kept, first: jax.Array | int, size: int):
        def block(value: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(value, first, size)

        def gradient_of(rows, gradient):
            if rows is None:
                return jax.tree.map(block, gradient)
            place = block(rows.place_F)
            here, place = place < len(rows.index_C), jnp.minimum(place, len(rows.index_C) - 1)
            return jax.tree.map(lambda value: jnp.where(_down(here, value), value[place], 0.0), gradient)

        g = jax.tree.map(lambda *values: sum(values), *(gradient_of(*piece) for piece in given))
        old, rows = jax.tree.map(block, kept), start + first + jnp.arange(size)
        if size == F:
            return _moved(step.config, old, g, scalars, rows)
        # A branch, so that everything is read before anything is written: else XLA copies whole arrays at every turn.
        new = lax.cond(scalars.good, lambda: _moved(step.config, old, g, scalars, rows), lambda: old)
        return jax.tree.map(lambda all_, rows: lax.dynamic_update_slice_in_dim(all_, rows, first, 0), kept, new)

    size = min(size, F)
    if size == F:
        return move(kept, 0, F)
    kept = lax.fori_loop(0, F // size, lambda i, kept: move(kept, i * size, size), kept)
    return move(kept, F - F % size, F % size) if F % size else kept


def _moved(config: Config, kept, gradient: SAEParams, scalars: _Scalars, rows: jax.Array, faded: jax.Array | None = None):
    """(parameters, first and second moments) of some rows after the update, as they are kept; where not `good`, as they were."""
    p, first, second = _adam(config.train, kept, optim.projected(config.sae, gradient, kept[0]), scalars, rows, faded)
    new = optim.constrained(config.sae, p), first, second
    return jax.tree.map(lambda new, old: jnp.where(scalars.good, new, old), new, kept)


def _adam(options: TrainOptions, kept, gradient: SAEParams, scalars: _Scalars, rows: jax.Array, faded: jax.Array | None = None):
    """m = b1 m + (1 - b1) g; v = faded v + (1 - b2) g^2; p -= lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps).

    kept: (p, m or None for g, v). faded: of each row, None: b2. rows: numbers of the rows, see `moments.rounded`.
    """
    (p, first, second), b1, b2, count = kept, options.beta1, options.beta2, scalars.count
    g = jax.tree.map(lambda value: scalars.scale * value, gradient)
    kept_v = jax.tree.map(lambda v, g: (b2 if faded is None else _down(faded, g)) * v.astype(g.dtype), second, g)
    v = jax.tree.map(lambda v, g: v + (1 - b2) * jnp.square(g), kept_v, g)
    m = g if first is None else jax.tree.map(lambda m, g: b1 * m.astype(g.dtype) + (1 - b1) * g, first, g)
    unbiased = optax.tree.bias_correction(m, b1, count) if b1 else m
    p = jax.tree.map(lambda p, m, v: p - scalars.lr * moments.direction(options, m, v, count), p, unbiased, v)
    return p, None if first is None else moments.kept(m, first, count, 1, rows), moments.kept(v, second, count, 0, rows)


def _rows_moved(step: Step, params: SAEParams, state: Moments, piece: _Piece, scalars: _Scalars) -> tuple[SAEParams, Moments]:
    """The same of the rows of a piece only, in place."""
    def local(rows, gradient, params, second, seen_F, scalars, shards):
        turns, of = _turns(step.spec, rows)
        first = lax.axis_index("dict") * len(seen_F) if sharding.mesh_is_set() else 0

        def move(i, kept):
            params, second, seen_F = kept
            index = jnp.where(scalars.good, of(rows.index_C, i), len(seen_F))  # beyond the last row nothing is written
            p, v = jax.tree.map(lambda value: value.at[index].get(mode="clip"), (params, second))
            faded = step.config.train.beta2 ** (scalars.count - seen_F.at[index].get(mode="clip"))
            g = jax.tree.map(lambda value: of(value, i), gradient)
            p, _, v = _moved(step.config, (p, None, v), g, scalars, first + index, faded)
            return (*(jax.tree.map(lambda all_, new: all_.at[index].set(new, mode="drop"), old, new)
                      for old, new in ((params, p), (second, v))), seen_F.at[index].set(scalars.count, mode="drop"))

        return lax.fori_loop(0, turns, move, (params, second, seen_F))

    of_rows, gradient = _by_feature(params), _by_feature(piece.gradient)
    placed = _placed(of_rows)
    run = sharding.on_shards(local, (sparse.ROWS, placed, placed, placed, _F, jax.tree.map(lambda _: _ONE, scalars)),
                             (placed, placed, _F))
    p, v, seen_F = run(piece.rows, gradient, of_rows, _by_feature(state.second), state.seen_F, scalars)
    return _with(params, p), state.replace(seen_F=seen_F, second=_with(state.second, v))


def _shared_moved(options: TrainOptions, params: SAEParams, state: Moments, gradient: SAEParams,
                  scalars: _Scalars) -> tuple[SAEParams, Moments]:
    """Adam's update of what is not stored by feature: b_dec and W_skip."""
    def shared(tree: SAEParams | None) -> SAEParams | None:
        return None if tree is None else SAEParams(None, None, None, tree.b_dec, W_skip=tree.W_skip)

    kept = shared(params), shared(state.first), shared(state.second)
    rows = None if gradient.W_skip is None else jnp.arange(len(gradient.W_skip))
    new = _adam(options, kept, shared(gradient), scalars, rows)
    p, first, second = jax.tree.map(lambda new, old: jnp.where(scalars.good, new, old), new, kept)
    return (params.replace(b_dec=p.b_dec, W_skip=p.W_skip),
            state.replace(second=state.second.replace(b_dec=second.b_dec, W_skip=second.W_skip),
                          first=None if first is None else state.first.replace(b_dec=first.b_dec, W_skip=first.W_skip)))


def _by_feature(tree: SAEParams) -> SAEParams:
    return tree.replace(b_dec=None, W_skip=None)


def _with(tree: SAEParams, by_feature: SAEParams) -> SAEParams:
    """The tree with what `_by_feature` has."""
    return by_feature.replace(b_dec=tree.b_dec, W_skip=tree.W_skip)


def _placed(tree: SAEParams) -> SAEParams:
    """PartitionSpecs of what is stored by feature."""
    return jax.tree.map(lambda value: _FD if value.ndim == 2 else _F, tree)


def _down(of_rows: jax.Array, like: jax.Array) -> jax.Array:
    """A value for each row, for arrays of rows."""
    return of_rows[:, None] if like.ndim == 2 else of_rows


def _turns(spec: SAESpec, rows: sparse.Rows):
    """How many turns until all rows are done, and what of an array of rows is taken at a turn."""
    room = len(rows.index_C)
    n = row_gradients.turns_of(spec, room)
    size = room // n
    return (-(-rows.count[0] // size),
            lambda value, i: lax.dynamic_slice_in_dim(value, i * size, size))
