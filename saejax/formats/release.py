"""From any checkpoint, mid-run too, to a release directory."""

from pathlib import Path

from saejax.errors import CheckpointError
from saejax.formats import saelens
from saejax.formats.loading import from_checkpoint, newest_step
from saejax.records import RunPaths
from saejax.sae.inference import SAE
from saejax.storage import is_writer, write_bytes, write_json


def release(path: Path, out: Path | None = None, metrics: dict | None = None) -> Path:
    """Writes the release of a run (its newest checkpoint) or of one checkpoint step, and returns its directory.

    out: default `<run>/release`. metrics: what evaluation measured, written as `metrics.json` and shown in the README.
    """
    path = Path(path)
    step = path if (path / "state").is_dir() else newest_step(path)
    run = RunPaths(step.parent.parent)
    if not run.config.is_file():
        raise CheckpointError(f"{step}: no config.json two levels up; keep the checkpoint inside its run directory")
    sae = from_checkpoint(step)
    out = Path(out) if out else run.release
    saelens.write(out, sae)
    if is_writer():
        write_json(out / "metrics.json", metrics or {})
        write_bytes(out / "README.md", _card(sae, metrics or {}).encode())
    return out


def _card(sae: SAE, metrics: dict) -> str:
    c = sae.cfg
    rows = "\n".join(f"| {key} | {value:.4g} |" for key, value in metrics.items() if isinstance(value, (int, float)))
    table = f"\n| measured on held-out text | |\n|---|---|\n{rows}\n" if rows else ""
    return f"""# Sparse autoencoder for {c.hookpoint} of {c.model}

{c.kind}{f' (k = {c.k})' if c.kind == 'topk' else ''}, {c.d_sae} features on activations of width {c.d_in}, trained on
{c.metadata['training']['tokens']:,} tokens. Takes raw activations: the input normalisation is folded into the weights, and
feature activations are in the units of the residual stream.

```python
import saejax
sae = saejax.load("path/to/this/directory")
acts = sae.encode(x)      # x: [..., {c.d_in}] raw activations
```

SAELens reads the same directory: `sae_lens.SAE.load_from_disk(path)`.
{table}"""
