"""One training step: a pure function of (state, batch), compiled once, state donated, no host synchronisation inside."""

import jax
import jax.numpy as jnp
import optax

from saejax import sharding
from saejax.config import Config
from saejax.sae import SAESpec
from saejax.sae.losses import LossInputs
from saejax.sae.objectives import objective
from saejax.train import optim
from saejax.train.state import TrainState, moved

SATURATED = 2**31  # dead counters stop here; uint32 leaves room for one more batch


def normalized(state: TrainState, rows_BW: jax.Array) -> jax.Array:
    """Raw rows resting over all devices -> float32 normalised rows split over `data` (one all-gather of [B, W] along `dict`)."""
    return state.normalization.apply(jax.sharding.reshard(rows_BW, sharding.spec("rows", None)))


def make_step(config: Config, spec: SAESpec, total_steps: int):
    """`step(state, rows_BW) -> (state, metrics)`; rows_BW: raw rows of `config.sae.hookpoints` side by side (any float dtype),
    sharded as `rows_at_rest`.

    metrics: device scalars loss, mse, l0, fvu, explained_variance, dead_fraction, grad_norm, lr, and the
    terms of the kind's own (docs/concepts.md); kinds with a penalty add its coefficient.
    Call it with the mesh set (`jax.set_mesh`).
    """
    tx = optim.optimizer(config.train, total_steps)
    lr = optim.learning_rate(config.train, total_steps)
    penalty = config.sae.sparsity if spec.kind == "jumprelu" else config.sae.l1
    sparsity = optim.l1_coefficient(config.train, penalty, total_steps)

    def step(state: TrainState, rows_BW: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        rows_BW = normalized(state, rows_BW)
        inputs = LossInputs(sparsity=sparsity(state.step), inverse_variance=state.inverse_variance,
                            tokens_since_fired_F=state.tokens_since_fired_F, dead_after=jnp.uint32(dead_bound(config)))
        (_, parts), gradients = jax.value_and_grad(
            lambda p: objective(spec, config.sae, p, rows_BW, inputs), has_aux=True)(state.params)
        if config.sae.unit_decoder:
            gradients = optim.without_parallel(gradients, state.params)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if config.sae.unit_decoder:
            params = optim.with_unit_decoder(params)
        counted_F = jnp.minimum(state.tokens_since_fired_F, jnp.uint32(SATURATED)) + jnp.uint32(len(rows_BW))
        since_F = jnp.where(parts.fired_F, 0, counted_F)
        metrics = {
            "loss": parts.loss, "mse": parts.mse, "l0": parts.l0, "fvu": parts.fvu,
            "explained_variance": 1 - parts.fvu,
            "dead_fraction": (since_F > jnp.uint32(dead_bound(config))).mean(dtype=jnp.float32),
            "grad_norm": optax.tree.norm(gradients), "lr": lr(state.step),
        }
        metrics |= parts.own | {f"{name}_coefficient": inputs.sparsity for name in parts.own if name in ("l1", "sparsity")}
        moving = moved(state.moving, parts.least, state.step, config.sae.threshold_beta)
        metrics |= moving
        state = state.replace(moving=moving)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state, tokens_since_fired_F=since_F), metrics

    return jax.jit(step, donate_argnums=0)


def dead_bound(config: Config) -> int:
    """`sae.dead_tokens`, held below the saturation of the counters."""
    return min(config.sae.dead_tokens, SATURATED - 1)
