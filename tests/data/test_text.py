from dataclasses import replace

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saejax.base.errors import TextError
from saejax.config import TextOptions
from saejax.data import sources as src
from saejax.data.text import PackedText, TextState, is_held_out, token_batches
from tests.data.making import documents, loaded, sentences, word_tokenizer, write_jsonl

word = st.integers(2, 49)
document = st.one_of(st.none(), st.just(""), st.lists(word, min_size=1, max_size=30))


def as_text(ids):
    return ids if ids is None or ids == "" else " ".join(f"w{i}" for i in ids)


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
    rows, states = [], [packed.state]
    while len(part := packed.take(take)):
        rows.append(part)
        states.append(packed.state)
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
    assert np.array_equal(keep, ~np.isin(tokens, masked))
    unmasked = next(token_batches(options, word_tokenizer(special=special), 3, seed=0, sources=sources,
                                  mask_special=False))
    assert unmasked.keep_BT.all()


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


def test_every_kind_of_file_gives_its_documents(tmp_path):
    a, b, c, d = (sentences(3, seed) for seed in range(4))
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", a)
    datasets.Dataset.from_dict({"text": b, "n": [1, 2, 3]}).to_parquet(folder / "deep" / "b.parquet")
    for i, text in enumerate(c):
        (folder / f"{i}.md").write_text(text + "\n\nsecond paragraph\n")
    datasets.Dataset.from_dict({"text": d}).save_to_disk(tmp_path / "saved")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    (folder / "ignored.bin").write_bytes(b"\0")
    options = TextOptions(source=(str(folder), str(arrow)), holdout=0.0)
    found = sorted(t.split("\n")[0] for t in documents(options, 0))
    assert found == sorted(a + b + c + d)
    globbed = TextOptions(source=(str(folder / "*.md"),), holdout=0.0)
    assert len(list(documents(globbed, 0))) == 3


def test_streaming_gives_the_same_documents_and_resumes(tmp_path):
    texts = sentences(700)
    source = (str(write_jsonl(tmp_path / "a.jsonl", texts)),)
    options = TextOptions(source=source, holdout=0.1, streaming=True, context=16)
    kept = [t for t in texts if not is_held_out(t, 0.1)]
    assert sorted(documents(options, 0)) == sorted(kept) != list(documents(options, 0))
    packed = PackedText(options, word_tokenizer(), seed=0)
    packed.take(300)
    state, rest = packed.state, packed.take(400)
    assert state.documents > 100 and len(rest) == 400
    assert np.array_equal(PackedText(options, word_tokenizer(), seed=0, start=state).take(400), rest)


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


def test_digest_follows_content_not_place(tmp_path):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        write_jsonl(tmp_path / place / "x.jsonl", sentences(5))
    digests = [src.resolve(TextOptions(source=(str(tmp_path / p),))).digest for p in ("a", "b")]
    assert digests[0] == digests[1]
    write_jsonl(tmp_path / "b" / "x.jsonl", sentences(6))
    assert src.resolve(TextOptions(source=(str(tmp_path / "b"),))).digest != digests[0]


def test_bad_sources_are_all_named_at_once(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.exe").write_bytes(b"")
    options = TextOptions(source=(str(tmp_path / "no.jsonl"), str(tmp_path / "empty"), str(tmp_path / "x.exe")))
    with pytest.raises(TextError) as error:
        src.resolve(options)
    assert "no.jsonl' is missing" in str(error.value) and "empty' holds no file" in str(error.value)
    assert "x.exe' ends in none of" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_column_names_those_there(tmp_path, streaming):
    path = write_jsonl(tmp_path / "a.jsonl", sentences(3), field="body")
    options = TextOptions(source=(str(path),), streaming=streaming, holdout=0.0)
    with pytest.raises(TextError, match="no column 'text'; it has body, id"):
        list(documents(options, 0))
    assert len(list(documents(replace(options, field="body"), 0))) == 3
    with pytest.raises(TextError, match="holds int, not text"):
        list(documents(replace(options, field="id"), 0))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("good", [False, True])
def test_broken_file_is_one_line(tmp_path, streaming, good):
    """Alone, or behind a good file: then a stream gets to it in the middle of reading."""
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + ('{"text": "y"}\n' if good else '{"text": \n'))
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"text": \n')
    sources = src.resolve(TextOptions(source=(str(tmp_path / "*.jsonl"),), streaming=streaming, shuffle=False))
    for _ in range(2):
        with pytest.raises(TextError, match="jsonl.*cannot be read") as error:
            list(documents(sources._options, 0, sources=sources))
        assert "\n" not in str(error.value)


def test_a_failed_source_stays_failed(tmp_path):
    """What was loaded before the failure is not mistaken for everything."""
    write_jsonl(tmp_path / "a.jsonl", sentences(3))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no more")
    sources = src.resolve(TextOptions(source=(str(tmp_path),)))
    for _ in range(2):
        with pytest.raises(TextError, match="b.parquet.*cannot be read"):
            sources.datasets()


def test_a_text_that_changed_under_a_resume_is_refused():
    options = TextOptions(context=8, holdout=0.0, shuffle=False)
    with pytest.raises(TextError, match="not the one that this harvest began with"):
        PackedText(options, word_tokenizer(), seed=0, sources=loaded(options, ["w3 w4"] * 50),
                   start=TextState(3, 40, 5)).take(2)


def test_a_hub_name_that_cannot_be_read_is_one_line():
    """The tests run offline, so every hub name is such a one."""
    with pytest.raises(TextError, match="'nobody/nothing' is no preset .*, no local file and not readable from the hub") as e:
        src.resolve(TextOptions(source=("nobody/nothing:config@main",)))
    assert "\n" not in str(e.value)
