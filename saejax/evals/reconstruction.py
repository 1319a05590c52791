"""How well an SAE rebuilds activations, over a stream of tokens: L0, FVU, explained variance, densities, dead features.

Nothing is kept per token. Sums are float64 on the host; squared distances are taken from a fixed point near the mean
(the store's mean): sum ||x||^2 - n ||mean||^2 loses every digit where the mean dominates, as in residual streams.
"""

from collections import Counter
from dataclasses import dataclass, field, fields

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from saejax.base import sharding
from saejax.base.errors import NonFiniteError

LOG10_EDGES = tuple(-7 + 0.5 * i for i in range(15))  # firing density from 1e-7 to 1, two bins per decade


@jax.jit
def _token_parts(x_ND, recon_ND, shift_D, keep_N, bound):
    x_ND, recon_ND = x_ND.astype(jnp.float32), recon_ND.astype(jnp.float32)
    centred_ND = jnp.where(keep_N[:, None], x_ND - shift_D, 0.0)  # a masked row may hold NaN, which 0 x NaN would pass on
    sq_norm_N = jnp.square(x_ND).sum(-1)
    outlier_N = jnp.sqrt(sq_norm_N) > bound
    groups_2N = jnp.stack([keep_N & ~outlier_N, keep_N & outlier_N])
    dot_N = (x_ND * recon_ND).sum(-1)
    norms_N = jnp.sqrt(sq_norm_N * jnp.square(recon_ND).sum(-1))
    return {
        "groups": groups_2N,
        "sq_error": jnp.square(x_ND - recon_ND).sum(-1),
        "sq_centred": jnp.square(centred_ND).sum(-1),
        "sq_norm": sq_norm_N,
        "cosine": jnp.where(norms_N > 0, dot_N / jnp.where(norms_N > 0, norms_N, 1.0), 0.0),
        "centred": jnp.einsum("gn,nd->gd", groups_2N.astype(jnp.float32), centred_ND, precision="highest"),
    }


@dataclass
class _Sums:
    """float64 sums over one group of tokens (ordinary or outlier)."""

    d_in: int
    tokens: int = 0
    sq_error: float = 0.0
    sq_centred: float = 0.0
    sq_norm: float = 0.0
    cosine: float = 0.0
    centred_D: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.centred_D = np.zeros(self.d_in, np.float64)

    def add(self, parts: dict[str, np.ndarray], group: int) -> None:
        here_N = parts["groups"][group]
        self.tokens += int(here_N.sum())
        for name in ("sq_error", "sq_centred", "sq_norm", "cosine"):
            setattr(self, name, getattr(self, name) + float(parts[name][here_N].sum(dtype=np.float64)))
        self.centred_D += parts["centred"][group]

    def plus(self, other: "_Sums") -> "_Sums":
        total = _Sums(self.d_in, *(getattr(self, n) + getattr(other, n)
                                   for n in ("tokens", "sq_error", "sq_centred", "sq_norm", "cosine")))
        total.centred_D = self.centred_D + other.centred_D
        return total

    def fvu(self) -> float | None:
        """sum ||x - x^||^2 / sum ||x - mean x||^2; None where the tokens do not vary."""
        if self.tokens == 0:
            return None
        variance = self.sq_centred - float(np.square(self.centred_D).sum()) / self.tokens
        return self.sq_error / variance if variance > 0 else None


    def figures(self) -> dict[str, float | None]:
        """See `Reconstruction.result`."""
        fvu, n = self.fvu(), self.tokens
        return {"fvu": fvu, "explained_variance": None if fvu is None else 1 - fvu,
                "normalized_mse": self.sq_error / self.sq_norm if self.sq_norm else None,
                "mse": self.sq_error / n if n else None, "cosine": self.cosine / n if n else None}


