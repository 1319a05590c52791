"""Schedules, and the constraints on rows."""

import jax.numpy as jnp
import optax

from saejax.config import SAEOptions, TrainOptions
from saejax.sae.params import SAEParams


def learning_rate(options: TrainOptions, total_steps: int) -> optax.Schedule:
    """The share of the peak rate at a step: up to 1 over `lr_warmup`, 1, down to 0 over `lr_decay`.

    A cosine rises from 0.1 (Lieberum et al. 2024, Gemma Scope), a line from 0.
    """
    warmup, decay = round(options.lr_warmup * total_steps), round(options.lr_decay * total_steps)
    start, bend = {"linear": (0.0, lambda share: share),
                   "cosine": (0.1, lambda share: (1 - jnp.cos(jnp.pi * share)) / 2)}[options.lr_shape]

    def schedule(step):
        rise = bend(jnp.minimum(1.0, (step + 1) / (warmup + 1)))
        fall = bend(jnp.clip((total_steps - step) / max(decay, 1), 0.0, 1.0))
        return (start + (1 - start) * rise) * fall

    return schedule


def penalty_ramp(options: TrainOptions, total_steps: int) -> optax.Schedule:
    """The share of lambda at a step: linearly from 0 to 1 over the share `penalty_warmup` of the steps (April 2024: 5 %).

    Where lambda is steered at most 5 % too: a longer rise works against what steers it.
    """
    share = options.penalty_warmup if options.target_l0 is None else min(options.penalty_warmup, 0.05)
    warmup = max(round(share * total_steps), 1)
    return lambda step: jnp.minimum(1.0, step / warmup)


def annealing_steps(sae: SAEOptions, options: TrainOptions, total_steps: int) -> int:
    """How many steps k takes on its way from `k_start` to `k`."""
    return round(options.k_anneal * total_steps) if sae.k_start is not None else 0


def annealed_k(sae: SAEOptions, steps: int) -> optax.Schedule:
    """k after so many steps on the way from `k_start` to `k` over `steps`: evenly in the logarithm, rounded; int32."""
    def at(step):
        share = jnp.clip(step / steps, 0.0, 1.0)
        return jnp.round(sae.k_start * (sae.k / sae.k_start) ** share).astype(jnp.int32)

    return at


def projected(options: SAEOptions, gradients: SAEParams, params: SAEParams) -> SAEParams:
    """With unit decoder rows: the gradient of each row without its component along the row, which could only change the norm."""
    if not options.unit_decoder:
        return gradients
    along_F = (gradients.W_dec * params.W_dec).sum(1, keepdims=True)
    return gradients.replace(W_dec=gradients.W_dec - along_F * params.W_dec)


def constrained(options: SAEOptions, params: SAEParams) -> SAEParams:
    """With unit decoder rows: rows rescaled to norm 1 (a row at norm 0 stays)."""
    if not options.unit_decoder:
        return params
    norm = jnp.linalg.norm(params.W_dec, axis=1, keepdims=True)
    return params.replace(W_dec=params.W_dec / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
