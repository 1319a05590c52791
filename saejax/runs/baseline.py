"""Baselines of a subject's features (`features.index.baselines`), the same at every call."""

from pathlib import Path

import numpy as np

from saejax.features.index import baselines
from saejax.runs.subject import Subject
from saejax.sae.inference import SAE


def baseline_of(name: str, subject: Subject) -> SAE:
    """A baseline of a subject's SAE. Raises `FeatureIndexError` where a random SAE needs the L0 of an index that is
    not there."""
    sae, mean_D = subject.sae, None
    if name != "neurons":
        stats = subject.stats(sae.cfg.hookpoints)
        mean_D = np.concatenate([stats[hookpoint].mean_D for hookpoint in sae.cfg.hookpoints])
    k = sae.cfg.k
    if name == "random_sae" and not k:  # as sparse as the features are
        k = round(subject.index.manifest["totals"]["l0"])
    return baselines.make(name, sae, subject.lm, mean_D=mean_D, k=k, seed=subject.seed, mesh=sae.mesh)


def home_of(subject: Subject, baseline: str | None) -> Path | None:
    """Where the index of its features, or of a baseline of them, lies."""
    home = subject.index_home
    return home if baseline is None or home is None else home.with_name(f"{home.name}_{baseline}")
