"""From any SAE that `saejax.load` reads to the files of another library, read back and compared."""

from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from saejax.base.errors import FormatError
from saejax.base.ranges import Range
from saejax.formats import saelens, saelens_read, streamed
from saejax.formats.loading import FORMATS, load, located
from saejax.sae import param_shapes, tensors
from saejax.sae.calibrate import calibrate, scaled
from saejax.sae.inference import SAE, SAEConfig

_SEED, _ROWS = 0, 64
LIMIT = 1e-4  # relative to the largest value


@dataclass(frozen=True)
class Agreement:
    """How far two SAEs agree on the same rows. acts, recon: largest difference, relative to the largest value; other_features:
    how many activations are zero in one and not in the other beyond rounding.
    """

    rows: int
    acts: float
    recon: float
    other_features: int

    @property
    def good(self) -> bool:
        return max(self.acts, self.recon) <= LIMIT and self.other_features == 0

    def __str__(self) -> str:
        return (f"{self.rows} rows: activations within {self.acts:.1e}, reconstruction within {self.recon:.1e}, "
                f"{self.other_features} other features active")


def convert(source: str | Path, directory: str | Path, to: str, rows: np.ndarray | None = None) -> tuple[SAEConfig, str]:
    """Writes the SAE at `source` in the format `to` and reads it back; (what was read, one line on what was compared).

    A release in several files goes into SAELens' one file block by block; otherwise the SAE passes through host memory whole.

    rows [N, d_in]: activations; with them a topk SAE may be written with one threshold where `to` has no topk (approximate), and
    the line states what that changes on them. Without rows the function is the same or nothing is written. Raises `FormatError`
    with the reason for what the format cannot express, for a directory that is not empty, and when what was written disagrees.
    """
    writable = [name for name, known in FORMATS.items() if known.write]
    if to not in writable:
        raise FormatError(f"to={to}: not a format that can be written; choose one of {', '.join(writable)}")
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FormatError(f"{directory}: is not empty; two formats in one folder cannot be told apart, give another one")
    if to == "saelens" and rows is None and saelens.listed(place := located(source)[1]) is not None:
        return _joined(place, directory)
    sae = load(source)
    _check_saelens(sae.cfg, to)
    note = ""
    if rows is not None:
        if sae.cfg.kind != "topk" or to != "gemma_scope":
            raise FormatError(f"rows: only a topk SAE for Gemma Scope is approximated on rows; a {sae.cfg.kind} one is written "
                              f"for {to} as it is, or not at all")
        sae, note = as_jumprelu(sae, rows := check_rows(rows, sae))
    FORMATS[to].write(directory, sae)
    written = load(directory, format=to)
    measured = agreement(sae, written, _random_rows(sae) if rows is None else rows)
    if not measured.good:
        raise FormatError(f"{directory}: what was written does not agree with {source} ({measured}); do not use it")
    return written.cfg, f"{measured}{note}"


def _joined(source: Path, directory: Path) -> tuple[SAEConfig, str]:
    """A release in several files as one, every value compared."""
    found = saelens_read.opened(source)
    _check_saelens(found.cfg, "saelens")
    saelens.write_from(directory, found.cfg, found.source(), [Range(0, found.cfg.d_sae)])
    written = saelens_read.opened(directory)
    before, after = found.source(), written.source()
    for name, shape in tensors(param_shapes(found.cfg.spec, folded=True)).items():
        for first, stop in streamed.blocks(shape):
            if not np.array_equal(before.rows(name, first, stop), after.rows(name, first, stop)):
                raise FormatError(f"{directory}: {name}: what was written is not what {source} holds; do not use it")
    return written.cfg, f"all {found.cfg.d_sae:,} features of {len(saelens.weights(found.cfg))} files: the same values"


def _check_saelens(cfg: SAEConfig, to: str) -> None:
    if to == "saelens" and saelens.architecture(cfg) not in saelens.KNOWN_TO_SAELENS:
        raise FormatError(f"a {cfg.kind} {cfg.spec.shape} cannot be written for SAELens, which has no architecture "
                          f"{saelens.architecture(cfg)!r}; it knows {', '.join(saelens.KNOWN_TO_SAELENS)}")


def check_rows(rows: np.ndarray, sae: SAE) -> np.ndarray:
    """The rows as float32. Raises `FormatError` unless they are finite and fit the SAE."""
    if rows.ndim != 2 or rows.shape[1] != sae.cfg.d_in or len(rows) == 0 or rows.dtype.kind not in "fiu":
        raise FormatError(f"rows: {rows.dtype} {rows.shape}; expected numbers [N, {sae.cfg.d_in}]")
    rows = rows.astype(np.float32)
    if not np.isfinite(rows).all():
        raise FormatError("rows: hold NaN or Inf")
    return rows


def agreement(one: SAE, other: SAE, x: np.ndarray) -> Agreement:
    """Compares activations and reconstructions of the rows x [N, d_in]."""
    (recon_a, acts_a), (recon_b, acts_b) = ([np.asarray(v) for v in sae.reconstruct(x)] for sae in (one, other))
    top = max(float(np.abs(acts_a).max()), 1e-30)
    flips = ((acts_a > 0) != (acts_b > 0)) & (np.maximum(acts_a, acts_b) > LIMIT * top)
    return Agreement(len(x), float(np.abs(acts_a - acts_b).max()) / top,
                     float(np.abs(recon_a - recon_b).max()) / max(float(np.abs(recon_a).max()), 1e-30), int(flips.sum()))


def as_jumprelu(sae: SAE, x: np.ndarray) -> tuple[SAE, str]:
    """(the topk SAE with the one threshold at which as many features fire on average over x, what that changes on x)."""
    params = sae.params.replace(per_feature={"threshold": jnp.ones_like(sae.params.b_enc)})
    other = SAE(params, replace(sae.cfg, kind="jumprelu", k=0), sae.mesh)
    found = calibrate(other, x, sae.cfg.k)
    other = scaled(other, found.factor)
    (recon_a, acts_a), (recon_b, acts_b) = ([np.asarray(v) for v in s.reconstruct(x)] for s in (sae, other))
    changed = ((acts_a > 0) != (acts_b > 0)).sum() / max(1, (acts_a > 0).sum())
    relative = np.linalg.norm(recon_a - recon_b) / max(np.linalg.norm(recon_a), 1e-30)
    return other, (f"; approximate: topk (k = {sae.cfg.k}) as threshold {found.factor:.6g}, mean L0 {found.l0:.2f}, "
                   f"{100 * changed:.1f} % of the active features differ, reconstruction moves by {100 * relative:.1f} % (norm)")


def _random_rows(sae: SAE) -> np.ndarray:
    """Seeded rows of the size at which features fire: around b_dec, of five times its spread and at least 1."""
    rng = np.random.default_rng(_SEED)
    centre = np.zeros(sae.cfg.d_in) if sae.cfg.d_out is not None else np.asarray(sae.b_dec)
    return (rng.standard_normal((_ROWS, sae.cfg.d_in)) * 5 + centre).astype(np.float32)
