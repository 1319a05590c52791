from dataclasses import replace

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saejax.base.errors import TextError
from saejax.config import TextOptions
from saejax.data import sources as src
from saejax.data.packing import is_held_out
from saejax.data.text import PackedText, TextState, describe, token_batches
from saejax.lm.tokenizer import from_pretrained
from tests.data.making import documents, loaded, sentences, word_tokenizer, write_jsonl
from tests.lm.token_forms import byte_level, save

word = st.integers(2, 49)
document = st.one_of(st.none(), st.just(""), st.lists(word, min_size=1, max_size=30))


def as_text(ids):
    return ids if ids is None or ids == "" else " ".join(f"w{i}" for i in ids)


def taken(packed, take):
    """(rows of every call until the end, the states before each of them and at the end)"""
    rows, states = [], [packed.state]
    while len(part := packed.take(take)):
        rows.append(part)
        states.append(packed.state)
    return rows, states


@settings(deadline=None, max_examples=60)
@given(docs=st.lists(document, min_size=1, max_size=40), context=st.integers(2, 9),
       bos=st.sampled_from(["row", "doc", "none"]), separator=st.sampled_from(["eos", "none"]),
       split=st.sampled_from(["train", "heldout"]), shuffle=st.booleans(),
       take=st.integers(1, 7), seed=st.integers(0, 99))
def test_every_token_of_every_document_in_order_exactly_once(docs, context, bos, separator, split, shuffle, take, seed):
    options = TextOptions(context=context, bos=bos, separator=separator, holdout=0.4, shuffle=shuffle)
    sources = loaded(options, [as_text(d) for d in docs])
    order = list(documents(options, seed, split, sources=sources))
    mine = [t for t in map(as_text, docs) if t and is_held_out(t, 0.4) == (split == "heldout")]
    assert sorted(order) == sorted(mine)
    sequence = [i for text in order
                for i in [0] * (bos == "doc") + [int(w[1:]) for w in text.split()] + [1] * (separator == "eos")]
    payload = context - (bos == "row")
    packed = PackedText(options, word_tokenizer(), seed=seed, split=split, sources=sources)
    if len(sequence) < payload:
        with pytest.raises(TextError):
            packed.take(take)
        return
    rows, states = taken(packed, take)
    flat = np.concatenate(rows)
    if bos == "row":
        assert (flat[:, 0] == 0).all()
        flat = flat[:, 1:]
    whole = len(sequence) // payload * payload
    assert flat.ravel().tolist() == sequence[:whole]
    assert packed.dropped_tokens == len(sequence) - whole
    for i, state in enumerate(states[:-1]):
        again = PackedText(options, word_tokenizer(), seed=seed, split=split, sources=sources, start=state)
        assert np.array_equal(again.take(take), rows[i])


@settings(deadline=None, max_examples=40)
@given(docs=st.lists(document, min_size=1, max_size=30), context=st.integers(2, 9), bos=st.sampled_from(["row", "doc", "none"]),
       separator=st.sampled_from(["eos", "none"]), pad=st.sampled_from([None, 1, 9]), take=st.integers(1, 7),
       special=st.booleans())
