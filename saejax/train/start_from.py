"""Step 0 of a run that goes on from a dictionary that is there (`train.init_from`), of this library or another."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from saejax.base.errors import ConfigError
from saejax.config import Config
from saejax.sae import SAEParams, SAESpec
from saejax.sae.folding import decoder_norms, with_pre_bias
from saejax.sae.inference import SAE, unfold
from saejax.sae.normalization import Normalization
from saejax.sae.row_norm import NONE
from saejax.train.determinism import compiler_options
from saejax.train.state import TrainState

Load = Callable[..., SAE]  # `saejax.load(path, mesh=...)`, which is a room above this one
_EQUAL_NORMS = 1e-3


def started_from(state: TrainState, config: Config, spec: SAESpec, mesh: Mesh, load: Load | None) -> TrainState:
    """The initial state with the parameters of `config.train.init_from`, in the units of the run's normalisation.

    Moments, dead counters and steps start from zero. Every device reads its own rows. Raises `ConfigError` that names every
    difference in kind or shape, and what cannot be trained on (row normalisation, decoder norms that must be unit).
    """
    key = f"config.train.init_from: {config.train.init_from}"
    if load is None:
        raise ConfigError(f"{key}: give `load=saejax.load` to `train`, which knows the formats")
    sae = load(config.train.init_from, mesh=mesh)
    c = sae.cfg
    pairs = {"kind": (c.kind, spec.kind), "d_in": (c.d_in, spec.d_in), "d_sae": (c.d_sae, spec.d_sae),
             "d_out": (c.d_out, spec.d_out), "skip": (c.skip, spec.skip), "layers": (c.layers, spec.layers),
             "input_norm": (c.input_norm, NONE)}
    wrong = [f"{name} {has!r}, this run has {wants!r}" for name, (has, wants) in pairs.items() if has != wants]
    if wrong:
        raise ConfigError(f"{key}: {'; '.join(wrong)}; set the keys of config.sae to those of the dictionary")
    norms = decoder_norms(sae.params)
    if config.sae.unit_decoder and spec.kind == "topk" and float(norms.max() - norms.min()) > _EQUAL_NORMS * float(norms.max()):
        raise ConfigError(f"{key}: its decoder rows have norms {float(norms.min()):.3g} to {float(norms.max()):.3g}, and "
                          "making them unit "
                          "would change what topk selects; set config.sae.unit_decoder to False")
    with jax.set_mesh(mesh):
        make = functools.partial(_parameters, spec, config.sae.unit_decoder, c.pre_bias)
        params = jax.jit(make, compiler_options=compiler_options(config.train))(sae.params, state.normalization)
        ema = jax.tree.map(jnp.copy, params) if state.ema is not None else None  # the step donates both
    return state.replace(params=jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, state.params), ema=ema)


def _parameters(spec: SAESpec, unit: bool, pre_bias: bool, params: SAEParams, normalization: Normalization) -> SAEParams:
    return unfold(spec, with_pre_bias(params, pre_bias, spec.pre_bias), normalization, unit_decoder=unit)
