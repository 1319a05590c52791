"""Does SAELens read a release and agree with it? Two steps, since the peer lives in its own environment (with torch).

    python benchmarks/release_readers.py write RELEASE [...]      # saejax: activations and reconstruction of seeded inputs
    python benchmarks/release_readers.py saelens RELEASE [...]    # environment with sae-lens: loads, compares, prints

The comparison fails (exit code 1) when activations or reconstructions differ by more than 1e-4 relative to their largest
value, or when another set of features is active beyond rounding.
"""

import sys
from pathlib import Path

import numpy as np

OUTPUTS = "reader_check.npz"


def write(release: Path) -> None:
    import saejax

    sae = saejax.load(release)
    rng = np.random.default_rng(0)
    centre = 0 if sae.cfg.target else np.asarray(sae.b_dec)
    x = (rng.standard_normal((256, sae.cfg.d_in)) * 5 + centre).astype(np.float32)
    recon, acts = sae.reconstruct(x)
    np.savez_compressed(release / OUTPUTS, x=x, acts=np.asarray(acts), recon=np.asarray(recon))


def saelens(release: Path) -> bool:
    import sae_lens
    import torch

    saved = np.load(release / OUTPUTS)
    sae = sae_lens.SAE.load_from_disk(str(release))
    with torch.no_grad():
        acts = sae.encode(torch.tensor(saved["x"])).numpy()
        recon = sae(torch.tensor(saved["x"])).numpy()
    worst = {name: np.abs(a - saved[name]).max() / np.abs(saved[name]).max() for name, a in (("acts", acts), ("recon", recon))}
    flips = ((acts > 0) != (saved["acts"] > 0)) & (np.maximum(acts, saved["acts"]) > 1e-4 * saved["acts"].max())
    good = max(worst.values()) <= 1e-4 and not flips.any()
    print(f"{release}: sae-lens {sae_lens.__version__} {type(sae).__name__}, L0 {(acts > 0).sum(1).mean():.2f}, "
          f"max relative difference acts {worst['acts']:.1e}, recon {worst['recon']:.1e}, other features {int(flips.sum())}: "
          f"{'agrees' if good else 'DIFFERS'}")
    return good


if __name__ == "__main__":
    command, *releases = sys.argv[1:] or [""]
    if command not in ("write", "saelens") or not releases:
        sys.exit(__doc__)
    results = [{"write": write, "saelens": saelens}[command](Path(r)) for r in releases]
    sys.exit(0 if all(r is not False for r in results) else 1)
