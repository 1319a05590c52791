"""What a notebook does with an SAE, its language model and its index: tables for people, plain values inside."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from saejax import lm
from saejax.base import sharding
from saejax.base.errors import ConfigError
from saejax.features.effects import steering
from saejax.features.index.logits import rows_of
from saejax.features.index.neighbours import nearest
from saejax.features.index.reader import FeatureIndex
from saejax.features.search import prompt
from saejax.features.search.found import Found
from saejax.lm import LM
from saejax.pages.cards import Table
from saejax.sae.inference import SAE

MOST = 10  # features that a search gives


def top(acts, index: FeatureIndex | None, n: int) -> Table:
    """The n most active features of each token (or one) of activations [T, F]; their maximum and what they fire on as the index
    has it.
    """
    acts_TF = np.atleast_2d(sharding.to_host(acts) if hasattr(acts, "sharding") else np.asarray(acts))
    maxima = None if index is None else index.column("max")
    rows = []
    for position, acts_F in enumerate(acts_TF):
        for feature in np.argsort(-acts_F, kind="stable")[:n]:
            if acts_F[feature] > 0:
                share = float(acts_F[feature] / maxima[feature]) if maxima is not None and maxima[feature] > 0 else float("nan")
                rows.append((position, int(feature), float(acts_F[feature]), share,
                             "" if index is None else index.fires_on(int(feature))))
    return Table(("token", "feature", "activation", "of its maximum", "fires on"), rows)


def by_prompt(lm_: LM, sae: SAE, index: FeatureIndex | None, given: str, by: str | None, n: int) -> list[Found]:
    """by: "activation", or "relative" to the feature's maximum in the index (the default where there is one)."""
    by = by or ("activation" if index is None else "relative")
    if by not in ("activation", "relative") or (by == "relative" and index is None):
        raise ConfigError(f"by={by!r}: choose activation, or relative, which needs an index")
    return prompt.by_prompt(lm_, sae, given, n, maxima=index.column("max") if by == "relative" else None)


def alike(sae: SAE, direction: int | np.ndarray, among: SAE | None, n: int) -> list[Found]:
    """Features whose decoder rows are nearest to that of a feature, or to a vector [d_out]; among those of another SAE."""
    where, own = among or sae, None
    if isinstance(direction, int | np.integer):
        number = steering.check_feature(sae, int(direction))
        own = None if among is not None else np.array([number])
        direction = rows_of(sae, sae.params.W_dec, number, number + 1)[0]
    ids, cosines = nearest(where.params.W_dec, np.asarray(direction, np.float32)[None], n, where.mesh, own=own)
    return [Found(int(i), float(c), "cosine of the decoder directions") for i, c in zip(ids[0], cosines[0], strict=True)]


def table_of(found: list[Found], index: FeatureIndex | None) -> Table:
    """Found features with what they fire on."""
    return Table(("feature", "score", "why", "fires on"),
                 [(f.feature, f.score, f.why, "" if index is None else index.fires_on(f.feature)) for f in found])


Features = Mapping[int, float] | Sequence[Mapping[int, float]]  # {feature: how far}, or several of these


def changes_of(sae: SAE, index: Callable[[], FeatureIndex], features: Features, values: bool) -> list[steering.Change]:
    """One change for each mapping; values: the numbers are activations, else multiples of the feature's maximum in the index."""
    found = []
    for wanted in [features] if isinstance(features, Mapping) else features:
        wanted = wanted if values or not wanted else values_of(index(), wanted)
        for feature in wanted:
            steering.check_feature(sae, feature)
        label = ", ".join(f"{feature} at {value:.4g}" for feature, value in wanted.items())
        found += [steering.Change(label, dict(wanted))] if wanted else []
    return found


def steer(lm_: LM, sae: SAE, given: str, changes: list[steering.Change], *, samples: int, seed: int, temperature: float | None,
          top_p: float, tokens: int, positions) -> Table:
    """How a prompt goes on under each change, beside the unsteered text, `samples` times."""
    sampling = lm.Sampling(float(samples > 1) if temperature is None else temperature, top_p)
    changes = [change for change in (steering.Change(), *changes) for _ in range(samples)]
    texts = steering.continuations(lm_, sae, given, changes, positions=positions, tokens=tokens, sampling=sampling, seed=seed)
    return Table(("change", "text"), [(change.label, said) for change, said in zip(changes, texts, strict=True)])


def next_tokens(lm_: LM, sae: SAE, given: str, changes: list[steering.Change], positions, n: int) -> Table:
    """What each change does to the token behind a prompt."""
    def shown(pairs) -> str:
        return ", ".join(f"{lm_.tokenizer.decode([token])!r} {before:.2g} -> {after:.2g}" for token, before, after in pairs)

    found = steering.next_tokens(lm_, sae, given, changes, positions=positions, n=n)
    return Table(("change", "KL", "rises", "falls"),
                 [(change.label, one.kl, shown(one.rises), shown(one.falls)) for change, one in zip(changes, found, strict=True)])


def values_of(index: FeatureIndex, scales: Mapping[int, float]) -> dict[int, float]:
    """{feature: multiple of its maximum} -> {feature: value}. Raises `SteeringError` for a feature that never fires."""
    return {feature: scale * (steering.maximum(index, feature) if scale else 0.0) for feature, scale in scales.items()}
