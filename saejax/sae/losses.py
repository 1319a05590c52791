"""Objectives: one pure function of (params, batch, state) per kind, returning the loss and what was seen on the way."""

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from saejax.sae.activations import activate, topk
from saejax.sae.model import decode, pre_activations
from saejax.sae.params import SAEParams, SAESpec


@struct.dataclass
class LossInputs:
    """What an objective reads besides params and batch.

    l1: lambda at this step. inverse_variance: 1 / E||x - E x||^2 of the normalised data (a constant of the run).
    tokens_since_fired_F, dead_after: counters before this batch, and the bound beyond which a feature counts as dead.
    """

    l1: jax.Array
    inverse_variance: jax.Array
    tokens_since_fired_F: jax.Array
    dead_after: jax.Array


@struct.dataclass
class LossParts:
    """Scalars of a batch for the log, and which features fired [F]."""

    loss: jax.Array
    mse: jax.Array
    l1: jax.Array
    aux: jax.Array
    l0: jax.Array
    fvu: jax.Array
    fired_F: jax.Array


def squared_error(x_BD: jax.Array, recon_BD: jax.Array) -> jax.Array:
    """||x - recon||^2 per row [B], summed over d_in."""
    return jnp.square(x_BD - recon_BD).sum(-1)


def variance_total(x_BD: jax.Array) -> jax.Array:
    """sum_b ||x_b - mean_b x||^2, the denominator of the batch's FVU."""
    return jnp.square(x_BD - x_BD.mean(0)).sum()


def objective(spec: SAESpec, params: SAEParams, x_BD: jax.Array, inputs: LossInputs, aux_k: int,
              aux_coef: float) -> tuple[jax.Array, LossParts]:
    """The loss of a kind.

    relu:  mean_b [ ||x - x^||^2 + lambda sum_i f_i ||W_dec,i|| ]      (Templeton et al. 2024, "Our SAE training")
    topk:  mean_b ||x - x^||^2 / Var(x) + aux_coef * aux               (Gao et al. 2024, sections 2.3 and A.2)
    """
    pre_BF = pre_activations(spec, params, x_BD)
    acts_BF = activate(spec, pre_BF)
    recon_BD = decode(spec, params, acts_BF)
    errors_B = squared_error(x_BD, recon_BD)
    mse = errors_B.mean()
    fired_F = (acts_BF > 0).any(0)
    zero = jnp.zeros((), jnp.float32)
    l1, aux = zero, zero
    if spec.kind == "relu":
        l1 = (acts_BF.sum(0) * jnp.linalg.norm(params.W_dec, axis=1)).sum() / x_BD.shape[0]
        loss = mse + inputs.l1 * l1
    else:
        loss = mse * inputs.inverse_variance
        if aux_k:
            aux = aux_loss(spec, params, pre_BF, lax.stop_gradient(x_BD - recon_BD), fired_F, inputs, aux_k)
            loss = loss + aux_coef * aux
    l0 = (acts_BF > 0).sum(dtype=jnp.float32) / x_BD.shape[0]
    fvu = errors_B.sum() / variance_total(x_BD)
    return loss, LossParts(loss=loss, mse=mse, l1=l1, aux=aux, l0=l0, fvu=fvu, fired_F=fired_F)


def aux_loss(spec: SAESpec, params: SAEParams, pre_BF: jax.Array, error_BD: jax.Array, fired_F: jax.Array,
             inputs: LossInputs, aux_k: int) -> jax.Array:
    """AuxK: how much of the residual error the k_aux best dead features leave unexplained.

    aux = ||e - e^||^2 / ||e - mean e||^2, e = stop_gradient(x - x^), e^ = topk_aux(pre of dead features) W_dec; 0 when
    nothing is dead (the branch is then not computed) or when the ratio is not finite. Source: Gao et al. 2024, A.2.
    """
    dead_F = (inputs.tokens_since_fired_F > inputs.dead_after) & ~fired_F

    def of_dead(params, pre_BF):
        dead_pre_BF = jnp.where(dead_F, pre_BF, -jnp.inf)
        acts_BF = jnp.where(dead_F, topk(dead_pre_BF, min(aux_k, spec.d_sae)), 0.0)
        estimate_BD = decode(spec, params, acts_BF) - params.b_dec
        ratio = squared_error(error_BD, estimate_BD).sum() / variance_total(error_BD)
        return jnp.where(jnp.isfinite(ratio), ratio, 0.0)

    # Recomputed in the backward pass: residuals of a branch that is not taken would still be written out as zeros.
    return lax.cond(dead_F.any(), jax.checkpoint(of_dead), lambda params, pre_BF: jnp.zeros((), jnp.float32), params, pre_BF)
