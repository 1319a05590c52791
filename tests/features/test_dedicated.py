"""Dedicated features: an SAE whose features are known, and a random one against sums over an array of rows x features."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from saejax.base import sharding
from saejax.base.errors import FeatureIndexError, NonFiniteError
from saejax.base.records import MeshOptions
from saejax.data.text import Text
from saejax.features.dedicated import Criterion, dedicated
from saejax.features.index import corpus
from saejax.features.index.corpus import Corpus
from saejax.sae import SAEParams
from saejax.sae.inference import SAE, SAEConfig
from saejax.scaling.concepts import sampling
from saejax.scaling.concepts.lists import Concept
from tests import tiny_experiment as tiny
from tests.features.conftest import FEATURES, make_sae

# Every token has an axis of its own, and "of" a second one that other features read.
PIECES = [b"<s>", b" of", b" iron", b" zinc", b" ces", b"ium", b" gold", b" argon", b"."]
V = len(PIECES)
NAMES = ("iron", "zinc", "cesium", "gold", "argon", "xenon")
# iron, feature 0; zinc and gold, feature 1; the second half of cesium, feature 2; feature 3 on all; argon, feature 4, in one of
# three contexts (those with gold); feature 5 on iron at a fifth of what it is on "."
FIRES = np.array([[0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0], [2, 0, 0, 1, 0, .2], [0, 1, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0],
                  [0, 0, 3, 1, 0, 0], [0, 1, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 1]], np.float32)


@pytest.fixture(scope="module")
def known():
    """(SAE, corpus): 300 contexts of 8 tokens; x is the token's axis, and one more is 1 at argon where gold comes before it."""
    rng = np.random.default_rng(0)
    tokens_NT = rng.choice([1, 2, 3, 6, 7, 8], (300, 8), p=[.7, .05, .1, .05, .05, .05]).astype(np.int32)
    tokens_NT[::40, 4:6] = 4, 5
    tokens_NT[:, 0] = 0
    keep_NT = tokens_NT > 0
    W_enc = np.concatenate([FIRES.T, np.eye(6, 1, -4)], axis=1).astype(np.float32)  # [6, V + 1]
    params = SAEParams(W_enc=jnp.asarray(W_enc), b_enc=jnp.zeros(6), W_dec=jnp.asarray(W_enc), b_dec=jnp.zeros(V + 1))
    sae = SAE(params, SAEConfig("relu", V + 1, 6, 0, False, ("known",), "known"))

    def activations(_start, _stop, tokens_NT):
        behind = (np.cumsum(tokens_NT == 6, axis=1) > 0) & (tokens_NT == 7)
        return np.concatenate([np.eye(V)[tokens_NT], behind[..., None]], axis=-1).reshape(-1, V + 1).astype(np.float32)

    made = Corpus("known", "0", 8, 300, "0", "0", lambda: [(tokens_NT, keep_NT)], activations, by_tokens=True)
    return sae, made, tokens_NT


def found_in(made: Corpus, names=NAMES, pieces=PIECES, **options):
    return sampling.find([Concept("things", (name,)) for name in names], made.make(), pieces,
                         sampling.SampleOptions(**options), progress=False)


def test_known_features_are_found(known):
    sae, made, tokens_NT = known
    out = dedicated(sae, made, found_in(made), progress=False)
    iron, zinc, gold, argon = ((tokens_NT == token).sum() for token in (2, 3, 6, 7))
    behind = ((np.cumsum(tokens_NT == 6, axis=1) > 0) & (tokens_NT == 7)).sum()
    assert out.sampled_C.tolist() == [iron, zinc, 8, gold, argon, 0]
    assert out.feature_C.tolist() == [0, 1, 2, 1, 4, -1]
    assert out.precision_C[:5] == pytest.approx([1, zinc / (zinc + gold), 1, gold / (zinc + gold), 1])
    assert out.recall_C[:5] == pytest.approx([1, 1, 1, 1, behind / argon])
    assert out.f1_C[4] == pytest.approx(2 * behind / (argon + behind)) and np.isnan(out.f1_C[5])
    assert gold < zinc and behind < argon / 2
    assert out.present_C.tolist() == [True, True, True, False, False, False]


def test_thresholds_decide(known):
    sae, made, _ = known
    found = found_in(made)
    loose = dedicated(sae, made, found, Criterion(precision=0.2, recall=0.02), progress=False)
    strict = dedicated(sae, made, found, Criterion(precision=0.99), progress=False)
    assert loose.present_C.tolist() == [True] * 5 + [False]
    assert strict.present_C.tolist() == [True, False, True, False, False, False]
    low = dedicated(sae, made, found, Criterion(level=0.5), max_F=np.array([2, 1, 30, 1, 1, 1]),
                    progress=False)
    assert not low.present_C[2] and low.feature_C[2] == 3  # 3 is a tenth of the maximum that is given
    with pytest.raises(FeatureIndexError, match="5 maxima for 6 features"):
        dedicated(sae, made, found, max_F=np.ones(5), progress=False)


