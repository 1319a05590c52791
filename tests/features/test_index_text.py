"""Text comes back from an index exactly: blanks before words, characters of several tokens. Rows without a token are left out."""

import dataclasses
import json
from unittest.mock import patch

import numpy as np
import pytest

from saejax.base import sharding
from saejax.base.errors import FeatureIndexError
from saejax.data import parts
from saejax.data.text import Text
from saejax.features.effects import steering
from saejax.features.index import corpus, neuronpedia
from saejax.features.index.build import BuildOptions, build
from saejax.features.index.reader import MANIFEST, FeatureIndex, manifest_digest
from saejax.features.search.prompt import by_prompt
from saejax.features.search.text import by_text
from saejax.judging import material
from saejax.lm import load
from tests import tiny_experiment as tiny
from tests.features.conftest import make_sae
from tests.lm import tiny_llama
from tests.lm.token_forms import FORMS, save

LINE, MORE = "the king has a daughter \U0001f600 and ", 64  # rows of the embedding beyond the tokenizer


@pytest.fixture(scope="module", params=["byte_level", "llama2"])
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    backend = FORMS[request.param]()
    config = tiny_llama.CONFIG | {"vocab_size": backend.get_vocab_size() + MORE}
    tiny_llama.write(folder / "model", config, tiny_llama.tensors(config))
    save(backend, folder / "model")
    (folder / "text").mkdir()
    for i in range(40):
        (folder / "text" / f"{i}.txt").write_text(f"{i} " + LINE * 5)
    lm_ = load(str(folder / "model"))
    config = tiny.make_config(folder / "model", folder / "text", folder / "run", **{"text.shuffle": False})
    words = corpus.from_text(Text.of(config), lm_, (tiny.HOOKPOINT,), split="train", tokens=2048)
    sae = make_sae(sharding.single_device_mesh())
    with patch.object(parts, "PARTS", 1):  # a context goes on where the one before ended
        return lm_, sae, build(folder / "features", sae, words, lm_, BuildOptions(rows=512, progress=False))


def test_texts_of_contexts(made):
    """The rows of a document, put together, are the document."""
    lm_, _, index = made
    flat = np.asarray(index.tokens_NT)[:, 1:].ravel()  # without BOS
    ends = np.flatnonzero(flat == lm_.tokenizer.eos_id)[:3]
    for n, (first, last) in enumerate(zip([-1, *ends], ends, strict=False)):
        texts = index.texts(flat[first + 1:last])
        assert "".join(texts).removeprefix(lm_.tokenizer.token_bytes.begin).endswith(" " + LINE * 5) and len(ends) > n


def test_examples_search_and_export_show_the_text(made, tmp_path):
    lm_, sae, index = made
    assert by_text(index, "the king") and by_text(index, "\U0001f600") and not by_text(index, "theking")
    neuronpedia.write(index, tmp_path / "export", name="tiny", dataset="tiny")
    for feature in range(index.features):
        for example in index[feature].examples:
            assert "\ufffd" not in "".join(example.texts) and max(example.acts) >= 0.999 * example.value
    batch = json.loads((tmp_path / "export" / "batch-0.json").read_text())
    for feature in batch["features"]:
        for one in feature["activations"]:
            text, at = "".join(one["tokens"]), one["qualifying_token_index"]
            assert "\ufffd" not in text and one["tokens"][at] and len(one["tokens"]) == len(one["values"]) == index.window
    found = by_prompt(lm_, sae, "the king \U0001f600", 5)
    assert found and all("\ufffd" not in one.why for one in found)


def test_rows_without_a_token_are_not_promoted(made):
    lm_, sae, index = made
    known = lm_.tokenizer.vocab_size
    assert lm_.cfg.vocab_size == known + MORE and lm_.known_V.sum() == known
    ids, effects = (np.array(index.lists(name)) for name in ("logit_ids", "logit_effects"))
    assert ids.max() < known and (effects[:, 0] > 0).all()
    table_VD = np.asarray(lm_.model.whole["unembed"][...], np.float64)[:known]
    gain_D = np.asarray(lm_.model.whole["final_norm"][...], np.float64)
    effect_V = table_VD @ (gain_D * np.asarray(sae.params.W_dec[0], np.float64))
    effect_V -= effect_V.mean()
    np.testing.assert_allclose(effects[0, :10], np.sort(effect_V)[::-1][:10], rtol=1e-4)
    one, = steering.next_tokens(lm_, sae, "the king", [steering.Change("up", {3: 40.0})], n=200)
    assert max(token for token, _, _ in one.rises + one.falls) < known


def test_a_window_at_a_cut_character(made):
    _, _, index = made
    ids = np.asarray(index.tokens_NT)
    inside = [(c, t) for c, t in np.argwhere(np.isin(ids, [i for i, p in enumerate(index.vocabulary) if p == "<0xF0>"]))
              if t + 4 <= ids.shape[1] - 1]
    context, start = inside[0]
    texts, acts, by = index.shown(context, start, [0.0, 1.0, 3.0, 2.0, 0.5])
    assert texts[:4] == ["\U0001f600", "", "", ""] and acts == [3.0, 0.0, 0.0, 0.0, 0.5] and by == [0, 0, 0, 0, 4]
    texts, acts, by = index.shown(context, start + 1, [1.0, 2.0, 3.0])
    assert texts == ["<0x9F>", "<0x98>", "<0x80>"] and acts == [1.0, 2.0, 3.0]


def test_judging_shows_the_text(made):
    _, _, index = made
    feature = int(np.argmax(index.column("fired")))
    e = index.examples(feature)[0]
    window = material._window(index, feature, e["context"], e["position"], e["start"], e["value"], 1.0, e["acts"])
    assert "\ufffd" not in "".join(window.tokens) and window.tokens[window.position - window.start]


def test_an_index_with_wrong_token_strings_is_refused(made, tmp_path):
    _, _, index = made
    values = dict(index.manifest, schema_version=2)
    (tmp_path / MANIFEST).write_text(json.dumps(values | {"sha256": manifest_digest(values)}))
    with pytest.raises(FeatureIndexError, match="schema version 2, this saejax reads 3.*build the index again .`saejax f"):
        FeatureIndex.open(tmp_path)


@pytest.mark.parametrize("prompt", ["<|endoftext|>the king", "the king"])
def test_one_bos(made, prompt):
    """Also where a chat template, or whoever wrote the prompt, has put it there."""
    lm_, _, _ = made
    bos = lm_.tokenizer.bos_id
    for given in (prompt, lm_.tokenizer.encode(prompt), np.array(lm_.tokenizer.encode(prompt))):
        tokens_T = lm_.tokens(given)
        assert tokens_T[0] == bos and (tokens_T == bos).sum() == 1
    said = dataclasses.replace(lm_.tokenizer, chat_template="{{ bos_token }}{{ messages[0].content }}")
    ids = said.chat([{"role": "user", "content": "the king"}])
    assert ids[0] == bos and np.array_equal(lm_.tokens(ids), ids)
