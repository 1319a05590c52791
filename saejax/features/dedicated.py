"""Which concepts have a feature of their own: one that fires where the concept stands, and hardly elsewhere.

A feature fires on a token where its activation there is at least `level` of its maximum. Over a sample of contexts, each with the
number w of contexts that it stands for:

    recall_ci    = sum of w over occurrences of c with a token that i fires on / sum of w over occurrences of c
    precision_ci = sum of w over tokens of c that i fires on / sum of w over all tokens that i fires on
    f1_ci        = 2 precision_ci recall_ci / (precision_ci + recall_ci)

A concept is present where some feature has enough of both. Sums are float64.

Source of the question: Templeton et al. 2024 (frequency of concepts). There people judged explanations of the features that are
most active on the concept; here figures decide.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from saejax.base.errors import FeatureIndexError, NonFiniteError
from saejax.base.logs import Progress
from saejax.base.records import Dedicated, Occurrences
from saejax.features.compare.firing import active
from saejax.features.index.corpus import Corpus
from saejax.sae.inference import SAE

_ROWS = 1 << 14  # of a batch


@dataclass(frozen=True)
class Criterion:
    """The least precision and recall of a dedicated feature; level: the share of its maximum at which a feature fires."""

    precision: float = 0.5
    recall: float = 0.5
    level: float = 0.25


@dataclass
class _Sums:
    """total_F: w of all tokens that a feature fires on; on and hit [C, F]: w of the concept's tokens, and of its occurrences."""

    total_F: np.ndarray
    on_CF: csr_array
    hit_CF: csr_array


def dedicated(sae: SAE, corpus: Corpus, found: Occurrences, criterion: Criterion = Criterion(), *,
              max_F: np.ndarray | None = None, progress: bool = True) -> Dedicated:
    """The dedicated feature of every concept whose occurrences were found in the corpus.

    max_F: the maximum of every feature, as an index has it (`column("max")`); without it the largest activation in the sample,
    which one more pass looks for. Memory: active pairs of a batch, and of each concept the features that fire on it; nothing of
    rows x features or concepts x features. Raises `FeatureIndexError` for maxima of another SAE,
    `FormatError` for a corpus of another width, `NonFiniteError`.
    """
    if max_F is None:
        max_F = maxima(sae, corpus, found, progress)
    if np.shape(max_F) != (sae.cfg.d_sae,):
        raise FeatureIndexError(f"dedicated features: {len(max_F)} maxima for {sae.cfg.d_sae} features; give those of this SAE")
    C, F = len(found.names), sae.cfg.d_sae
    sums = _Sums(np.zeros(F), csr_array((C, F)), csr_array((C, F)))
    bound_F = np.where(max_F > 0, criterion.level * np.asarray(max_F, np.float64), np.inf)
    for first, keep_N, acts in _batches(sae, corpus, found, "dedicated features", progress):
        _add(sums, found, first, keep_N, _fires(acts, bound_F))
    return _best(found, sums, criterion)