def test_one_document_a_row(docs, context, bos, separator, pad, take, special):
    """Each document once, in order, cut at the context; what fills a row up is masked, also where that is the separator."""
    docs = [[i for i in d if i != 9] or [2] if isinstance(d, list) else d for d in docs]  # no document says the pad token
    options = TextOptions(context=context, bos=bos, separator=separator, holdout=0.0, packing="document",
                          mask=("first", "special") if special else ("first",))
    sources, tokenizer = loaded(options, [as_text(d) for d in docs]), replace(word_tokenizer(), pad_id=pad)
    packed = PackedText(options, tokenizer, seed=3, sources=sources)
    wanted = [([0] * (bos != "none") + [int(w[1:]) for w in text.split()] + [1] * (separator == "eos"))[:context]
              for text in documents(options, 3, sources=sources)]
    if not wanted:
        with pytest.raises(TextError):
            packed.take(take)
        return
    rows, states = taken(packed, take)
    for i, state in enumerate(states[:-1]):
        again = PackedText(options, tokenizer, seed=3, sources=sources, start=state)
        assert np.array_equal(again.take(take), rows[i])
    rows = np.concatenate(rows)
    lengths, keep = packed.lengths(rows), packed.keep(rows)
    assert lengths.tolist() == list(map(len, wanted)) and packed.dropped_tokens == 0
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
        PackedText(options, tokenizer, seed=0, sources=loaded(options, ["w3"]))


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
    packed = PackedText(options, word_tokenizer(special=()), seed=0, sources=sources)
    assert np.array_equal(packed.keep(packed.take(4)), np.tile(np.arange(8) >= first, (4, 1)))


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
        rows = PackedText(replace(options, field="messages"), tokenizer, seed=0).take(2)
        assert rows.ravel().tolist() == [0, 5, 6, 7, 1, 8, 9, 1, 0, 5, 6, 7, 1, 8]
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
        packed = PackedText(options, tokenizer, seed=0, sources=loaded(options, ["a<|endoftext|>b" * 9]))
        tokens = packed.take(1)
        assert (tokenizer.bos_id in tokens) == special == (not packed.keep(tokens)[0, 1:].all())


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


def pack(options, tokenizer=None, **kwargs):
    return PackedText(options, tokenizer or word_tokenizer(), seed=0, **kwargs).take(1)


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


@pytest.mark.parametrize("streaming", [False, True])
def test_going_forward_reads_nothing_twice(tmp_path, monkeypatch, streaming):
    """As a process does whose neighbours have written their shards: every second part is jumped over."""
    texts = sentences(900)
    options = TextOptions(source=(str(write_jsonl(tmp_path / "a.jsonl", texts)),), holdout=0.3, streaming=streaming, context=16)
    straight = PackedText(options, word_tokenizer(), seed=0)
    parts = [(straight.state, straight.take(n)) for n in (3, 1, 40, 200, 2, 9, 1, 120, 7)]
    reads, read = [], src.read
    monkeypatch.setattr(src, "read", lambda sources, seed, start=0: reads.append(start) or read(sources, seed, start))
    jumping = PackedText(options, word_tokenizer(), seed=0)
    for first in (0, 1):
        for state, rows in parts[first::2]:
            jumping.seek(state)
            assert jumping.state == state
            assert np.array_equal(jumping.take(len(rows)), rows)
        if streaming:
            assert len(reads) == first + 1  # the second round begins with a step back


@settings(deadline=None, max_examples=60)
@given(docs=st.lists(document, min_size=20, max_size=60), takes=st.lists(st.integers(1, 9), min_size=2, max_size=12),
       jumps=st.lists(st.integers(0, 11), min_size=1, max_size=20))
def test_any_jump_gives_the_rows_of_a_fresh_start(docs, takes, jumps):
    options = TextOptions(context=5, holdout=0.4, shuffle=False)
    sources = loaded(options, [as_text(d) for d in docs] + [f"w3 w4 w5 w{i}" for i in range(2, 22)])
    straight = PackedText(options, word_tokenizer(), seed=0, sources=sources)
    parts = [(straight.state, straight.take(n)) for n in takes]
    packed = PackedText(options, word_tokenizer(), seed=0, sources=sources)
    for jump in jumps:
        state, rows = parts[jump % len(parts)]
        if len(rows):
            packed.seek(state)
            assert np.array_equal(packed.take(len(rows)), rows)


def test_a_text_that_changed_under_a_resume_is_refused():
    options = TextOptions(context=8, holdout=0.0, shuffle=False)
    with pytest.raises(TextError, match="not the one that this harvest began with"):
        PackedText(options, word_tokenizer(), seed=0, sources=loaded(options, ["w3 w4"] * 50),
                   start=TextState(3, 40, 5)).take(2)
