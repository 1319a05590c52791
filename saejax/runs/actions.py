"""What a notebook does with an SAE, its language model and its index: tables for people, plain values inside."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from saejax import lm
from saejax.base import sharding
from saejax.base.errors import ConfigError, SteeringError
from saejax.features.effects import attribution, steering
from saejax.features.index.logits import rows_of
from saejax.features.index.neighbours import nearest
from saejax.features.index.reader import FeatureIndex
from saejax.features.search import prompt
from saejax.features.search.found import Found
from saejax.lm import LM
from saejax.pages.cards import Table
from saejax.sae.inference import SAE

MOST = 10  # features that a search gives


def top(acts, features: int, index: FeatureIndex | None, n: int) -> Table:
    """The n most active of the features of each token (or one) of activations [T, F]; their maximum and what they fire on as the
    index has it. Raises `ConfigError` for activations of another shape.
    """
    acts_TF = np.atleast_2d(sharding.to_host(acts) if hasattr(acts, "sharding") else np.asarray(acts))
    if acts_TF.ndim != 2 or acts_TF.shape[1] != features or not np.issubdtype(acts_TF.dtype, np.number):
        raise ConfigError(f"top: {acts_TF.dtype} of shape {np.shape(acts)}; expected activations [tokens, {features}]")
    maxima = None if index is None else index.column("max")
    rows = []
    for position, acts_F in enumerate(acts_TF):
        for feature in np.argsort(-acts_F, kind="stable")[:n]:
            if acts_F[feature] > 0:
                share = float(acts_F[feature] / maxima[feature]) if maxima is not None and maxima[feature] > 0 else float("nan")
                rows.append((position, int(feature), float(acts_F[feature]), share,
                             "" if index is None else index.fires_on(int(feature))))
    return Table(("token", "feature", "activation", "of its maximum", "fires on"), rows)


def ranking(index: FeatureIndex | None, by: str | None, max_density: float | None) -> prompt.Ranking:
    """by: "activation", or "relative" to the feature's maximum in the index (the default where there is one). max_density: share
    of the tokens on which a feature may be active (default 0.01), which the index knows, too.
    """
    by = by or ("activation" if index is None else "relative")
    if by not in ("activation", "relative") or (by == "relative" and index is None):
        raise ConfigError(f"by={by!r}: choose activation, or relative, which needs an index")
    if max_density is not None and (index is None or not 0 <= max_density <= 1):
        raise ConfigError(f"max_density={max_density!r}: expected a share from 0 to 1, and an index, which knows the densities")
    return prompt.Ranking(index.column("max") if by == "relative" else None, None if index is None else index.column("density"),
                          prompt.MOST_DENSE if max_density is None else max_density)


def check_search(ways: Mapping[str, object], negatives, ranked: Sequence, n: int) -> None:
    """Raises `ConfigError` unless there is one way to search, of its kind, and a number of features to find."""
    given = [name for name, value in ways.items() if value is not None and not (name == "positives" and len(value) == 0)]
    if len(given) != 1 or (len(negatives) and given != ["positives"]) or (
            set(ranked) != {None} and given != ["prompt"]):
        raise ConfigError("search: give one of a prompt (with by, max_density), positives with negatives, find and like")
    if isinstance(ways["positives"], str) or isinstance(negatives, str):
        raise ConfigError("search: positives and negatives are lists of prompts")
    if ways["find"] is not None and not isinstance(ways["find"], str):
        raise ConfigError(f"search: find={ways['find']!r} is no text")
    if not isinstance(n, int | np.integer) or n < 1:
        raise ConfigError(f"search: n={n!r}: expected a whole number of at least 1")


def _direction(sae: SAE, given) -> np.ndarray:
    try:
        found = np.asarray(given, np.float32)
    except (TypeError, ValueError):
        found = None
    width = sae.params.W_dec.shape[1]
    if found is None or found.shape != (width,) or not np.isfinite(found).all():
        what = repr(given)[:40] if found is None else f"shape {found.shape}"
        raise ConfigError(f"like: {what}; expected the number of a feature, or a vector of {width} finite numbers")
    return found


def alike(sae: SAE, direction: int | np.ndarray, among: SAE | None, n: int) -> list[Found]:
    """Features whose decoder rows are nearest to that of a feature, or to a vector [d_out]; among those of another SAE. Raises
    `SteeringError` where there is no such feature, `ConfigError` for what is no such vector.
    """
    where, own = among or sae, None
    if isinstance(direction, int | np.integer) and not isinstance(direction, bool):
        number = steering.check_feature(sae, int(direction))
        own = None if among is not None else np.array([number])
        direction = rows_of(sae, sae.params.W_dec, number, number + 1)[0]
    ids, cosines = nearest(where.params.W_dec, _direction(sae, direction)[None], n, where.mesh, own=own)
    return [Found(int(i), float(c), "cosine of the decoder directions") for i, c in zip(ids[0], cosines[0], strict=True)]


def table_of(found: list[Found], index: FeatureIndex | None, note: str = "") -> Table:
    """Found features with what they fire on."""
    return Table(("feature", "score", "why", "fires on"),
                 [(f.feature, f.score, f.why, "" if index is None else index.fires_on(f.feature)) for f in found], note)


Features = Mapping[int, float] | Sequence[Mapping[int, float]]  # {feature: how far}, or several of these


def changes_of(sae: SAE, index: Callable[[], FeatureIndex], features: Features, values: bool) -> list[steering.Change]:
    """One change for each mapping; values: the numbers are activations, else multiples of the feature's maximum in the index."""
    found = []
    for wanted in [features] if isinstance(features, Mapping) else features:
        check_change(wanted)
        wanted = wanted if values or not wanted else values_of(index(), wanted)
        for feature in wanted:
            steering.check_feature(sae, feature)
        label = ", ".join(f"{feature} at {value:.4g}" for feature, value in wanted.items())
        found += [steering.Change(label, dict(wanted))] if wanted else []
    return found


