"""From any checkpoint, mid-run too, to a release directory."""

from pathlib import Path

from jax.sharding import Mesh

from saejax.errors import CheckpointError
from saejax.formats import saelens
from saejax.formats.loading import from_checkpoint, newest_step
from saejax.records import RunPaths
from saejax.sae.inference import SAE
from saejax.storage import is_writer, write_bytes, write_json
from saejax.train.checkpoint import is_step

# What of an evaluation is a measurement, and belongs into the README of a release.
MEASURED = ("tokens", "outlier_tokens", "l0_mean", "l0_median", "fvu", "explained_variance", "fvu_no_outliers",
            "explained_variance_no_outliers", "normalized_mse", "cosine", "dead_fraction", "ce_clean", "ce_spliced", "ce_zero",
            "ce_mean", "ce_recovered", "ce_recovered_mean", "kl")


def release(path: Path, out: Path | None = None, metrics: dict | None = None, mesh: Mesh | None = None, *,
            as_jumprelu: bool = False) -> Path:
    """Writes the release of a run (its newest checkpoint) or of one checkpoint step, and returns its directory.

    out: default `<run>/release`. metrics: what evaluation measured, written as `metrics.json` and shown in the README.
    mesh: the dictionary is split over it on the way; None: one device. as_jumprelu: see `from_checkpoint`.
    """
    path = Path(path).absolute()
    step = path if is_step(path) else newest_step(path, mesh)
    run = RunPaths(step.parent.parent)
    if not run.config.is_file():
        raise CheckpointError(f"{step}: no config.json two levels up; keep the checkpoint inside its run directory")
    sae = from_checkpoint(step, mesh, as_jumprelu=as_jumprelu)
    out = Path(out) if out else run.release
    saelens.write(out, sae)
    if is_writer():
        write_json(out / "metrics.json", metrics or {})
        write_bytes(out / "README.md", _card(sae, metrics or {}).encode())
    return out


def _card(sae: SAE, metrics: dict) -> str:
    c = sae.cfg
    rows = "\n".join(f"| {key} | {value:,} |" if isinstance(value, int) else f"| {key} | {value:.4g} |"
                     for key, value in metrics.items() if key in MEASURED and isinstance(value, (int, float)))
    table = f"\n| measured on held-out text | |\n|---|---|\n{rows}\n" if rows else ""
    what = {"sae": "Sparse autoencoder", "transcoder": "Transcoder", "skip transcoder": "Skip transcoder",
            "crosscoder": "Crosscoder"}[c.spec.shape]
    where = f"{c.hookpoint} to {c.target}" if c.target else ", ".join(c.hookpoints)
    readers = ("\nSAELens reads the same directory: `sae_lens.SAE.load_from_disk(path)`.\n"
               if saelens.architecture(c) in saelens.KNOWN_TO_SAELENS else "")
    return f"""# {what} for {where} of {c.model}

{c.kind}{f' (k = {c.k})' if c.kind == 'topk' else ''}, {c.d_sae} features on activations of width {c.d_in}, trained on
{c.metadata['training']['tokens']:,} tokens. Takes raw activations: the normalisation is folded into the weights, and feature
activations are in the units of what is reconstructed.

```python
import saejax
sae = saejax.load("path/to/this/directory")
acts = sae.encode(x)      # x: [..., {c.d_in}] raw activations
```
{readers}{table}"""
