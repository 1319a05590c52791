"""From any checkpoint, mid-run too, to a release directory."""

from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from saejax.base import lease
from saejax.base.assets import MODELS, model_title
from saejax.base.logs import Progress, say
from saejax.base.records import RunPaths
from saejax.base.storage import is_writer, write_bytes, write_json
from saejax.config import read_config
from saejax.formats import saelens
from saejax.formats.loading import from_checkpoint
from saejax.sae.calibrate import calibrate, passes, scaled
from saejax.sae.inference import SAE, SAEConfig

# What of an evaluation is a measurement, and belongs into the README of a release.
MEASURED = ("tokens", "outlier_tokens", "l0_mean", "l0_median", "fvu", "explained_variance", "fvu_no_outliers",
            "explained_variance_no_outliers", "normalized_mse", "cosine", "dead_fraction", "ce_clean", "ce_spliced", "ce_zero",
            "ce_mean", "ce_recovered", "ce_recovered_mean", "kl")


def release(sae: SAE, out: Path, metrics: dict | None = None) -> Path:
    """Writes the release of an SAE that was trained here, and returns its directory.

    metrics: what evaluation measured, written as `metrics.json` and shown in the README.
    """
    out = Path(out)
    with lease.writing(out):
        saelens.write(out, sae)
        if is_writer():
            write_json(out / "metrics.json", metrics or {})
            write_bytes(out / "README.md", _card(sae, metrics or {}, saelens.listed(out) is None).encode())
    return out


def with_one_threshold(step: Path, mesh: Mesh | None, rows: np.ndarray) -> SAE:
    """The topk SAE of a checkpoint step as jumprelu: with the one threshold at which k features per row fire on average over
    `rows` [N, at least d_in] of raw activations. How it was calibrated is in its metadata. Other kinds come as they are.
    """
    sae = from_checkpoint(step, mesh, threshold=1.0)
    if sae.cfg.metadata["training"]["kind"] != "topk":
        return sae
    progress = read_config(RunPaths(step.parent.parent).config).log.progress
    with Progress("calibrate", passes() * len(rows), unit="row", enabled=progress) as bar:
        found = calibrate(sae, rows, sae.cfg.metadata["training"]["k"], bar.advance)
    say(f"threshold {found.factor:.6g} (normalised units): {found.l0:.6g} features per row on {found.rows:,} rows, "
        f"k = {found.k}")
    sae = scaled(sae, found.factor)
    sae.cfg.metadata["calibration"] = {"threshold": found.factor, "rows": found.rows, "k": found.k, "l0": found.l0}
    return sae


def _card(sae: SAE, metrics: dict, one_file: bool) -> str:
    c = sae.cfg
    held_out = f" (silent on {metrics['tokens']:,} tokens)" if "tokens" in metrics else ""
    rows = "\n".join(f"| {key}{held_out if key == 'dead_fraction' else ''} | {value:{',' if isinstance(value, int) else '.4g'}} |"
                     for key, value in metrics.items() if key in MEASURED and isinstance(value, (int, float)))
    table = f"\n| measured on {metrics.get('measured_on', 'held-out text')} | |\n|---|---|\n{rows}\n" if rows else ""
    what = {"sae": "Sparse autoencoder", "transcoder": "Transcoder", "skip transcoder": "Skip transcoder",
            "crosscoder": "Crosscoder"}[c.spec.shape]
    where = f"{c.hookpoint} to {c.target}" if c.target else ", ".join(c.hookpoints)
    readers = ("\nSAELens reads the same directory: `sae_lens.SAE.load_from_disk(path)`.\n" if one_file else
               "\nThe weights are in several files; `saejax convert` writes the one file that SAELens reads.\n")
    readers = readers if saelens.architecture(c) in saelens.KNOWN_TO_SAELENS else ""
    measured = c.metadata.get("calibration")
    threshold = (f"\nTrained as topk; the one threshold of all features was measured on {measured['rows']:,} rows, on which "
                 f"{measured['l0']:.4g} features fire per row (k = {measured['k']}).\n" if measured else "")
    return f"""# {what} for {where} of {model_title(c.model)}

{c.kind}{f' (k = {c.k})' if c.kind == 'topk' else ''}, {c.d_sae} features on activations of width {c.d_in}, trained on
{c.metadata['training']['tokens']:,} tokens. Takes raw activations: the normalisation is folded into the weights, and feature
activations are in the units of what is reconstructed.

{_model(c, metrics)}

```python
import saejax
sae = saejax.load("path/to/this/directory")
acts = sae.encode(x)      # x: [..., {c.d_in}] raw activations
```
{threshold}{readers}{table}"""


def _model(cfg: SAEConfig, metrics: dict) -> str:
    """On the activations of which weights it was trained."""
    said = cfg.metadata.get("lm", {})
    revision = f", revision {said['revision']}" if said.get("revision") else ""
    dtype = f", computed in {said['dtype']}" if said.get("dtype") else ""
    digest = f" (weights and config: sha256 {metrics['model_digest']})" if "model_digest" in metrics else ""
    model = MODELS.get(cfg.model)
    if model is None:
        return f"Language model: {cfg.model}{revision}{dtype}{digest}."
    return (f"Language model: {model_title(cfg.model)}, not the published weights{dtype}. saejax calls it `{cfg.model}`; the "
            f"file is {model.filename} (sha256 {model.sha256}). `model_name` in cfg.json is the published model, whose "
            "activations differ a little.")
