"""One training step: a pure function of (state, batch), compiled once, state donated, no host synchronisation inside."""

import dataclasses

import jax
import jax.numpy as jnp

from saejax.config import Config, SAEOptions
from saejax.config.recipes import WITH_K
from saejax.sae import SAEParams, SAESpec, sparse
from saejax.sae.losses import LossInputs
from saejax.sae.objectives import objective
from saejax.sae.row_gradients import merged, parts_of
from saejax.train import control, determinism, optim, rows
from saejax.train.hyperparameters import Hyperparameters, alike
from saejax.train.moments import Moments
from saejax.train.state import TrainState

SATURATED = 2**31  # dead counters stop here; uint32 leaves room for one more batch
MAX_SKIPPED = 10  # steps in a row with a non-finite loss or gradient, each left out, that stop a run


@dataclasses.dataclass(frozen=True)
class Step:
    """A `shared_step` with the hyperparameters of one config: `step(state, rows_BW) -> (state, metrics)`."""

    shared: jax.stages.Wrapped
    own: Hyperparameters

    def __call__(self, state: TrainState, rows_BW: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        return self.shared(state, rows_BW, self.own)

    def trace(self, state: TrainState, rows_BW: jax.Array) -> jax.stages.Traced:
        return self.shared.trace(state, rows_BW, self.own)

    def lower(self, state: TrainState, rows_BW: jax.Array) -> jax.stages.Lowered:
        return self.shared.lower(state, rows_BW, self.own)


def make_step(config: Config, spec: SAESpec, total_steps: int, platform: str | None = None) -> Step:
    """The step of one SAE, see `shared_step`."""
    return Step(shared_step(config, spec, total_steps, platform), Hyperparameters.of(config))


def shared_step(config: Config, spec: SAESpec, total_steps: int, platform: str | None = None) -> jax.stages.Wrapped:
    """`step(state, rows_BW, own) -> (state, metrics)` of all SAEs whose configs are `alike`; the state is donated.

    rows_BW: raw rows of `config.sae.hookpoints` side by side (any float dtype), sharded as `rows_at_rest`. own: its
    `Hyperparameters`.

    metrics: device scalars loss, mse, l0, fvu, explained_variance, dead_fraction, grad_norm, lr, skipped, skipped_in_row, and the
    terms of the kind's own (docs/explanation/concepts.md); kinds with a penalty add its coefficient. A step whose loss or
    gradient is not finite leaves the state as it was but for its counters. Call it with the mesh set (`jax.set_mesh`).
    platform: that it is compiled for, where it is not the one that is here.
    """
    config = alike(config)

    def train_step(state: TrainState, rows_BW: jax.Array, own: Hyperparameters):
        return one_step(config, spec, total_steps, own, state, rows_BW)

    return jax.jit(train_step, donate_argnums=0, compiler_options=determinism.compiler_options(config.train, platform))


def one_step(config: Config, spec: SAESpec, total_steps: int, own: Hyperparameters, state: TrainState,
             rows_BW: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
    """What `shared_step` compiles."""
    rows_BW = state.normalization.apply(rows_BW)
    lr = own.lr * optim.learning_rate(config.train, total_steps)(state.step)
    penalty = own.penalty * optim.penalty_ramp(config.train, total_steps)(state.step)
    inputs = LossInputs(sparsity=penalty * control.penalty_factor(state.moving, own.target_l0, state.step, total_steps),
                        target_l0=own.target_l0, inverse_variance=state.inverse_variance,
                        tokens_since_fired_F=state.tokens_since_fired_F, dead_after=jnp.uint32(dead_bound(config)),
                        k_now=_k_now(config, spec, state.step, total_steps))
    allowed = state.skipped_in_row < MAX_SKIPPED
    update = rows.updated if takes_pairs(config, spec) else _updated
    step = rows.Step(config, spec, inputs, lr, allowed)
    params, opt_state, parts, grad_norm, good = update(step, state.params, state.opt_state, rows_BW)
    counted_F = jnp.minimum(state.tokens_since_fired_F, jnp.uint32(SATURATED)) + jnp.uint32(len(rows_BW))
    rest = state.replace(params=None, opt_state=None)
    new = rest.replace(
        tokens_since_fired_F=jnp.where(parts.fired_F, 0, counted_F),
        moving=control.moved(state.moving, parts, state.step, own.target_l0, total_steps),
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
    """k at this step of a program that keeps up to `sae.k_start` (`Member.step`), else none."""
    if spec.kind not in WITH_K or spec.k == config.sae.k:
        return None
    return optim.annealed_k(config.sae, optim.annealing_steps(config.sae, config.train, total_steps))(step)


def _updated(step: rows.Step, params: SAEParams, opt_state: Moments, rows_BW: jax.Array) -> rows.Updated:
    """A step on the dense path: gradients by differentiation, means over `train.accumulate` parts."""
    spec, options, inputs = step.spec, step.config.sae, step.inputs

    def of_part(i):
        def of(params: SAEParams):
            return objective(spec, options, params, batch.rows(i), inputs)

        (_, seen), gradient = jax.value_and_grad(of, has_aux=True)(params)
        return gradient, seen

    batch = parts_of(spec, params, rows_BW, step.config.train.accumulate)
    if batch.n > 1 and options.aux_k:  # what fires in any part is not dead in the others
        alone = dataclasses.replace(options, aux_k=0)
        _, fired_nF = batch.over(lambda i: ((), objective(spec, alone, params, batch.rows(i), inputs)[1].fired_F))
        inputs = inputs.replace(tokens_since_fired_F=jnp.where(fired_nF.any(0), 0, inputs.tokens_since_fired_F))
    gradient, seen = batch.over(of_part)
    return rows.applied(step, params, opt_state, rows.Gradient(gradient, gradient), merged(seen))


def _where(condition: jax.Array, after, before):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), after, before)


def takes_pairs(config: Config, spec: SAESpec | SAEOptions, platform: str | None = None) -> bool:
    """Whether the step takes the sparse path (`train.path`), on the hardware that is here, or on that which is named.

    Its sums are scatter-adds: not by choice where a GPU is to be deterministic.
    """
    if config.train.path == "dense" or spec.kind not in WITH_K or config.sae.multi_topk:
        return False
    if config.train.path == "sparse" or config.train.lazy:
        return True
    ordered = determinism.compiler_options(config.train, platform) is not None
    return not ordered and sparse.pays(spec, platform)


def _averaged(beta: float, mean: SAEParams, params: SAEParams, step: jax.Array) -> SAEParams:
    """beta mean + (1 - beta) params; a plain mean at first, which is Gao et al.'s bias correction."""
    beta = jnp.minimum(beta, step / (step + 1))
    return jax.tree.map(lambda a, b: beta * a + (1 - beta) * b, mean, params)


def dead_bound(config: Config) -> int:
    """`sae.dead_tokens`, held below the saturation of the counters."""
    return min(config.sae.dead_tokens, SATURATED - 1)
