"""What the objectives of all kinds share: what they read, what they report, error measures and AuxK."""

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from saejax import sharding
from saejax.sae import sparse
from saejax.sae.activations import topk
from saejax.sae.model import decode
from saejax.sae.params import SAEParams, SAESpec


@struct.dataclass
class LossInputs:
    """What an objective reads besides params and batch.

    sparsity: lambda at this step. target_l0: what jumprelu's objective of that name aims at. inverse_variance:
    1 / E||x - E x||^2 of the normalised data (a constant of the run). threshold: running threshold of a kind with k, else 0.
    tokens_since_fired_F, dead_after: counters before this batch, and the bound beyond which a feature counts as dead.
    """

    sparsity: jax.Array
    target_l0: jax.Array
    threshold: jax.Array
    inverse_variance: jax.Array
    tokens_since_fired_F: jax.Array
    dead_after: jax.Array


@struct.dataclass
class LossParts:
    """Scalars of a batch for the log, and which features fired [F].

    own: terms that only this kind has, by name. least: the smallest positive activation (infinite where there is none). above:
    mean number of pre-activations per row above `LossInputs.threshold`.
    """

    loss: jax.Array
    mse: jax.Array
    l0: jax.Array
    fvu: jax.Array
    fired_F: jax.Array
    own: dict[str, jax.Array]
    least: jax.Array
    above: jax.Array


def squared_error(x_BD: jax.Array, recon_BD: jax.Array) -> jax.Array:
    """||x - recon||^2 per row [B], summed over d_in."""
    return jnp.square(x_BD - recon_BD).sum(-1)


def variance_total(x_BD: jax.Array) -> jax.Array:
    """sum_b ||x_b - mean_b x||^2, the denominator of the batch's FVU."""
    return jnp.square(x_BD - x_BD.mean(0)).sum()


def aux_loss(spec: SAESpec, params: SAEParams, seen: jax.Array, error_BD: jax.Array, fired_F: jax.Array, inputs: LossInputs,
             aux_k: int, *, as_pairs: bool = False) -> jax.Array:
    """AuxK: how much of the residual error the k_aux best dead features leave unexplained.

    aux = ||e - e^||^2 / ||e - mean e||^2, e = stop_gradient(x - x^), e^ = topk_aux(pre of dead features) W_dec; 0 when
    nothing is dead (the branch is then not computed; of SAEs that train as one program, for none of them) or when the ratio is
    not finite. seen: pre-activations, on the sparse path the inputs: there the encoder's product is done once more when
    something is dead. Source: Gao et al. 2024, A.2.
    """
    dead_F = (inputs.tokens_since_fired_F > inputs.dead_after) & ~fired_F
    k = min(aux_k, spec.d_sae)

    def of_dead(params, seen):
        if as_pairs:
            pairs, _, _ = sparse.encode(spec, params, seen, k, inputs.threshold, allowed_F=dead_F)
            estimate_BD = sparse.decode(spec, params, pairs)
        else:  # relu(-inf) = 0 where fewer are dead
            estimate_BD = decode(spec, params, topk(jnp.where(dead_F, seen, -jnp.inf), k))
        ratio = squared_error(error_BD, estimate_BD - params.b_dec).sum() / variance_total(error_BD)
        # Under `vmap` the branch is also taken where only another SAE has dead features.
        return jnp.where(jnp.isfinite(ratio) & dead_F.any(), ratio, 0.0)

    # Recomputed in the backward pass: residuals of a branch that is not taken would still be written out as zeros.
    recomputed = jax.checkpoint(of_dead, policy=jax.checkpoint_policies.save_only_these_names(sparse.SAVED))
    return lax.cond(sharding.any_member(dead_F.any()), recomputed,
                    lambda params, seen: jnp.zeros((), jnp.float32), params, seen)
