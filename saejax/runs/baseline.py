"""Baselines of a subject's features (`features.index.baselines`), the same at every call."""

import re
from pathlib import Path

import numpy as np

from saejax.base.errors import FeatureIndexError
from saejax.features.index import baselines
from saejax.features.index.corpus import Corpus
from saejax.features.index.reader import FeatureIndex
from saejax.runs.subject import Subject
from saejax.sae.inference import SAE

ROWS = 65_536  # of the index' corpus, at most, by which thresholds of random directions are set


def baseline_of(name: str, subject: Subject) -> SAE:
    """A baseline of a subject's SAE. Raises `FeatureIndexError` where one that is as sparse as the SAE needs the index that
    says how sparse that is, and there is none.
    """
    sae, mean_D = subject.sae, None
    if name != "neurons":
        stats = subject.stats(sae.cfg.hookpoints)
        mean_D = np.concatenate([stats[hookpoint].mean_D for hookpoint in sae.cfg.hookpoints])
    if name == "sparse_directions":
        return baselines.sparse_directions(sae, _rows(subject), mean_D=mean_D, density=_density(subject.index),
                                           seed=subject.seed, mesh=sae.mesh)
    k = sae.cfg.k
    if name == "random_sae" and not k:  # as sparse as the features are
        k = round(subject.index.manifest["totals"]["l0"])
    return baselines.make(name, sae, subject.lm, mean_D=mean_D, k=k, seed=subject.seed, mesh=sae.mesh)


def home_of(subject: Subject, baseline: str | None) -> Path | None:
    """Where the index of its features, or of a baseline of them, lies."""
    home = subject.index_home
    return home if baseline is None or home is None else home.with_name(f"{home.name}_{baseline}")


def corpus_of(index: FeatureIndex, subject: Subject, hookpoints: tuple[str, ...]) -> Corpus:
    """The corpus that an index was built over, at the hookpoints given."""
    text = re.fullmatch(r"text \((\w+)\)", index.manifest["corpus"]["kind"])
    return subject.corpus(split=text[1] if text else None, tokens=index.manifest["totals"]["rows"], hookpoints=hookpoints)


def _density(index: FeatureIndex) -> float:
    """Of the median feature among those that fire."""
    density_F = index.column("density")
    if not (density_F > 0).any():
        raise FeatureIndexError(f"{index.path}: no feature fires, so that no direction can fire as often as they do")
    return float(np.median(density_F[density_F > 0]))


def _rows(subject: Subject) -> np.ndarray:
    """Unmasked rows of contexts spread evenly over the corpus of the subject's index."""
    index = subject.index
    corpus, contexts = corpus_of(index, subject, subject.sae.cfg.hookpoints), len(index.tokens_NT)
    numbers = np.unique(np.linspace(0, contexts - 1, min(contexts, max(1, ROWS // corpus.context))).round().astype(int))
    return corpus.of_contexts(numbers, np.asarray(index.tokens_NT[numbers]))[np.asarray(index.keep_NT[numbers]).reshape(-1)]
