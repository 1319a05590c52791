"""Row-lazy Adam: a step that reads and writes the rows of the optimiser's state that have a gradient, and no others.

With beta1 = 0 that is exact. A row without gradient is not moved by Adam; its second moment only decays, v beta2^n over n
updates, which is made up for when the row has a gradient again: `Moments.seen_F` remembers at which update that was. Its decoder
row keeps its norm. What is not stored by feature (b_dec, W_skip) is updated as ever.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from saejax import sharding
from saejax.config import Config
from saejax.sae import SAEParams, SAESpec, losses, row_gradients, sparse
from saejax.sae.losses import LossInputs, LossParts
from saejax.sae.objectives import read_rows
from saejax.sae.products import product
from saejax.sae.row_gradients import Piece
from saejax.train import moments, optim
from saejax.train.moments import Moments

_FD, _F, _ONE = sharding.spec("features", None), sharding.spec("features"), sharding.spec()
_BY_FEATURE = SAEParams(W_enc=_FD, b_enc=_F, W_dec=_FD, b_dec=None)


def updated(config: Config, spec: SAESpec, params: SAEParams, opt_state: tuple, rows_BW: jax.Array, inputs: LossInputs,
            lr: jax.Array, allowed: jax.Array):
    """(params, opt_state, LossParts, norm of the gradient, whether the step counts: `allowed`, loss and gradient finite)."""
    options = config.sae
    x_BD = read_rows(spec, params, rows_BW)
    piece, parts, error_BD = row_gradients.of_batch(spec, options, params, x_BD, rows_BW, inputs)
    dead_F = losses.dead_features(inputs, parts.fired_F)

    def fired_only(params: SAEParams, opt_state: tuple):
        return _applied(config, spec, params, opt_state, [piece], parts, lr, allowed)

    def with_dead(of):
        def case(params: SAEParams, opt_state: tuple):
            aux, second = of(spec, options, params, x_BD, error_BD, dead_F)
            seen = parts.replace(own={"aux": aux}, loss=parts.loss + options.aux_coef * aux)
            return _applied(config, spec, params, opt_state, [piece, second], seen, lr, allowed)
        return case

    cases, which = [fired_only], jnp.int32(0)
    if options.aux_k:
        parts = parts.replace(own={"aux": jnp.float32(0)})
        cases += [with_dead(row_gradients.of_few_dead), with_dead(row_gradients.of_many_dead)]
        which = losses.level(dead_F)
    return _one_of(cases, which, params, opt_state, parts)


def _one_of(cases: Sequence[Callable], which: jax.Array, params: SAEParams, opt_state: tuple, parts: LossParts):
    """`lax.switch`, each case a loop of one round or none: what a loop changes, XLA changes in place, and what a branch changes
    it copies first.
    """
    if len(cases) == 1:
        return cases[0](params, opt_state)
    kept = which, (params, opt_state, parts, jnp.float32(0), jnp.bool_(False))
    for number, case in enumerate(cases):
        kept = lax.while_loop(lambda kept, number=number: kept[0] == number,
                              lambda kept, case=case: (jnp.int32(-1), case(*kept[1][:2])), kept)
    return kept[1]


def _applied(config: Config, spec: SAESpec, params: SAEParams, opt_state: tuple, pieces: Sequence[Piece], parts: LossParts,
             lr: jax.Array, allowed: jax.Array):
    """See `updated`: clipping by the norm of all pieces, then Adam and the constraints row by row."""
    *rest, state = opt_state
    shared = pieces[0].gradient.replace(W_enc=None, b_enc=None, W_dec=None)
    squares = 0.0
    for piece in pieces:
        of_rows, through_D = _measured(config, spec, params, piece)
        squares = squares + of_rows
        if spec.pre_bias:
            shared = shared.replace(b_dec=shared.b_dec - through_D)
    norm = jnp.sqrt(squares + sum(jnp.square(g).sum() for g in jax.tree.leaves(shared)))
    good = jnp.isfinite(parts.loss) & jnp.isfinite(norm) & allowed
    clip = config.train.clip
    scale = jnp.where(norm < clip, 1.0, clip / norm) if clip else jnp.float32(1)
    update = (state.count + 1, lr, scale, good)
    params, state = _shared_moved(config, params, state, shared, *update)
    for piece in pieces:
        params, state = _rows_moved(config, spec, params, state, piece, *update)
    return params, (*rest, state.replace(count=state.count + good)), parts, norm, good


def _measured(config: Config, spec: SAESpec, params: SAEParams, piece: Piece) -> tuple[jax.Array, jax.Array]:
    """(squared norm of the gradient after projection, (gradient of b_enc) W_enc). One all-reduce of [D] along `dict`."""
    def local(rows, gradient, params, shards):
        turns, of = _turns(spec, rows)

        def add(i, total):
            index, g = of(rows.index_C, i), jax.tree.map(lambda value: of(value, i), gradient)
            p = jax.tree.map(lambda value: value.at[index].get(mode="clip"), params)
            squares = sum(jnp.square(value).sum() for value in jax.tree.leaves(optim.projected(config.sae, g, p)))
            return total[0] + squares, total[1] + product("f,fd->d", g.b_enc, p.W_enc, spec.compute_dtype)

        zero = jnp.zeros((), gradient.W_enc.dtype), jnp.zeros(params.W_enc.shape[1], gradient.W_enc.dtype)
        return sharding.over(lax.psum, lax.fori_loop(0, turns, add, zero), "dict")

    return sharding.on_shards(local, (sparse.ROWS, _BY_FEATURE, _BY_FEATURE), (_ONE, _ONE))(
        piece.rows, _by_feature(piece.gradient), _by_feature(params))


def _rows_moved(config: Config, spec: SAESpec, params: SAEParams, state: Moments, piece: Piece, count: jax.Array, lr: jax.Array,
                scale: jax.Array, good: jax.Array) -> tuple[SAEParams, Moments]:
    """Parameters and moments after Adam's update of the rows of a piece, in place; where not `good`, as they were."""
    options = config.train

    def local(rows, gradient, params, second, seen_F, count, lr, scale, good, shards):
        turns, of = _turns(spec, rows)
        first = lax.axis_index("dict") * len(seen_F) if sharding.mesh_is_set() else 0

        def move(i, kept):
            params, second, seen_F = kept
            index = jnp.where(good, of(rows.index_C, i), len(seen_F))  # beyond the last row nothing is written
            p = jax.tree.map(lambda value: value.at[index].get(mode="clip"), params)
            g = optim.projected(config.sae, jax.tree.map(lambda value: of(value, i), gradient), p)
            faded = options.beta2 ** (count - seen_F.at[index].get(mode="clip"))
            v = jax.tree.map(lambda v, g: _down(faded, g) * v.at[index].get(mode="clip").astype(g.dtype)
                             + (1 - options.beta2) * jnp.square(scale * g), second, g)
            p = jax.tree.map(lambda p, g, v: p - lr * moments.direction(options, scale * g, v, count), p, g, v)
            p, v = optim.constrained(config.sae, p), moments.kept(v, second, count, 0, first + index)
            return (*(jax.tree.map(lambda all_, new: all_.at[index].set(new, mode="drop"), old, new)
                      for old, new in ((params, p), (second, v))), seen_F.at[index].set(count, mode="drop"))

        return lax.fori_loop(0, turns, move, (params, second, seen_F))

    run = sharding.on_shards(local, (sparse.ROWS, *[_BY_FEATURE] * 3, _F, *[_ONE] * 4), (_BY_FEATURE, _BY_FEATURE, _F))
    p, v, seen_F = run(piece.rows, _by_feature(piece.gradient), _by_feature(params), _by_feature(state.second), state.seen_F,
                       count, lr, scale, good)
    return (params.replace(W_enc=p.W_enc, b_enc=p.b_enc, W_dec=p.W_dec),
            state.replace(seen_F=seen_F, second=state.second.replace(W_enc=v.W_enc, b_enc=v.b_enc, W_dec=v.W_dec)))


