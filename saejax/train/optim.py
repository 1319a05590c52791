"""Schedules, and the constraints on rows."""

import jax
import jax.numpy as jnp
import optax

from saejax.config import SAEOptions, TrainOptions
from saejax.sae.params import SAEParams
from saejax.train.control import APPROACH


def learning_rate(options: TrainOptions, total_steps: int) -> optax.Schedule:
    """The share of the peak rate at a step: from `lr_start` up to 1 over `lr_warmup`, 1, down to `lr_end` over `lr_decay`."""
    warmup, decay = round(options.lr_warmup * total_steps), round(options.lr_decay * total_steps)
    bend = {"linear": lambda share: share, "cosine": lambda share: (1 - jnp.cos(jnp.pi * share)) / 2}[options.lr_shape]

    def schedule(step):
        rise = bend(jnp.minimum(1.0, (step + 1) / (warmup + 1)))
        fall = bend(jnp.clip((total_steps - step) / max(decay, 1), 0.0, 1.0))
        return (options.lr_start + (1 - options.lr_start) * rise) * (options.lr_end + (1 - options.lr_end) * fall)

    return schedule


def penalty_ramp(options: TrainOptions, total_steps: int) -> optax.Schedule:
    """The share of lambda at a step: linearly from 0 to 1 over the share `l1_warmup` of the steps (April 2024: 5 %).

    Where L0 is aimed at no longer than the goal moves, half of the run: after that a rise would work against what steers it.
    """
    share = min(options.l1_warmup, APPROACH) if options.target_l0 else options.l1_warmup
    warmup = max(round(share * total_steps), 1)
    return lambda step: jnp.minimum(1.0, step / warmup)


def annealing_steps(sae: SAEOptions, options: TrainOptions, total_steps: int) -> int:
    """How many steps k takes on its way from `k_start` to `k`."""
    return round(options.k_anneal * total_steps) if sae.k_start else 0


def annealed_k(sae: SAEOptions, steps: int) -> optax.Schedule:
    """k after so many steps on the way from `k_start` to `k` over `steps`: evenly in the logarithm, rounded; int32."""
    def at(step):
        share = jnp.clip(step / steps, 0.0, 1.0)
        return jnp.round(sae.k_start * (sae.k / sae.k_start) ** share).astype(jnp.int32)

    return at


def _without(W: jax.Array, direction: jax.Array) -> jax.Array:
    return W - (W * direction).sum(1, keepdims=True) * direction


def projected(options: SAEOptions, gradients: SAEParams, params: SAEParams) -> SAEParams:
    """With unit decoder rows: the gradient of each row without its component along the row, which could only change the norm;
    with aligned rows the same of the encoder's gradient, which could only change the inner product.
    """
    if options.unit_decoder:
        gradients = gradients.replace(W_dec=_without(gradients.W_dec, params.W_dec))
    if options.align:
        gradients = gradients.replace(W_enc=_without(gradients.W_enc, params.W_dec))
    return gradients


def constrained(options: SAEOptions, params: SAEParams) -> SAEParams:
    """Decoder rows rescaled to norm 1 (a row at norm 0 stays); of aligned SAEs the encoder rows moved along them to w_enc . w_dec
    = 1.
    """
    if options.unit_decoder:
        norm = jnp.linalg.norm(params.W_dec, axis=1, keepdims=True)
        params = params.replace(W_dec=params.W_dec / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
    if options.align:
        params = params.replace(W_enc=_without(params.W_enc, params.W_dec) + params.W_dec)
    return params


def reset_rows(opt_state, rows_F: jax.Array):
    """Zeroes Adam's moments of the marked features in every parameter that has a row per feature; the others' stay."""

    def reset(kept: SAEParams) -> SAEParams:
        return kept.replace(
            W_enc=jnp.where(rows_F[:, None], 0.0, kept.W_enc), b_enc=jnp.where(rows_F, 0.0, kept.b_enc),
            W_dec=jnp.where(rows_F[:, None], 0.0, kept.W_dec),
            per_feature={name: jnp.where(rows_F, 0.0, value) for name, value in kept.per_feature.items()})

    return jax.tree.map(lambda node: reset(node) if isinstance(node, SAEParams) else node, opt_state,
                        is_leaf=lambda node: isinstance(node, SAEParams))
