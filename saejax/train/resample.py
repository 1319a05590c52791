"""Resampling of dead features, exact at any dictionary size.

Source: Bricken et al. 2023, "Towards Monosemanticity", neuron resampling. For each dead feature an input is drawn with
probability ~ loss^2 from many batches; its direction becomes the decoder row, and the encoder row at 0.2 x the mean norm of
the alive encoder rows (of a transcoder the encoder row takes the direction of the input, the decoder row that of the target); the
bias becomes 0, what the kind keeps per feature becomes what it was at initialisation, and the optimizer forgets the row.

Two passes over the same stream of batches, so that no candidate input has to be kept: the first measures the loss of every
candidate row (one float each), the second carries the drawn rows to the devices that own the dead features.
"""

from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from saejax.base import sharding
from saejax.config import Config, ResampleOptions, SAEOptions
from saejax.sae import SAESpec, reconstruct
from saejax.sae.losses import squared_error
from saejax.sae.normalization import columns
from saejax.sae.params import SHARED, from_tensors, initial_per_feature, tensors
from saejax.train import determinism, optim
from saejax.train.state import TrainState
from saejax.train.step import dead_bound

ENCODER_SCALE = 0.2  # norm of a new encoder row over the mean norm of the alive ones. Source: Bricken et al. 2023


def due(options: ResampleOptions, tokens_before: int, tokens_after: int, tokens: int) -> bool:
    """True when a multiple of `every_tokens` lies in (tokens_before, tokens_after] and in the first half of the run's `tokens`:
    a new feature needs time to learn. Source: Bricken et al. 2023 (25, 50, 75 and 100 thousand of 200 thousand steps).
    """
    if options.every_tokens is None:
        return False
    last = min(tokens_after, tokens // 2)
    return tokens_before < last // options.every_tokens * options.every_tokens


def draw(losses_N: np.ndarray, n: int, seed: tuple[int, ...]) -> np.ndarray:
    """n candidate numbers, with replacement, p ~ loss^2 (float64 inverse transform; equal for every process count)."""
    cumulative = np.cumsum(np.square(losses_N.astype(np.float64)))
    uniform = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed))).random(n)
    return np.minimum(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"), len(losses_N) - 1)


def _row_losses(spec: SAESpec, state: TrainState, rows_BW: jax.Array) -> jax.Array:
    x_BD, y_BD = columns(spec, state.normalization.apply(sharding.gathered(rows_BW)))
    recon_BD, _ = reconstruct(spec, state.params, x_BD)
    return jax.sharding.reshard(squared_error(y_BD, recon_BD), jax.P())


def _place_rows(spec: SAESpec, options: SAEOptions, state: TrainState, rows_BW: jax.Array, source_F: jax.Array, first: jax.Array,
                encoder_norm: jax.Array, decoder_norm: jax.Array) -> TrainState:
    """Features whose source row lies in this batch get that row's direction; all others stay as they are."""
    rows_BW = jax.sharding.reshard(state.normalization.apply(rows_BW), jax.P())
    row_F = source_F - first
    here_F = (source_F >= 0) & (row_F >= 0) & (row_F < len(rows_BW))

    def directions(values_BD: jax.Array) -> jax.Array:
        unit_BD = values_BD / jnp.maximum(jnp.linalg.norm(values_BD, axis=1, keepdims=True), 1e-12)
        return unit_BD.at[jnp.where(here_F, row_F, 0)].get(out_sharding=sharding.spec("features", None))

    p, fresh = state.params, initial_per_feature(spec)
    x_BD, y_BD = columns(spec, rows_BW)
    decoder_FD = directions(y_BD - p.b_dec)
    encoder_FD = decoder_FD if spec.d_out is None else directions(x_BD)
    params = p.replace(
        W_dec=jnp.where(here_F[:, None], decoder_FD * (1.0 if options.unit_decoder else decoder_norm), p.W_dec),
        W_enc=jnp.where(here_F[:, None], encoder_FD * encoder_norm, p.W_enc),
        b_enc=jnp.where(here_F, 0.0, p.b_enc),
        per_feature={name: jnp.where(here_F, fresh[name], value) for name, value in p.per_feature.items()})
    def in_mean(mean: jax.Array, new: jax.Array) -> jax.Array:
        """A replaced row's mean starts anew: it would else be a mixture of the dead row and of this one."""
        return jnp.where(here_F.reshape(-1, *[1] * (new.ndim - 1)), new, mean)

    ema = state.ema and from_tensors({name: value if name in SHARED else in_mean(value, tensors(params)[name])
                                      for name, value in tensors(state.ema).items()})
    return state.replace(params=params, ema=ema, opt_state=optim.reset_rows(state.opt_state, here_F),
                         tokens_since_fired_F=jnp.where(here_F, 0, state.tokens_since_fired_F))


def _alive_norms(state: TrainState, dead_F: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean norms of the alive rows of W_enc and W_dec; of all rows where none is alive, since norms of 0 could never recover."""
    counted_F = ~dead_F | dead_F.all()

    def mean_norm(W):
        return jnp.where(counted_F, jnp.linalg.norm(W, axis=1), 0.0).sum() / counted_F.sum(dtype=jnp.float32)

    return mean_norm(state.params.W_enc), mean_norm(state.params.W_dec)


def resample(config: Config, spec: SAESpec, state: TrainState, batches: Iterable[Iterator[jax.Array]],
             occasion: int) -> tuple[TrainState, int]:
    """Replaces every dead feature of the state. Returns the new state and how many were replaced.

    batches: two iterators over the same sequence of device batches (raw rows, `rows_at_rest`), `sample_rows` rows in all.
    occasion: number of this resampling step, part of the random seed. Free decoders get the mean alive decoder norm, unit
    decoders norm 1. Call it with the mesh set, in every process.
    """
    dead_F = state.tokens_since_fired_F > np.uint32(dead_bound(config))
    dead = np.flatnonzero(sharding.to_host(dead_F))
    if len(dead) == 0:
        return state, 0
    first_pass, second_pass = batches
    row_losses = determinism.jit(_row_losses, config.train, static_argnums=0)
    place_rows = determinism.jit(_place_rows, config.train, static_argnums=(0, 1), donate_argnums=2)
    losses = [np.asarray(jax.device_get(row_losses(spec, state, x_BD))) for x_BD in first_pass]
    drawn = draw(np.concatenate(losses), len(dead), (config.seed, occasion, 0x5AE))
    source = np.full(spec.d_sae, -1, np.int32)
    source[dead] = drawn
    source_F = sharding.place(source, dead_F.sharding)
    encoder_norm, decoder_norm = determinism.jit(_alive_norms, config.train)(state, dead_F)
    encoder_norm = encoder_norm * ENCODER_SCALE
    wanted = np.unique(drawn)
    first = 0
    for x_BD, batch_losses in zip(second_pass, losses, strict=True):
        if np.any((wanted >= first) & (wanted < first + len(batch_losses))):
            state = place_rows(spec, config.sae, state, x_BD, source_F, jnp.int32(first), encoder_norm, decoder_norm)
        first += len(batch_losses)
    return state, len(dead)