def test_rows_that_are_no_numbers_are_refused(known):
    sae, made, tokens_NT = known

    def activations(start, stop, tokens_NT):
        return np.where(tokens_NT.reshape(-1, 1) == 4, np.nan, made.activations(start, stop, tokens_NT))

    with pytest.raises(NonFiniteError, match="8 rows of contexts 0 to 299 have NaN"):
        dedicated(sae, dataclasses.replace(made, activations=activations), found_in(made), progress=False)


def test_a_sample_gives_about_the_same(known):
    sae, made, _ = known
    whole, some = (dedicated(sae, made, found_in(made, **options), progress=False)
                   for options in ({}, {"per_concept": 25, "random": 40}))
    assert len(found_in(made, per_concept=25, random=40).numbers_n) < 150
    assert some.feature_C.tolist() == whole.feature_C.tolist()
    assert some.precision_C[:5] == pytest.approx(whole.precision_C[:5], abs=0.15)
    assert some.recall_C[:5] == pytest.approx(whole.recall_C[:5], abs=0.15)


def brute_force(sae, words, found, criterion: Criterion) -> tuple[np.ndarray, np.ndarray]:
    """(precision, recall) [C, F] over all unmasked rows of a store that `found` holds whole."""
    T, contexts = words.context, len(found.numbers_n)
    acts_BF = np.asarray(sae.encode(words.activations(0, contexts * T, None).astype(np.float32)), np.float64)
    acts_BF[~found.keep_nT.reshape(-1)] = 0
    fires_BF = (acts_BF > 0) & (acts_BF >= criterion.level * acts_BF.max(0))
    on_CF, hit_CF, many_C = (np.zeros((len(found.names), *more)) for more in ((FEATURES,), (FEATURES,), ()))
    for row, c, first, stop in zip(found.row_S, found.concept_S, found.first_S, found.stop_S, strict=True):
        fires = fires_BF[row * T + first:row * T + stop]
        on_CF[c] += fires.sum(0)
        hit_CF[c] += fires.any(0)
        many_C[c] += 1
    return on_CF / np.maximum(fires_BF.sum(0), 1), hit_CF / many_C[:, None]


@pytest.mark.parametrize("kind", ["topk", "relu"])
@pytest.mark.parametrize("shape", [None, (2, 4)])
def test_any_sae_on_any_mesh_against_whole_arrays(kind, shape, words, lm_):
    """Concepts are words of letters of the tiny text, one to eight tokens each."""
    sae = make_sae(None if shape is None else sharding.make_mesh(MeshOptions(*shape)), kind=kind)
    pieces = lm_.tokenizer.token_bytes.pieces
    some = "".join(b"".join(pieces[t] for t in row).decode() for tokens_NT, _ in words.make() for row in tokens_NT[:12].tolist())
    names = sorted({word for word in some.replace(".", " ").replace("</s>", " ").replace("<s>", " ").split() if word.isalpha()})
    found = found_in(words, names, pieces, per_concept=10**6, random=10**6)
    criterion = Criterion(precision=0.01, recall=0.6)
    precision_CF, recall_CF = brute_force(sae, words, found, criterion)
    out = dedicated(sae, words, found, criterion, progress=False)
    every = np.arange(len(names))
    seen = out.feature_C >= 0
    best = out.feature_C[seen]
    assert len(names) > 30 and seen.any() and (recall_CF[~seen] == 0).all()
    assert out.precision_C[seen] == pytest.approx(precision_CF[every[seen], best])
    assert out.recall_C[seen] == pytest.approx(recall_CF[every[seen], best])
    meets_C = ((precision_CF >= criterion.precision) & (recall_CF >= criterion.recall)).any(1)
    assert np.array_equal(out.present_C, meets_C) and 0 < meets_C.sum() < len(names)
    f1_CF = 2 * precision_CF * recall_CF / np.maximum(precision_CF + recall_CF, 1e-30)
    absent = seen & ~meets_C
    assert out.f1_C[absent] == pytest.approx(f1_CF.max(1)[absent])


def test_activations_of_any_contexts(config, store, words, lm_):
    numbers = np.array([2, 3, 7])
    tokens_NT = store.tokens(0, 8 * 32).reshape(8, 32)
    x_ND = words.of_contexts(numbers, tokens_NT[numbers])
    assert np.array_equal(x_ND, np.concatenate([store.read(tiny.HOOKPOINT, 32 * n, 32 * n + 32) for n in numbers]))
    text = corpus.from_text(Text.of(config), lm_, (tiny.HOOKPOINT,), split="train", tokens=256)
    again = text.of_contexts(numbers, tokens_NT[numbers]).astype(np.float32)
    assert np.allclose(again, x_ND.astype(np.float32), atol=0.05)
