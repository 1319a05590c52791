"""What features are held against, each as an `SAE`: so that index, examples and judging are the same code for all of them.

| name | what fires |
|---|---|
| `neurons` | hidden units of the MLP below the SAE's hookpoint: max(h, 0) of up to 256, drawn by seed |
| `directions` | max(w . (x - mean), 0) of 256 uniformly random unit vectors w |
| `sparse_directions` | max(w . (x - mean) - t, 0) of the same vectors, t so that each fires as often as the median feature |
| `random_sae` | a topk SAE of the same size with random unit rows on centred rows, tied: what training starts from |

neurons: Templeton et al. 2024 compare with neurons of the previous layer; the others are added here.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax.base.errors import FeatureIndexError
from saejax.lm import LM, check_hookpoint, layer_of, width_of
from saejax.sae import SAEParams
from saejax.sae.inference import SAE, SAEConfig

NAMES = ("neurons", "directions", "sparse_directions", "random_sae")
UNITS = 256
_PIECE, _GAP = 4096, 1e-5  # rows projected at once; standard deviations between rows that are not taken for equal


def make(name: str, sae: SAE, lm_: LM, *, mean_D: np.ndarray | None, k: int, seed: int, mesh: Mesh | None) -> SAE:
    """The baseline of an SAE; `sparse_directions` is made by a function of its own. mean_D: of the rows that it reads (not needed
    for neurons). k: active features a token of `random_sae`. Equal arguments give equal parameters. Raises `FeatureIndexError`
    where the hookpoint has no MLP below it.
    """
    if name == "neurons":
        return neurons(sae, lm_, seed, mesh)
    count = UNITS if name == "directions" else sae.cfg.d_sae
    W_FD, mean_D = _unit_rows(count, sae.cfg.d_in, seed), np.asarray(mean_D, np.float32)
    kind, k = ("relu", 0) if name == "directions" else ("topk", min(max(1, k), count))
    return _tied(kind, W_FD, -W_FD @ mean_D, mean_D, k, sae, mesh, {"baseline": name, "seed": seed})


def sparse_directions(sae: SAE, x_RD: np.ndarray, *, mean_D: np.ndarray, density: float, seed: int, mesh: Mesh | None) -> SAE:
    """`directions` with a threshold for each: it fires on round(density R) of the R rows given, at least on one.

    The threshold lies midway between the projections of the last row that fires and the first that does not, in float64: equal
    rows give equal parameters, however the product is summed. Rows of equal projection fire together or not at all: where they
    lie across the border it is moved to the nearest gap.
    """
    W_FD, mean_D = _unit_rows(UNITS, sae.cfg.d_in, seed), np.asarray(mean_D, np.float32)
    R = len(x_RD)
    pre_RF = np.concatenate([(x_RD[start:start + _PIECE].astype(np.float64) - mean_D) @ W_FD.T.astype(np.float64)
                             for start in range(0, R, _PIECE)])
    pre_RF.sort(axis=0)
    firing = min(max(1, round(density * R)), R - 1)
    gap = np.diff(pre_RF, axis=0) > _GAP * pre_RF.std(axis=0)
    last_F = np.where(gap, np.abs(np.arange(R - 1) - (R - firing - 1))[:, None], R).argmin(axis=0)  # that does not fire
    t_F = (np.take_along_axis(pre_RF, last_F[None], 0) + np.take_along_axis(pre_RF, last_F[None] + 1, 0))[0] / 2
    b_F = (-W_FD.astype(np.float64) @ mean_D - t_F).astype(np.float32)
    return _tied("relu", W_FD, b_F, mean_D, 0, sae, mesh,
                 {"baseline": "sparse_directions", "seed": seed, "density": firing / R, "rows": R})


def _unit_rows(count: int, width: int, seed: int) -> np.ndarray:
    W_FD = np.random.default_rng(seed).standard_normal((count, width), np.float32)
    return W_FD / np.linalg.norm(W_FD, axis=1, keepdims=True)


def _tied(kind: str, W_FD: np.ndarray, b_F: np.ndarray, mean_D: np.ndarray, k: int, sae: SAE, mesh: Mesh | None, metadata: dict):
    params = SAEParams(W_enc=jnp.asarray(W_FD), b_enc=jnp.asarray(b_F), W_dec=jnp.asarray(W_FD), b_dec=jnp.asarray(mean_D))
    return SAE(params, SAEConfig(kind, sae.cfg.d_in, len(W_FD), k, False, sae.cfg.hookpoints, sae.cfg.model, metadata=metadata),
               mesh)


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
