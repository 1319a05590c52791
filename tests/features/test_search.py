"""Ways to find features, against brute force on the tiny model."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest

from saejax.base.errors import FeatureIndexError, PromptError
from saejax.features.effects.prompting import encoded
from saejax.features.search import sets as prompt_sets
from saejax.features.search.prompt import Ranking, activations, by_attribution, by_prompt, by_token
from saejax.features.search.sets import by_sets
from saejax.features.search.text import by_text
from saejax.lm import capture
from tests import tiny_experiment as tiny
from tests.features.conftest import FEATURES, make_sae

PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def acts(lm_):
    """[T, F] on the prompt, 0 at BOS."""
    tokens = encoded(lm_, PROMPT)
    assert tokens[0] == lm_.tokenizer.bos_id
    x = jax.jit(lambda model: capture(model, tokens[None], [tiny.HOOKPOINT])[tiny.HOOKPOINT])(lm_.model)[0].astype(jnp.bfloat16)
    return tokens, np.where(np.arange(len(tokens))[:, None] == 0, 0, np.asarray(make_sae().encode(x)))


def test_the_most_active_features_of_a_prompt(lm_, sae, acts):
    tokens, expected = acts
    found = by_prompt(lm_, sae, PROMPT, 5)
    np.testing.assert_allclose([f.score for f in found], np.sort(expected.max(0))[::-1][:5], rtol=0.02)
    at = int(expected[:, found[0].feature].argmax())
    assert found[0].why.startswith(f"strongest on token {at} {lm_.tokenizer.token(tokens[at])!r}, activation ")


def test_a_prompt_ranks_by_share_of_the_maximum_without_dense_features(lm_, sae, acts):
    """A feature that is always on has the highest activation and must not be found; of the others the share counts."""
    tokens, expected = acts
    rng = np.random.default_rng(0)
    maxima, density = rng.uniform(1, 9, FEATURES), rng.uniform(0, 0.009, FEATURES)
    dense = np.argsort(-expected.max(0))[:3]
    maxima[dense], density[dense] = expected.max(0)[dense], (0.0101, 0.5, 1)
    rest = np.setdiff1d(np.arange(FEATURES), dense)
    shares = {int(f): expected[:, f].max() / maxima[f] for f in rest if expected[:, f].max() > 0}
    found = by_prompt(lm_, sae, PROMPT, FEATURES, Ranking(maxima, density))
    assert {f.feature for f in found} == set(shares) and not set(dense) & {f.feature for f in found}
    np.testing.assert_allclose([f.score for f in found], sorted(shares.values(), reverse=True), rtol=0.02)
    for most, out in ((0.0101, 2), (0.5, 1), (1, 0)):
        wider = by_prompt(lm_, sae, PROMPT, FEATURES, Ranking(maxima, density, most))
        assert len(wider) == len(shares) + 3 - out and len(by_prompt(lm_, sae, PROMPT, 4, Ranking(maxima, density, most))) == 4


def test_the_features_of_each_token(lm_, sae, acts):
    tokens, expected = acts
    found = by_token(lm_, sae, PROMPT, 3)
    assert [one.position for one in found] == list(range(1, len(tokens))), "BOS is left out"
    assert [one.token for one in found] == [lm_.tokenizer.token(t) for t in tokens[1:]]
    for one in found:
        highest = np.sort(expected[one.position])[::-1][:3]
        np.testing.assert_allclose([f.score for f in one.found], highest[highest > 0], rtol=0.02)


def test_attribution_is_what_a_small_ablation_takes_away(lm_, sae, acts):
    """d (logit difference) / d (share of the feature's contribution), by a central difference through the whole model."""
    tokens, expected = acts
    [best, *_] = by_attribution(lm_, sae, PROMPT, "a", "b")
    ids, W = [lm_.tokenizer.encode(t)[0] for t in "ab"], np.asarray(sae.W_dec)

    @jax.jit
    def logits(model, part):
        return model(tokens[None], taps={tiny.HOOKPOINT: lambda x: x + part})[0, -1]

    def difference(share):
        found = logits(lm_.model, jnp.asarray(share * expected[:, best.feature, None] * W[best.feature]))
        return float(found[ids[0]] - found[ids[1]])

    slope = (difference(0.05) - difference(-0.05)) / 0.1
    assert best.score == pytest.approx(slope, rel=0.05) and best.score > 0


def test_sets_of_prompts_are_told_apart(lm_, sae):
    positives, negatives = ([letter * times for times in range(1, 9)] for letter in "za")
    tested = by_sets(lm_, sae, positives, negatives, FEATURES)
    on, off = (np.mean([activations(lm_, sae, encoded(lm_, prompt)).max(0) > 0 for prompt in prompts], 0)
               for prompts in (positives, negatives))
    assert tested.best == pytest.approx((on - off).max()) and tested.found and tested.p <= 0.05
    assert {f.feature for f in tested.found} == set(np.flatnonzero(on - off > tested.bound + 1e-6))
    np.testing.assert_allclose([f.score for f in tested.found], (on - off)[[f.feature for f in tested.found]])
    assert [f.score for f in tested.found] == sorted((f.score for f in tested.found), reverse=True)
    none = by_sets(lm_, sae, negatives, negatives[::-1], FEATURES)
    assert none.found == [] and none.best == 0 and none.p == 1
    assert str(none) == f"nothing above chance, best score 0, bound {none.bound:.3g}, p = 1"


def test_text_of_examples(index):
    """The lift of every feature, counted place by place."""
    def hit(context, position):
        text = [index.vocabulary[t].lower() for t in index.tokens_NT[context]]
        return "z" in text[position], "z" in "".join(text[max(0, position - 8):position + 4])

    share = np.mean([hit(*place) for place in np.argwhere(index.keep_NT)], axis=0)
    expected = {}
    for feature in range(FEATURES):
        hits = np.array([hit(e["context"], e["position"]) for e in index.examples(feature) if e["interval"] == 0])
        for way in (0, 1):
            lift = (hits[:, way].sum() + 4 * share[way]) / (len(hits) + 4) / share[way] if len(hits) else 0
            if lift > 1 and hits[:, way].any():
                expected[feature] = (way, -lift)
                break
    found = by_text(index, "Z", FEATURES)
    assert {f.feature for f in found} == set(expected)
    assert [f.score for f in found] == pytest.approx([-lift for _, lift in sorted(expected.values())])
    assert by_text(index, "qqqqqqqqqqqq") == []


def drawn_index(rows: list[list[str]], examples: list[tuple[int, int, int]]):
    """An index of written-out tokens and (feature, context, position) of top contexts, as far as a search by text reads it."""
    vocabulary = sorted({text for row in rows for text in row})
    tokens = np.array([[vocabulary.index(text) for text in row] for row in rows])
    feature, context, position = (np.array(column) for column in zip(*sorted(examples), strict=True))
    table = pa.table({"feature": feature, "interval": np.zeros(len(feature), int), "context": context, "position": position})
    return SimpleNamespace(texts=lambda ids: [vocabulary[i] for i in ids], tokens_NT=tokens, keep_NT=np.ones(tokens.shape, bool),
                           features=int(feature[-1]) + 1, table=lambda name, first, last: table)


def test_a_text_is_held_against_how_often_it_is_there():
    """Eight of 20 stand above one of 2, what fires on the text above what fires behind it; what is everywhere tells nothing."""
    with_king, without = ["the", " king", " of", " the", " l", "ooking", "."], ["the", " cat", " of", " the", " l", "ooking", "."]
    rows = [with_king] * 30 + [without] * 970
    on = [(0, c, 1) for c in range(8)] + [(0, c, 1) for c in range(100, 112)]            # on it in 8 of 20
    once = [(1, 0, 1), (1, 100, 1)]                                                      # on it in 1 of 2
    behind = [(2, c, 2) for c in range(20)]                                              # behind it in 20 of 20
    nothing = [(3, c, 2) for c in range(100, 120)]
    index = drawn_index(rows, on + once + behind + nothing)
    found = by_text(index, " King")
    assert [f.feature for f in found] == [0, 1, 2]
    assert [f.why for f in found] == ["on it in 8 of 20 top contexts, near it in 8", "on it in 1 of 2 top contexts, near it in 1",
                                      "near it in 20 of 20 top contexts"]
    token, near = 30 / 7000, 30 * 7 / 7000
    assert [f.score for f in found] == pytest.approx([(8 + 4 * token) / 24 / token, (1 + 4 * token) / 6 / token,
                                                      (20 + 4 * near) / 24 / near])
    assert by_text(index, "king of")[0].feature == 2, "the token that ends it holds a part of it"
    assert by_text(index, "the") == [], "near every token"


@pytest.mark.parametrize("call, message", [
    (lambda lm_, sae, index: by_prompt(lm_, sae, "  "), "prompt is empty"),
    (lambda lm_, sae, index: by_prompt(lm_, sae, "a" * 10_000), "the model's context"),
    (lambda lm_, sae, index: by_attribution(lm_, sae, "a", "two"), "'two' is 3 tokens"),
    (lambda lm_, sae, index: by_sets(lm_, sae, [], []), "0 positive and 0 negative prompts; give at least 5 pairs"),
    (lambda lm_, sae, index: by_sets(lm_, sae, ["a"], []), "1 positive and 0 negative prompts; give at least 5 pairs"),
    (lambda lm_, sae, index: by_sets(lm_, sae, ["a"], ["b"]), "1 pair of prompts can change .* in 2 ways .* at least 5 pairs"),
    (lambda lm_, sae, index: by_sets(lm_, sae, list("abcd"), list("efgh")), "4 pairs of prompts .* at least 5 pairs"),
    (lambda lm_, sae, index: by_text(index, " "), "no text to look for")])
def test_empty_and_impossible_searches_are_refused(lm_, sae, index, call, message):
    with pytest.raises((FeatureIndexError, PromptError), match=message):
        call(lm_, sae, index)


def test_prompt_sets_are_matched_and_loaded():
    for name in prompt_sets.names():
        positives, negatives = prompt_sets.prompt_set(name)
        assert len(positives) == len(negatives) == 24 == len(set(positives)) == len(set(negatives))
        assert not set(positives) & set(negatives)
    assert {"self_representation", "code_errors"} < set(prompt_sets.names())
    with pytest.raises(FeatureIndexError, match="choose one of code_vulnerabilities"):
        prompt_sets.prompt_set("nothing")
    languages = prompt_sets.parallel()
    assert set(languages) == {"en", "fr", "de", "es", "it"} and {len(s) for s in languages.values()} == {36}
    sentences = [s for part in languages.values() for s in part]
    assert len(set(sentences)) == 180


def test_multilingual_features_score_high():
    """Against agreement counted pair by pair: a feature of meaning, of a language, always on, of nothing."""
    rng = np.random.default_rng(0)
    meaning = rng.random(12) < 0.5
    language = np.arange(5)[:, None] == 1
    on = np.stack([np.broadcast_to(meaning, (5, 12)), np.broadcast_to(language, (5, 12)), np.ones((5, 12), bool),
                   rng.random((5, 12)) < 0.5], axis=-1)
    score = prompt_sets.multilingual_score(on)
    for f in range(4):
        same, different = [], []
        for a in range(5):
            for b in range(a):
                for i in range(12):
                    for j in range(12):
                        (same if i == j else different).append(on[a, i, f] == on[b, j, f])
        assert score[f] == pytest.approx(np.mean(same) - np.mean(different))
    assert score[0] > 0.45 and abs(score[1]) < 1e-9 and abs(score[2]) < 1e-9 and abs(score[3]) < 0.3


@pytest.mark.slow
def test_meaning_on_the_tiny_model(lm_, sae):
    tested = prompt_sets.by_meaning(lm_, sae, 5)
    assert all(tested.bound < one.score <= 1 and "of 5 languages" in one.why for one in tested.found) and tested.best <= 1
