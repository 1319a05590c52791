from dataclasses import replace

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saejax.base.errors import TextError
from saejax.config import TextOptions
from saejax.data.text import describe
from saejax.data.tokens import in_memory, token_batches
from saejax.lm.tokenizer import from_pretrained
from tests.data.making import documents, loaded, sentences, word_tokenizer
from tests.lm.token_forms import byte_level, save

word = st.integers(2, 49)
document = st.one_of(st.none(), st.just(""), st.lists(word, min_size=1, max_size=30))


def as_text(ids):
    return ids if ids is None or ids == "" else " ".join(f"w{i}" for i in ids)


def pack(options, tokenizer=None, n=1, **kwargs):
    return in_memory(options, tokenizer or word_tokenizer(), n, seed=0, **kwargs).read(0, n)


@settings(deadline=None, max_examples=40)
@given(docs=st.lists(document, min_size=1, max_size=30), context=st.integers(2, 9), bos=st.sampled_from(["row", "doc", "none"]),
       separator=st.sampled_from(["eos", "none"]), pad=st.sampled_from([None, 1, 9]), special=st.booleans())
def test_one_document_a_row(docs, context, bos, separator, pad, special):
    """Each document once, in order, cut at the context; what fills a row up is masked, also where that is the separator."""
    docs = [[i for i in d if i != 9] or [2] if isinstance(d, list) else d for d in docs]  # no document says the pad token
    options = TextOptions(context=context, bos=bos, separator=separator, holdout=0.0, packing="document",
                          mask=("first", "special") if special else ("first",))
    sources, tokenizer = loaded(options, [as_text(d) for d in docs]), replace(word_tokenizer(), pad_id=pad)
    wanted = [([0] * (bos != "none") + [int(w[1:]) for w in text.split()] + [1] * (separator == "eos"))[:context]
              for text in documents(options, 3, sources=sources)]
    if not wanted:
        with pytest.raises(TextError):
            in_memory(options, tokenizer, 1, seed=3, sources=sources)
        return
    packed = in_memory(options, tokenizer, 10**6, seed=3, sources=sources)
    rows = packed.read(0, packed.contexts)  # no more documents than parts: they keep their order
    lengths, keep = packed.lengths(rows), packed.keep(rows, np.arange(len(rows)))
    assert lengths.tolist() == list(map(len, wanted)) and packed.dropped == 0
    for row, length, kept, text in zip(rows, lengths, keep, wanted, strict=True):
        assert row[:length].tolist() == text and (row[length:] == (1 if pad is None else pad)).all()
        assert kept.tolist() == [0 < t < length and not (special and row[t] in (0, 1)) for t in range(context)]


def test_one_document_a_row_is_part_of_what_the_text_is():
    options = TextOptions(context=8, holdout=0.0)
    packed, alone = (describe(o, loaded(o, ["w3 w4"]), 0) for o in (options, replace(options, packing="document")))
    assert alone == packed | {"packing": "document"}
    with pytest.raises(TextError, match="config.text.packing: 'document' fills rows up, and the tokenizer has neither a pad"):
        tokenizer = word_tokenizer(bos=None, eos=None)
        options = replace(options, packing="document", bos="none", separator="none")
        pack(options, tokenizer, sources=loaded(options, ["w3"]))


def test_splits_are_disjoint_complete_and_independent_of_order():
    texts = sentences(400)
    a, b = (TextOptions(holdout=0.25, shuffle=s) for s in (True, False))
    held = {t for t in documents(a, 1, "heldout", sources=loaded(a, texts))}
    assert held == {t for t in documents(b, 9, "heldout", sources=loaded(b, texts[::-1]))}
    assert held | set(documents(a, 1, "train", sources=loaded(a, texts))) == set(texts)
    assert not held & set(documents(a, 1, "train", sources=loaded(a, texts)))
    assert 0.15 < len(held) / len(set(texts)) < 0.35


def test_shuffle_depends_on_the_seed_only():
    texts, options = sentences(300), TextOptions(holdout=0.0)
    one, same, other = (list(documents(options, seed, sources=loaded(options, texts))) for seed in (0, 0, 1))
    assert one == same != other
    assert sorted(one) == sorted(other) == sorted(texts)


@pytest.mark.parametrize("special, masked", [((0, 1), [0, 1]), ((1,), [1]), ((), [])])
def test_special_ids_are_masked_whether_or_not_id_0_is_one(special, masked):
    options = TextOptions(context=8, holdout=0.0)
    sources = loaded(options, ["w0 w3 w4 w0 w1"] * 20)
    batches = list(token_batches(options, word_tokenizer(special=special), 3, seed=0, sources=sources))
    tokens, keep = (np.concatenate([getattr(b, f) for b in batches]) for f in ("tokens_BT", "keep_BT"))
    assert {0, 1, 3} <= set(tokens.ravel().tolist())
    assert np.array_equal(keep[:, 1:], ~np.isin(tokens, masked)[:, 1:]) and not keep[:, 0].any()
    options = replace(options, mask=("first",))
    unmasked = next(token_batches(options, word_tokenizer(special=special), 3, seed=0, sources=sources))
    assert unmasked.keep_BT[:, 1:].all()


