"""Learning-rate and penalty schedules, Adam through optax, and the unit-norm decoder."""

import jax
import jax.numpy as jnp
import optax

from saejax.config import TrainOptions
from saejax.sae.params import SAEParams


def learning_rate(options: TrainOptions, total_steps: int) -> optax.Schedule:
    """Linear rise over `lr_warmup`, constant, linear fall to 0 over `lr_decay` (shares of the steps)."""
    warmup, decay = round(options.lr_warmup * total_steps), round(options.lr_decay * total_steps)

    def schedule(step):
        rise = jnp.minimum(1.0, (step + 1) / (warmup + 1))
        fall = jnp.clip((total_steps - step) / max(decay, 1), 0.0, 1.0)
        return options.lr * rise * fall

    return schedule


def l1_coefficient(options: TrainOptions, l1: float, total_steps: int) -> optax.Schedule:
    """lambda rising linearly from 0 over the share `l1_warmup` of the steps (April 2024: 5 %)."""
    warmup = max(round(options.l1_warmup * total_steps), 1)
    return lambda step: l1 * jnp.minimum(1.0, step / warmup)


def optimizer(options: TrainOptions, total_steps: int) -> optax.GradientTransformation:
    """Clip by the global gradient norm, then Adam without weight decay, then the learning-rate schedule."""
    schedule = learning_rate(options, total_steps)
    chain = [optax.clip_by_global_norm(options.clip)] if options.clip else []
    chain.append(optax.scale_by_adam(options.beta1, options.beta2, options.eps))
    chain.append(optax.scale_by_schedule(lambda step: -schedule(step)))
    return optax.chain(*chain)


def without_parallel(gradients: SAEParams, params: SAEParams) -> SAEParams:
    """Removes from each decoder row's gradient its component along the (unit) row: it could only change the norm."""
    along_F = (gradients.W_dec * params.W_dec).sum(1, keepdims=True)
    return gradients.replace(W_dec=gradients.W_dec - along_F * params.W_dec)


def with_unit_decoder(params: SAEParams) -> SAEParams:
    """Decoder rows rescaled to norm 1; a row at norm 0 stays."""
    norm = jnp.linalg.norm(params.W_dec, axis=1, keepdims=True)
    return params.replace(W_dec=params.W_dec / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))


def reset_rows(opt_state, rows_F: jax.Array):
    """Zeroes Adam's moments of the marked features in every parameter that has a row per feature; the others' stay."""

    def reset(moments: SAEParams) -> SAEParams:
        return moments.replace(
            W_enc=jnp.where(rows_F[:, None], 0.0, moments.W_enc), b_enc=jnp.where(rows_F, 0.0, moments.b_enc),
            W_dec=jnp.where(rows_F[:, None], 0.0, moments.W_dec),
            per_feature={name: jnp.where(rows_F, 0.0, value) for name, value in moments.per_feature.items()})

    return jax.tree.map(lambda node: reset(node) if isinstance(node, SAEParams) else node, opt_state,
                        is_leaf=lambda node: isinstance(node, SAEParams))
