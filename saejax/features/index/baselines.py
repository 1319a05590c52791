"""What features are held against, each as an `SAE`: so that index, examples and judging are the same code for all of them.

| name | what fires |
|---|---|
| `neurons` | hidden units of the MLP below the SAE's hookpoint: max(h, 0) of up to 256, drawn by seed |
| `directions` | max(w . (x - mean), 0) of 256 uniformly random unit vectors w |
| `random_sae` | a topk SAE of the same size with random unit rows on centred rows, tied: what training starts from |

neurons: Templeton et al. 2024 compare with neurons of the previous layer; the other two are added here.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax.base.errors import FeatureIndexError
from saejax.lm import LM, check_hookpoint, layer_of, width_of
from saejax.sae import SAEParams
from saejax.sae.inference import SAE, SAEConfig

NAMES = ("neurons", "directions", "random_sae")
UNITS = 256


def make(name: str, sae: SAE, lm_: LM, *, mean_D: np.ndarray | None, k: int, seed: int, mesh: Mesh | None) -> SAE:
    """The baseline of an SAE. mean_D: of the rows that it reads (not needed for neurons). k: active features a token of
    `random_sae`. Equal arguments give equal parameters. Raises `FeatureIndexError` where the hookpoint has no MLP below it.
    """
    if name == "neurons":
        return neurons(sae, lm_, seed, mesh)
    count = UNITS if name == "directions" else sae.cfg.d_sae
    rng = np.random.default_rng(seed)
    W_FD = rng.standard_normal((count, sae.cfg.d_in), np.float32)
    W_FD /= np.linalg.norm(W_FD, axis=1, keepdims=True)
    mean_D = np.asarray(mean_D, np.float32)
    params = SAEParams(W_enc=jnp.asarray(W_FD), b_enc=jnp.asarray(-W_FD @ mean_D), W_dec=jnp.asarray(W_FD),
                       b_dec=jnp.asarray(mean_D))
    kind, k = ("relu", 0) if name == "directions" else ("topk", min(max(1, k), count))
    return SAE(params, SAEConfig(kind, sae.cfg.d_in, count, k, False, sae.cfg.hookpoints, sae.cfg.model,
                                 metadata={"baseline": name, "seed": seed}), mesh)


def neurons(sae: SAE, lm_: LM, seed: int, mesh: Mesh | None) -> SAE:
    """Hidden units as a transcoder from `mlp.hook_post` to `hook_mlp_out`: encoder rows pick units, decoder rows the MLP's."""
    layer = below(sae.cfg.hookpoints[0])
    if layer is None or layer < 0:
        raise FeatureIndexError(f"baseline=neurons: there is no MLP below {sae.cfg.hookpoints[0]}; choose directions or "
                                "random_sae")
    source, target = f"blocks.{layer}.mlp.hook_post", f"blocks.{layer}.hook_mlp_out"
    check_hookpoint(lm_.cfg, source)
    width = width_of(lm_.cfg, source)
    units = np.sort(np.random.default_rng(seed).permutation(width)[:UNITS])
    down_FD = np.asarray(jax.device_get(lm_.model.blocks["down"][...][layer]), np.float32)[units]
    params = SAEParams(W_enc=jnp.asarray(np.eye(width, dtype=np.float32)[units]), b_enc=jnp.zeros(len(units)),
                       W_dec=jnp.asarray(down_FD), b_dec=jnp.zeros(down_FD.shape[1]))
    return SAE(params, SAEConfig("relu", width, len(units), 0, False, (source,), sae.cfg.model, target=target,
                                 d_out=down_FD.shape[1], metadata={"baseline": "neurons", "units": units.tolist()}), mesh)


def below(hookpoint: str) -> int | None:
    """The last layer whose MLP has written into what a hookpoint sees: its own from `mlp.hook_post` on, else the one before."""
    layer = layer_of(hookpoint)
    if layer is None:
        return None
    after = hookpoint.split(".", 2)[2] in ("hook_mlp_out", "hook_resid_post")
    return layer if after else layer - 1