def _shared_moved(config: Config, params: SAEParams, state: Moments, gradient: SAEParams, count: jax.Array, lr: jax.Array,
                  scale: jax.Array, good: jax.Array) -> tuple[SAEParams, Moments]:
    """Adam's update of what is not stored by feature."""
    options = config.train
    fields = {name: g for name, g in (("b_dec", gradient.b_dec), ("W_skip", gradient.W_skip)) if g is not None}
    p, v = {}, {}
    for name, g in fields.items():
        old, second = getattr(params, name), getattr(state.second, name)
        grown = options.beta2 * second.astype(g.dtype) + (1 - options.beta2) * jnp.square(scale * g)
        p[name] = jnp.where(good, old - lr * moments.direction(options, scale * g, grown, count), old)
        v[name] = jnp.where(good, moments.rounded(grown, second.dtype, count, 8), second)
    return params.replace(**p), state.replace(second=state.second.replace(**v))


def _by_feature(tree: SAEParams) -> SAEParams:
    return tree.replace(b_dec=None, W_skip=None)


def _down(faded: jax.Array, like: jax.Array) -> jax.Array:
    """A factor for each row, for arrays of rows."""
    return faded[:, None] if like.ndim == 2 else faded


def _turns(spec: SAESpec, rows: sparse.Rows):
    """How many turns until all rows are done, and what of an array of rows is taken at a turn."""
    room = len(rows.index_C)
    n = row_gradients.turns_of(spec, room)
    size = room // n
    return (sharding.most_of_members(-(-rows.count[0] // size)),
            lambda value, i: lax.dynamic_slice_in_dim(value, i * size, size))
