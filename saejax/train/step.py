"""One training step: a pure function of (state, batch), compiled once, state donated, no host synchronisation inside."""

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

from saejax import sharding
from saejax.config import Config, SAEOptions
from saejax.recipes import WITH_K
from saejax.sae import SAEParams, SAESpec, sparse
from saejax.sae.losses import LossInputs, LossParts
from saejax.sae.objectives import objective
from saejax.sae.params import from_tensors, tensors
from saejax.train import control, determinism, lazy, optim
from saejax.train.state import TrainState

SATURATED = 2**31  # dead counters stop here; uint32 leaves room for one more batch


@struct.dataclass
class Hyperparameters:
    """What may differ between SAEs that train as one program (float32 scalars): peak learning rate, lambda, L0 to aim at."""

    lr: jax.Array
    penalty: jax.Array
    target_l0: jax.Array

    @classmethod
    def of(cls, config: Config) -> "Hyperparameters":
        penalty = config.sae.sparsity if config.sae.kind == "jumprelu" else config.sae.l1
        return cls(*(jnp.float32(value) for value in (config.train.lr, penalty, config.train.target_l0)))


def make_step(config: Config, spec: SAESpec, total_steps: int, platform: str | None = None):
    """`step(state, rows_BW) -> (state, metrics)`; rows_BW: raw rows of `config.sae.hookpoints` side by side (any float dtype),
    sharded as `rows_at_rest`.

    metrics: device scalars loss, mse, l0, fvu, explained_variance, dead_fraction, grad_norm, lr, skipped, skipped_in_row, and the
    terms of the kind's own (docs/concepts.md); kinds with a penalty add its coefficient. A step whose loss or gradient is not
    finite leaves the state as it was but for its counters. Call it with the mesh set (`jax.set_mesh`).
    platform: that it is compiled for, where it is not the one that is here.
    """
    own = Hyperparameters.of(config)

    def train_step(state: TrainState, rows_BW: jax.Array):
        return one_step(config, spec, total_steps, own, state, rows_BW)

    return jax.jit(train_step, donate_argnums=0, compiler_options=determinism.compiler_options(config.train, platform))


def one_step(config: Config, spec: SAESpec, total_steps: int, own: Hyperparameters, state: TrainState,
             rows_BW: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
    """See `make_step`; `own` are values of the program, so that it can be mapped over them and over states."""
    rows_BW = state.normalization.apply(rows_BW)
    lr = own.lr * optim.learning_rate(config.train, total_steps)(state.step)
    penalty = own.penalty * optim.penalty_ramp(config.train, total_steps)(state.step)
    inputs = LossInputs(sparsity=penalty * control.penalty_factor(config, state.moving, own.target_l0, state.step, total_steps),
                        target_l0=own.target_l0, inverse_variance=state.inverse_variance,
                        tokens_since_fired_F=state.tokens_since_fired_F, dead_after=jnp.uint32(dead_bound(config)),
                        k_now=_k_now(config, spec, state.step, total_steps))
    allowed = state.skipped_in_row < config.train.max_skipped
    update = lazy.updated if config.train.lazy else _updated
    params, opt_state, parts, grad_norm, good = update(config, spec, state.params, state.opt_state, rows_BW, inputs, lr, allowed)
    shifts = control.shifts(config, spec, state.moving, own.target_l0, state.step, total_steps)
    params = from_tensors({name: value + jnp.where(good, shifts[name], 0.0) if name in shifts else value
                           for name, value in tensors(params).items()})
    counted_F = jnp.minimum(state.tokens_since_fired_F, jnp.uint32(SATURATED)) + jnp.uint32(len(rows_BW))
    rest = state.replace(params=None, opt_state=None)
    new = rest.replace(
        tokens_since_fired_F=jnp.where(parts.fired_F, 0, counted_F),
        moving=control.moved(config, state.moving, parts, state.step, own.target_l0, total_steps),
        ema=None if state.ema is None else _averaged(config.train.ema, state.ema, params, state.step))
    new = _where(good, new, rest).replace(
        params=params, opt_state=opt_state, step=state.step + 1, skipped=state.skipped + ~good,
        skipped_in_row=jnp.where(good, 0, state.skipped_in_row + 1))
    metrics = {
        "loss": parts.loss, "mse": parts.mse, "l0": parts.l0, "fvu": parts.fvu, "explained_variance": 1 - parts.fvu,
        "dead_fraction": (new.tokens_since_fired_F > jnp.uint32(dead_bound(config))).mean(dtype=jnp.float32),
        "grad_norm": grad_norm, "lr": lr, "skipped": new.skipped, "skipped_in_row": new.skipped_in_row, **parts.own,
        **{f"{name}_coefficient": inputs.sparsity for name in parts.own if name in ("l1", "sparsity")},
        **{name: value for name, value in new.moving.items() if name == "threshold"},
    }
    return new, metrics


def _k_now(config: Config, spec: SAESpec, step: jax.Array, total_steps: int) -> jax.Array | None:
    """k at this step of a program that keeps up to `sae.k_start` (`Program`), else none."""
    if spec.kind not in WITH_K or spec.k == config.sae.k:
        return None
    return optim.annealed_k(config.sae, optim.annealing_steps(config.sae, config.train, total_steps))(step)


def _updated(config: Config, spec: SAESpec, params: SAEParams, opt_state: tuple, rows_BW: jax.Array, inputs: LossInputs,
             lr: jax.Array, allowed: jax.Array):
    """(params, opt_state, LossParts, norm of the gradient, whether the step counts: `allowed`, loss and gradient finite)."""
    gradients, parts = _gradients(config, spec, params, rows_BW, inputs)
    gradients = optim.projected(config.sae, gradients, params)
    grad_norm = optax.tree.norm(gradients)
    updates, new_state = optim.optimizer(config.train).update(gradients, opt_state, params)
    new = optax.apply_updates(params, jax.tree.map(lambda update: -lr * update, updates))
    new = optim.constrained(config.sae, new)
    good = jnp.isfinite(parts.loss) & jnp.isfinite(grad_norm) & allowed
    return *_where(good, (new, new_state), (params, opt_state)), parts, grad_norm, good


def _where(condition: jax.Array, after, before):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), after, before)