def steer(lm_: LM, sae: SAE, given: str, changes: list[steering.Change], *, samples: int, seed: int, temperature: float | None,
          top_p: float, tokens: int, positions) -> Table:
    """How a prompt goes on under each change, beside the unsteered text, `samples` times."""
    if samples < 1 or tokens < 1:
        raise SteeringError(f"samples={samples}, tokens={tokens}: expected at least 1 of each")
    sampling = lm.Sampling(float(samples > 1) if temperature is None else temperature, top_p)
    changes = [change for change in (steering.Change(), *changes) for _ in range(samples)]
    texts = steering.continuations(lm_, sae, given, changes, positions=positions, tokens=tokens, sampling=sampling, seed=seed)
    return Table(("change", "text"), [(change.label, said) for change, said in zip(changes, texts, strict=True)])


def attribute(lm_: LM, sae: SAE, given: str, token: str, against: str | None, ablate: int) -> attribution.Attribution:
    """Attribution of all parts of a prompt, with the ablation of the largest. Raises `SteeringError`: fewer than 0 of them."""
    if ablate < 0:
        raise SteeringError(f"ablate={ablate}: expected how many of the largest parts are ablated")
    found = attribution.attribute(lm_, sae, given, token, against)
    return attribution.ablate(lm_, sae, found, found.largest(ablate)) if ablate else found


def next_tokens(lm_: LM, sae: SAE, given: str, changes: list[steering.Change], positions, n: int) -> Table:
    """What each change does to the token behind a prompt."""
    def shown(pairs) -> str:
        return ", ".join(f"{lm_.tokenizer.token(token)!r} {before:.2g} -> {after:.2g}" for token, before, after in pairs)

    found = steering.next_tokens(lm_, sae, given, changes, positions=positions, n=n)
    return Table(("change", "KL", "rises", "falls"),
                 [(change.label, one.kl, shown(one.rises), shown(one.falls)) for change, one in zip(changes, found, strict=True)])


def check_change(features) -> None:
    """Raises `SteeringError` unless these are numbers of features with finite numbers."""
    if not isinstance(features, Mapping):
        raise SteeringError(f"features: expected {{number: value}}, got {type(features).__name__}")
    for feature, value in features.items():
        if not isinstance(feature, int | np.integer) or not isinstance(value, int | float | np.number) or not np.isfinite(value):
            raise SteeringError(f"{{{feature!r}: {value!r}}}: expected the number of a feature and a finite number")


def values_of(index: FeatureIndex, scales: Mapping[int, float]) -> dict[int, float]:
    """{feature: multiple of its maximum} -> {feature: value}. Raises `SteeringError` for a feature that never fires."""
    return {feature: scale * (steering.maximum(index, feature) if scale else 0.0) for feature, scale in scales.items()}
