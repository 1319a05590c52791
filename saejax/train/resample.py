"""Resampling of dead features, exact at any dictionary size.

Source: Bricken et al. 2023, "Towards Monosemanticity", neuron resampling. For each dead feature an input is drawn with
probability ~ loss^2 from many batches; its direction becomes the decoder row, and the encoder row at 0.2 x the mean norm of
the alive encoder rows (of a transcoder the encoder row takes the direction of the input, the decoder row that of the target); the
bias becomes 0, what the kind keeps per feature becomes what it was at initialisation, and the optimizer forgets the row.

Two passes over the same stream of batches, so that no candidate input has to be kept: the first measures the loss of every
candidate row (one float each), the second carries the drawn rows to the devices that own the dead features. Neither makes an
array of rows x features, and only rows of dead features are written.
"""

from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from saejax.base import sharding
from saejax.config import Config, ResampleOptions, SAEOptions
from saejax.sae import SAEParams, SAESpec
from saejax.sae.losses import squared_error
from saejax.sae.measuring import measured
from saejax.sae.normalization import columns
from saejax.sae.params import from_tensors, initial_per_feature, tensors
from saejax.train import determinism
from saejax.train.state import TrainState
from saejax.train.step import dead_bound

_AT_ONCE = 4096  # features that are replaced by one call
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
    x_BD, y_BD = columns(spec, state.normalization.apply(rows_BW))
    found = measured(spec, state.params, x_BD, jnp.ones(len(x_BD), bool))
    return jax.sharding.reshard(squared_error(y_BD, found.recon_BD), jax.P())


def _place_rows(spec: SAESpec, options: SAEOptions, state: TrainState, rows_BW: jax.Array, feature_C: jax.Array, row_C: jax.Array,
                norms: tuple[jax.Array, jax.Array]) -> TrainState:
    """Gives features the directions of rows of this batch; only what belongs to them is written. feature_C, row_C: which feature
    gets which row; a feature that there is not stands for none. norms: of new rows of W_enc and W_dec.
    """
    chosen_CW = state.normalization.apply(rows_BW.at[row_C].get(out_sharding=jax.P()))
    encoder_norm, decoder_norm = norms

    def directions(values_CD: jax.Array) -> jax.Array:
        return values_CD / jnp.maximum(jnp.linalg.norm(values_CD, axis=1, keepdims=True), 1e-12)

    p, fresh = state.params, initial_per_feature(spec)
    x_CD, y_CD = columns(spec, chosen_CW)
    decoder_CD = directions(y_CD - p.b_dec)
    encoder_CD = decoder_CD if spec.d_out is None else directions(x_CD)
    new = {"W_dec": decoder_CD * (1.0 if options.unit_decoder else decoder_norm), "W_enc": encoder_CD * encoder_norm,
           "b_enc": 0.0, **{name: fresh[name] for name in p.per_feature}}

    def put(tree: SAEParams | None, values: dict) -> SAEParams | None:
        """In a mean of the parameters a replaced row starts anew: it would else be a mixture of the dead row and of this one."""
        if tree is None:
            return None
        kept = tensors(tree)
        return from_tensors(kept | _written({name: kept[name] for name in values}, values, feature_C))

    nothing = dict.fromkeys(new, 0.0)
    moments = state.opt_state.replace(first=put(state.opt_state.first, nothing), second=put(state.opt_state.second, nothing))
    since_F = _written({"": state.tokens_since_fired_F}, {"": 0}, feature_C)[""]
    return state.replace(params=put(p, new), ema=put(state.ema, new), opt_state=moments, tokens_since_fired_F=since_F)


def _written(values: dict[str, jax.Array], new: dict[str, jax.Array | float], feature_C: jax.Array) -> dict[str, jax.Array]:
    """Arrays by feature with what is new of these features, on the devices that hold them."""
    def local(values, new, feature_C, shards):
        F = len(next(iter(values.values())))
        place_C = feature_C - (jax.lax.axis_index("dict") * F if shards > 1 else 0)
        place_C = jnp.where((place_C >= 0) & (place_C < F), place_C, F)
        return {name: value.at[place_C].set(jnp.asarray(new[name], value.dtype), mode="drop") for name, value in values.items()}

    where = {name: sharding.spec("features", *[None] * (value.ndim - 1)) for name, value in values.items()}
    return sharding.on_shards(local, (where, {name: jax.P() for name in new}, jax.P()), where)(values, new, feature_C)


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
    encoder_norm, decoder_norm = determinism.jit(_alive_norms, config.train)(state, dead_F)
    norms, first, order = (encoder_norm * ENCODER_SCALE, decoder_norm), 0, np.argsort(drawn, kind="stable")
    for x_BD, batch_losses in zip(second_pass, losses, strict=True):
        last = first + len(batch_losses)
        here = order[slice(*np.searchsorted(drawn[order], (first, last)))]
        for a in range(0, len(here), _AT_ONCE):
            some = here[a:a + _AT_ONCE]
            pairs = _padded(dead[some], drawn[some] - first, spec.d_sae)
            state = place_rows(spec, config.sae, state, x_BD, *pairs, norms)
            jax.block_until_ready(state.tokens_since_fired_F)  # simulated devices get stuck with many collectives under way
        first = last
    return state, len(dead)


def _padded(features: np.ndarray, rows: np.ndarray, none: int) -> tuple[np.ndarray, np.ndarray]:
    """One length, so that one program does for all."""
    more = (0, _AT_ONCE - len(features))
    return np.pad(features.astype(np.int32), more, constant_values=none), np.pad(rows.astype(np.int32), more)