def _gradients(config: Config, spec: SAESpec, params: SAEParams, rows_BW: jax.Array,
               inputs: LossInputs) -> tuple[SAEParams, LossParts]:
    """Gradients of the loss and what was seen, in `train.accumulate` parts one after the other: means, all features that fired.
    """
    def of_part(rows: jax.Array) -> tuple[SAEParams, LossParts]:
        def of(params: SAEParams):
            return objective(spec, config.sae, params, rows, inputs, as_pairs=takes_pairs(config, spec))

        (_, seen), gradients = jax.value_and_grad(of, has_aux=True)(params)
        return gradients, seen

    n = config.train.accumulate
    if n == 1:
        return of_part(rows_BW)
    # Every n-th row is a part: so each device keeps the rows that it has.
    parts_BnW = rows_BW.reshape(len(rows_BW) // n, n, -1)

    def add(total, i):
        rows = lax.dynamic_index_in_dim(parts_BnW, i, axis=1, keepdims=False)
        return jax.tree.map(jnp.add, total[0], (grown := of_part(rows))[0]), _merged(total[1], grown[1])

    first = of_part(parts_BnW[:, 0])
    (gradients, seen), _ = lax.scan(lambda total, i: (add(total, i), None), first, jnp.arange(1, n))
    fired_F, least = seen.fired_F, seen.least
    seen = jax.tree.map(lambda value: value / n, seen.replace(fired_F=jnp.float32(0)))
    return jax.tree.map(lambda gradient: gradient / n, gradients), seen.replace(fired_F=fired_F, least=least)


def takes_pairs(config: Config, spec: SAESpec | SAEOptions, shards: int | None = None, platform: str | None = None) -> bool:
    """Whether the step takes the sparse path (`train.sparse`): on the mesh and the hardware that are set, or on those named.

    Its sums are scatter-adds: not by choice where a GPU is to be deterministic.
    """
    if config.train.sparse == "never" or spec.kind not in WITH_K or config.sae.multi_topk:
        return False
    if config.train.sparse == "always" or config.train.lazy:
        return True
    ordered = determinism.compiler_options(config.train, platform) is not None
    return not ordered and sparse.pays(spec, shards or sharding.shards(), platform)


def _merged(a: LossParts, b: LossParts) -> LossParts:
    """Sums; features that fired in either; the smaller least activation."""
    total = jax.tree.map(jnp.add, a.replace(fired_F=jnp.float32(0)), b.replace(fired_F=jnp.float32(0)))
    return total.replace(fired_F=a.fired_F | b.fired_F, least=jnp.minimum(a.least, b.least))


def _averaged(beta: float, mean: SAEParams, params: SAEParams, step: jax.Array) -> SAEParams:
    """beta mean + (1 - beta) params; a plain mean at first, which is Gao et al.'s bias correction."""
    beta = jnp.minimum(beta, step / (step + 1))
    return jax.tree.map(lambda a, b: beta * a + (1 - beta) * b, mean, params)


def dead_bound(config: Config) -> int:
    """`sae.dead_tokens`, held below the saturation of the counters."""
    return min(config.sae.dead_tokens, SATURATED - 1)