@pytest.mark.parametrize("bos", ["row", "doc", "none"])
@pytest.mark.parametrize("first", [0, 1])
def test_the_first_token_of_a_row_is_masked_whatever_it_is(bos, first):
    options = TextOptions(context=8, holdout=0.0, bos=bos, mask=("first",) * first)
    sources = loaded(options, ["w5 w3 w4 w6 w7"] * 20)
    packed = in_memory(options, word_tokenizer(special=()), 4, seed=0, sources=sources)
    assert np.array_equal(packed.keep(packed.read(0, 4), np.arange(4)), np.tile(np.arange(8) >= first, (4, 1)))


def test_bos_and_separator_by_their_text():
    def rows(bos, separator):
        options = TextOptions(context=8, holdout=0.0, bos=bos, separator=separator)
        return pack(options, sources=loaded(options, ["w3 w4"] * 20)).ravel().tolist()

    assert rows("w7", "w8") == [7, 3, 4, 8, 3, 4, 8, 3] and rows("w7", "none") == [7, *[3, 4] * 3, 3]
    assert rows("doc:w7", "w8") == [7, 3, 4, 8, 7, 3, 4, 8] and rows("doc", "eos") == [0, 3, 4, 1, 0, 3, 4, 1]
    with pytest.raises(TextError, match="config.text.bos: 'rows' is no token of this tokenizer"):
        rows("rows", "eos")
    with pytest.raises(TextError, match="config.text.separator: 'doc:' is no token"):
        rows("none", "doc:")


def test_conversations_and_token_ids(tmp_path):
    """One BOS and one separator, also where the document has them already; ids that the tokenizer lacks are refused."""
    tokenizer = replace(word_tokenizer(), chat_template="{% for m in messages %}{{ m.role }} {{ m.content }} w1 {% endfor %}")
    said = [[{"role": "w5", "content": "w6 w7"}, {"role": "w8", "content": "w9"}]] * 9
    path = tmp_path / "a.parquet"
    columns = {"messages": said, "input_ids": [[0, 5, 6]] * 9, "odd": [[1.5]] * 9, "far": [[99]] * 9}
    datasets.Dataset.from_dict(columns).to_parquet(path)
    for streaming in (False, True):
        options = TextOptions(source=(str(path),), holdout=0.0, context=7, bos="doc", streaming=streaming)
        rows = pack(replace(options, field="messages"), tokenizer, 2)
        assert rows.ravel().tolist() == [0, 5, 6, 7, 1, 8, 9] * 2, "of two parts of the text"
        assert pack(replace(options, field="input_ids")).ravel().tolist() == [0, 5, 6, 1, 0, 5, 6]
        with pytest.raises(TextError, match="holds list, not text, token ids or conversations"):
            pack(replace(options, field="odd"))
        with pytest.raises(TextError, match="token id 99: the tokenizer has ids 0 to 49"):
            pack(replace(options, field="far"))


def test_strings_that_spell_a_special_token_are_text_unless_asked_otherwise(tmp_path):
    save(byte_level(), tmp_path)
    tokenizer = from_pretrained(tmp_path)
    for special in (False, True):
        options = TextOptions(context=24, holdout=0.0, bos="none", separator="none", special=special)
        packed = in_memory(options, tokenizer, 1, seed=0, sources=loaded(options, ["a<|endoftext|>b" * 9]))
        tokens = packed.read(0, 1)
        assert (tokenizer.bos_id in tokens) == special == (not packed.keep(tokens, np.arange(len(tokens)))[0, 1:].all())


def test_context_ids_do_not_depend_on_the_batch_size():
    options = TextOptions(context=8, holdout=0.0)
    sources = loaded(options, sentences(60))

    def rows(batch):
        return {int(i): r.tolist() for b in token_batches(options, word_tokenizer(), batch, seed=0, sources=sources)
                for i, r in zip(b.context_ids_B, b.tokens_BT, strict=True)}

    assert rows(1) == rows(7) == rows(1000)
    assert list(rows(7)) == list(range(len(rows(7))))
    few = list(token_batches(options, word_tokenizer(), 4, seed=0, sources=sources, max_contexts=6))
    assert [len(b.tokens_BT) for b in few] == [4, 2]


@pytest.mark.parametrize("texts, changes, words", [
    ([], {}, "no documents"),
    (["", None], {}, "none of 2 documents has text in the 'train' split"),
    (["w3 w4"], {}, "has 4 tokens, one context needs 128"),
    (["w3 w4"], {"holdout": 0.999999}, "none of 1 documents has text in the 'train' split"),
])
def test_too_little_text_says_how_much_there_was(texts, changes, words):
    options = TextOptions(**changes)
    with pytest.raises(TextError, match=words):
        pack(options, sources=loaded(options, texts))


def test_missing_tokens_are_refused():
    options = TextOptions(context=4)
    sources = loaded(options, ["w3 w4 w40"] * 9)
    with pytest.raises(TextError, match="config.text.bos"):
        pack(options, word_tokenizer(bos=None), sources=sources)
    with pytest.raises(TextError, match="config.text.separator"):
        pack(options, word_tokenizer(eos=None), sources=sources)
    with pytest.raises(TextError, match="config.text.holdout"):
        pack(TextOptions(holdout=0.0), sources=sources, split="heldout")