def _batches(sae: SAE, corpus: Corpus, found: Occurrences, title: str, progress: bool) -> Iterator[tuple]:
    """(first context of the sample, unmasked rows of its batch [N], activations of these rows as a sparse matrix)."""
    n, T = found.tokens_nT.shape
    size = max(1, _ROWS // T)
    with Progress(title, n * T, enabled=progress) as bar:
        for first in range(0, n, size):
            some = slice(first, first + size)
            x_ND = corpus.of_contexts(found.numbers_n[some], found.tokens_nT[some])
            keep_N = found.keep_nT[some].reshape(-1)
            bad = int((~np.isfinite(x_ND[keep_N].astype(np.float32))).any(1).sum())
            if bad:
                raise NonFiniteError(f"{bad} rows of contexts {found.numbers_n[some][0]} to {found.numbers_n[some][-1]} have NaN "
                                     "or Inf; harvest with config.lm.dtype='float32'")
            if keep_N.any():
                yield first, keep_N, active(sae, x_ND[keep_N])
            bar.advance(len(keep_N))


def maxima(sae: SAE, corpus: Corpus, found: Occurrences, progress: bool = True) -> np.ndarray:
    """float64 [F]: the largest activation of every feature in the sample, 0 where it fires on none of its tokens. Raises as
    `dedicated`.
    """
    max_F = np.zeros(sae.cfg.d_sae)
    for _, _, acts in _batches(sae, corpus, found, "largest activations", progress):
        np.maximum.at(max_F, acts.indices, acts.data)
    return max_F


def _fires(acts: csr_array, bound_F: np.ndarray) -> csr_array:
    """1 where a feature fires."""
    fires = csr_array(((acts.data >= bound_F[acts.indices]).astype(np.float64), acts.indices, acts.indptr), acts.shape)
    fires.eliminate_zeros()
    return fires


def _add(sums: _Sums, found: Occurrences, first: int, keep_N: np.ndarray, fires: csr_array) -> None:
    """Adds a batch whose row r is the r-th unmasked token from context `first` of the sample on."""
    T, rows = found.tokens_nT.shape[1], fires.shape[0]
    C = len(found.names)
    weight_N = np.repeat(found.weight_n[first:first + len(keep_N) // T], T)
    weight_R = weight_N[keep_N]
    sums.total_F += np.bincount(fires.indices, np.repeat(weight_R, np.diff(fires.indptr)), fires.shape[1])
    begin, end = np.searchsorted(found.row_S, (first, first + len(keep_N) // T))
    span, token = _tokens_of(found, begin, end, first * T)
    kept = keep_N[token]
    span, row = span[kept], (np.cumsum(keep_N) - 1)[token[kept]]
    concept_S = found.concept_S[begin:end]
    place = np.unique(concept_S[span] * max(rows, 1) + row)  # a token counts once for a concept
    of, row_of = np.divmod(place, max(rows, 1))
    sums.on_CF = sums.on_CF + csr_array((weight_R[row_of], (of, row_of)), (C, rows)) @ fires
    hits = csr_array((np.ones(len(span)), (span, row)), (end - begin, rows)) @ fires  # [spans, F]
    hits.data[:] = 1
    weight_S = found.weight_n[found.row_S[begin:end]]
    sums.hit_CF = sums.hit_CF + csr_array((weight_S, (concept_S, np.arange(end - begin))), (C, end - begin)) @ hits


def _tokens_of(found: Occurrences, begin: int, end: int, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """(span, token) of all tokens of spans begin .. end - 1; both counted from the batch's beginning."""
    T = found.tokens_nT.shape[1]
    start_S, length_S = found.row_S[begin:end] * T + found.first_S[begin:end] - offset, (found.stop_S - found.first_S)[begin:end]
    span = np.repeat(np.arange(end - begin), length_S)
    within = np.arange(len(span)) - np.repeat(np.cumsum(length_S) - length_S, length_S)
    return span, start_S[span] + within


def _best(found: Occurrences, sums: _Sums, criterion: Criterion) -> Dedicated:
    C = len(found.names)
    weight_C = np.bincount(found.concept_S, found.weight_n[found.row_S], C)
    out = Dedicated(found.names, np.bincount(found.concept_S, minlength=C), np.full(C, -1),
                    *(np.full(C, np.nan) for _ in range(3)), np.zeros(C, bool))
    for c in range(C):
        on_E, hit_E = (_row(table, c) for table in (sums.on_CF, sums.hit_CF))
        feature_E = on_E[0]
        if not len(feature_E):
            continue
        precision_E, recall_E = on_E[1] / sums.total_F[feature_E], hit_E[1] / weight_C[c]
        f1_E = 2 * precision_E * recall_E / (precision_E + recall_E)
        meets_E = (precision_E >= criterion.precision) & (recall_E >= criterion.recall)
        best = np.lexsort((feature_E, -f1_E, ~meets_E))[0]
        out.feature_C[c], out.present_C[c] = feature_E[best], meets_E[best]
        out.precision_C[c], out.recall_C[c], out.f1_C[c] = precision_E[best], recall_E[best], f1_E[best]
    return out


def _row(table: csr_array, c: int) -> tuple[np.ndarray, np.ndarray]:
    """(features, values) of a concept, in the order of the features: a feature has both a token and an occurrence, or neither."""
    feature, value = (part[table.indptr[c]:table.indptr[c + 1]] for part in (table.indices, table.data))
    order = np.argsort(feature)
    return feature[order], value[order]
