"""Ways to find features, against brute force on the tiny model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.base.errors import FeatureIndexError, PromptError
from saejax.features.effects.prompting import encoded
from saejax.features.search import sets as prompt_sets
from saejax.features.search.prompt import activations, by_attribution, by_prompt
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
    assert found[0].why == f"token {at} {lm_.tokenizer.token(tokens[at])!r}"
    last = by_prompt(lm_, sae, PROMPT, 3, last=1)
    np.testing.assert_allclose([f.score for f in last], np.sort(expected[-1])[::-1][:3], rtol=0.02)


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
    positives, negatives = ["zzzz zz", "a zzz", "zz zz"], ["the cat", "a dog sat", "rain"]
    found = by_sets(lm_, sae, positives, negatives, FEATURES)
    peaks = {p: activations(lm_, sae, encoded(lm_, p)).max(0) > 0 for p in positives + negatives}
    for one in found[:5]:
        expected = np.mean([peaks[p][one.feature] for p in positives]) - np.mean([peaks[p][one.feature] for p in negatives])
        assert one.score == pytest.approx(expected, abs=0.0011)
    assert [f.score for f in found] == sorted((f.score for f in found), reverse=True) and found[0].score > 0.3
    assert all(0 < f.score for f in by_sets(lm_, sae, positives, (), 3)), "without negatives"


def test_text_of_examples(index):
    found = by_text(index, "Z", 5)
    for one in found:
        top = [e for e in index.examples(one.feature) if e["interval"] == 0]
        texts = ["".join(index.vocabulary[t] for t in index.tokens_NT[e["context"], max(0, e["position"] - 8):e["position"] + 4])
                 for e in top]
        assert one.score == pytest.approx(np.mean(["z" in text for text in texts]))
    assert found[0].score > found[-1].score or found[0].score == 1
    assert by_text(index, "qqqqqqqqqqqq") == []


@pytest.mark.parametrize("call, message", [
    (lambda lm_, sae, index: by_prompt(lm_, sae, "  "), "prompt is empty"),
    (lambda lm_, sae, index: by_prompt(lm_, sae, "a" * 10_000), "the model's context"),
    (lambda lm_, sae, index: by_attribution(lm_, sae, "a", "two"), "'two' is 3 tokens"),
    (lambda lm_, sae, index: by_sets(lm_, sae, []), "no positive prompts"),
    (lambda lm_, sae, index: by_text(index, " "), "no text to look for")])
def test_empty_and_impossible_searches_are_refused(lm_, sae, index, call, message):
    with pytest.raises((FeatureIndexError, PromptError), match=message):
        call(lm_, sae, index)


def test_prompt_sets_are_matched_and_loaded():
    for name in prompt_sets.names():
        positives, negatives = prompt_sets.prompt_set(name)
        assert len(positives) == len(negatives) >= 8 and not set(positives) & set(negatives)
    with pytest.raises(FeatureIndexError, match="choose one of code_vulnerabilities"):
        prompt_sets.prompt_set("nothing")
    languages = prompt_sets.parallel()
    assert set(languages) == {"en", "fr", "de", "es", "it"} and {len(s) for s in languages.values()} == {12}
    sentences = [s for part in languages.values() for s in part]
    assert len(set(sentences)) == 60


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
    found = prompt_sets.by_meaning(lm_, sae, 5)
    assert all(0 < one.score <= 1 and "of 5 languages" in one.why for one in found)