class Reconstruction:
    """Accumulates batches of raw activations with their reconstructions, and what `SAE.measure` counts of them. How often each
    feature fired stays on the devices until the end.

    mean_D: any point near the mean (it changes rounding only). outlier_bound: norm above which a token is an outlier.
    """

    def __init__(self, mean_D: np.ndarray, outlier_bound: float):
        self._shift_D = np.asarray(mean_D, np.float32)
        self._bound = np.float32(outlier_bound)
        self._groups = (_Sums(len(mean_D)), _Sums(len(mean_D)))
        self._fired_F: Array | None = None
        self._l0_counts: Counter[int] = Counter()

    def add(self, x_ND: Array, recon_ND: Array, l0_N: Array, fired_F: Array, keep_N: np.ndarray) -> None:
        """One batch; rows where `keep_N` is False count nowhere. l0_N: active features of each row; fired_F: in how many kept
        rows each feature is active. Raises `NonFiniteError` (NaN or Inf in a kept row).
        """
        keep_N = np.asarray(keep_N, bool)
        parts = jax.device_get(_token_parts(x_ND, recon_ND, self._shift_D, keep_N, self._bound))
        bad = keep_N & ~np.isfinite(parts["sq_error"])
        if bad.any():
            raise NonFiniteError(f"evaluation: {int(bad.sum())} of {int(keep_N.sum())} tokens of a batch have "
                                 "NaN or Inf in activation or reconstruction; check the weights, or use "
                                 "config.lm.dtype='float32'")
        for group, sums in enumerate(self._groups):
            sums.add(parts, group)
        self._fired_F = fired_F if self._fired_F is None else _added(self._fired_F, fired_F)
        self._l0_counts.update(np.asarray(l0_N)[keep_N].tolist())

    def sums(self) -> dict:
        """What it has summed so far but for how often features fired, as plain JSON."""
        groups = [{f.name: getattr(s, f.name) for f in fields(s)} | {"centred_D": s.centred_D.tolist()} for s in self._groups]
        return {"groups": groups, "l0": {str(l0): rows for l0, rows in self._l0_counts.items()}}

    def become(self, parts: list[dict]) -> None:
        """Takes the `sums` of several processes for its own."""
        for group, total in enumerate(self._groups):
            each = [part["groups"][group] for part in parts]
            for f in fields(total):
                values = [np.asarray(one[f.name]) if f.name == "centred_D" else one[f.name] for one in each]
                setattr(total, f.name, total.d_in if f.name == "d_in" else sum(values[1:], values[0]))
        self._l0_counts = sum((Counter({int(l0): rows for l0, rows in part["l0"].items()}) for part in parts), Counter())

    def result(self) -> dict:
        """Every figure over the kept tokens.

        explained_variance = 1 - FVU = 1 - sum ||x - x^||^2 / sum ||x - mean x||^2, the mean being that of the evaluated
        tokens; *_no_outliers leaves outlier tokens out of all sums. normalized_mse = sum ||x - x^||^2 /
        sum ||x||^2. cosine: mean over tokens of cos(x, x^). dead_fraction: features that fired on none of `tokens`.
        """
        ordinary, outliers = self._groups
        both = ordinary.plus(outliers)
        n = both.tokens
        fired_F = sharding.to_host(self._fired_F)
        return {
            "tokens": n, "outlier_tokens": outliers.tokens,
            "l0_mean": sum(l0 * rows for l0, rows in self._l0_counts.items()) / n if n else None,
            "l0_median": _median(self._l0_counts),
            **both.figures(), **{f"{name}_no_outliers": value for name, value in ordinary.figures().items()},
            "dead_fraction": float((fired_F == 0).mean()), "density_histogram": density_histogram(fired_F, n),
        }


def density_histogram(fired_F: np.ndarray, tokens: int) -> dict:
    """{"log10_edges", "counts", "never"}: how many features fire on which share of the tokens."""
    share = fired_F[fired_F > 0] / max(tokens, 1)
    counts, _ = np.histogram(np.log10(np.clip(share, 10.0 ** LOG10_EDGES[0], 1.0)), bins=LOG10_EDGES)
    return {"log10_edges": list(LOG10_EDGES), "counts": counts.tolist(), "never": int((fired_F == 0).sum())}


_added = jax.jit(jnp.add)


def _median(counts: Counter[int]) -> float | None:
    """Median of integers given how often each value occurs."""
    n, values = counts.total(), sorted(counts)
    if n == 0:
        return None
    below = np.cumsum([counts[value] for value in values])
    low, high = (values[int(np.searchsorted(below, rank, side="right"))] for rank in ((n - 1) // 2, n // 2))
    return (low + high) / 2
