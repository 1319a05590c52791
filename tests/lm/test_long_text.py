"""Texts that are tokenised in pieces have the ids of the whole text."""

import random
from unittest.mock import patch

import numpy as np
import pytest

from saejax.lm import long_text
from tests.lm import token_forms
from tests.lm.token_forms import WORDS

FORMS = ("byte_level", "llama2", "gemma", "metaspace", "words")


def sizes(long, overlap, agreed):
    return patch.multiple(long_text, LONG=long, _OVERLAP=overlap, _AGREED=agreed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_whole(form, seed):
    rng, backend = random.Random(seed), getattr(token_forms, form)()
    odd = ["\u00e9", "\U0001f600", "<|endoftext|>", "\n\n", "  ", "zqz", "."]
    text = "".join(rng.choice(WORDS) + rng.choice([" "] * 9 + odd) for _ in range(3000))
    whole = backend.encode(text, add_special_tokens=False).ids
    with sizes(400, 120, 8):
        assert long_text.ids_of(backend, text).tolist() == whole


def test_text_without_an_end_to_its_words_goes_on():
    """Nothing is lost or there twice, also where the pieces never give the same tokens."""
    backend = token_forms.llama2()
    text = "thethekingkking" * 300
    with sizes(200, 40, 30):
        ids = long_text.ids_of(backend, text)
    assert backend.decode(ids.tolist()) == text


@pytest.mark.parametrize("length", [399, 400, 401, 680, 681, 5000])
def test_any_length(length):
    backend = token_forms.byte_level()
    text = "".join(random.Random(0).choices("abc \u00e9", k=length))
    with sizes(400, 120, 8):
        assert long_text.ids_of(backend, text).tolist() == backend.encode(text, add_special_tokens=False).ids


def test_the_tokenizer_takes_long_and_short_texts_in_one_batch(smollm2):
    texts = ["one two", "the king has a daughter, " * 200, "", "three\n" * 300]
    expected = smollm2.tokenizer.encode_batch(texts)
    with sizes(500, 100, 8), patch("saejax.lm.tokenizer.LONG", 500):
        for one, other in zip(smollm2.tokenizer.encode_batch(texts), expected, strict=True):
            assert np.array_equal(one, other)
