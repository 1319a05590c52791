import json
import logging
from dataclasses import replace

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saejax.base.errors import TextError
from saejax.config import TextOptions
from saejax.data import finding
from saejax.data import sources as src
from saejax.data.text import PackedText, TextState, describe, is_held_out, token_batches
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
    options = TextOptions(context=context, bos=bos, separator=separator, holdout=0.0, packing="document", mask_first=1)
    sources, tokenizer = loaded(options, [as_text(d) for d in docs]), replace(word_tokenizer(), pad_id=pad)
    packed = PackedText(options, tokenizer, seed=3, sources=sources, mask_special=special)
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
    unmasked = next(token_batches(options, word_tokenizer(special=special), 3, seed=0, sources=sources,
                                  mask_special=False))
    assert unmasked.keep_BT[:, 1:].all()


@pytest.mark.parametrize("bos", ["row", "doc", "none"])
@pytest.mark.parametrize("first", [0, 1, 3])
def test_the_first_tokens_of_a_row_are_masked_whatever_they_are(bos, first):
    options = TextOptions(context=8, holdout=0.0, bos=bos, mask_first=first)
    sources = loaded(options, ["w5 w3 w4 w6 w7"] * 20)
    packed = PackedText(options, word_tokenizer(special=()), seed=0, sources=sources, mask_special=False)
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


def test_a_folder_as_cloned_from_the_hub(tmp_path, capsys):
    """Data files of the wanted split only: not the card, not the other splits, nothing hidden."""
    folder = tmp_path / "clone"
    (folder / "data").mkdir(parents=True)
    (folder / ".cache").mkdir()
    for place in (folder / "README.md", folder / ".cache" / "x.txt", folder / "notes.txt", folder / "dataset_infos.json"):
        place.write_text("---\n# no document\n" * 9)
    texts = {split: sentences(3, seed) for seed, split in enumerate(("train", "test", "validation"))}
    for split, some in texts.items():
        datasets.Dataset.from_dict({"text": some}).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    for split in texts:
        assert sorted(documents(TextOptions(source=(str(folder),), holdout=0.0, split=split), 0)) == sorted(texts[split])
        said = capsys.readouterr().err
        assert f"1 of 5 files are read: data/{split}-00000-of-00001.parquet" in said.replace("\\", "/")
    with pytest.raises(TextError, match="has files of test and of train and of validation, none of 'all'"):
        src.resolve(TextOptions(source=(str(folder),), split="all"))
    for file in (folder / "data").iterdir():
        file.unlink()
    assert [p.name for p in finding.find(str(folder), "train")] == ["notes.txt"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["in[1]/a.jsonl", "in[ab]/*.jsonl", "a?b/a.jsonl", "a*b/a.jsonl", "[x]", "a b/#1.jsonl"])
def test_any_path(tmp_path, name, streaming):
    texts = sentences(5)
    folder = tmp_path / name.partition("/")[0]
    folder.mkdir()
    write_jsonl(folder / (name.partition("/")[2] or "a.jsonl").replace("*", "x"), texts)
    source = str(tmp_path / name.replace("in[ab]/*", "in[[]ab]/*"))
    assert sorted(documents(TextOptions(source=(source,), holdout=0.0, streaming=streaming), 0)) == sorted(texts)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zst", "csv", "csv.gz", "json"])
def test_packed_files_and_csv(tmp_path, ending, streaming):
    import gzip

    import zstandard
    texts = sentences(5)
    plain = 'text,n\n' + "".join(f'"{t}",1\n' for t in texts) if "csv" in ending else "".join(
        json.dumps({"text": t}) + "\n" for t in texts)
    pack_ = {"gz": gzip.compress, "zst": zstandard.compress}.get(ending.rpartition(".")[2], bytes)
    (tmp_path / f"a.{ending}").write_bytes(pack_(plain.encode()))
    options = TextOptions(source=(str(tmp_path),), holdout=0.0, streaming=streaming)
    assert sorted(documents(options, 0)) == sorted(texts)


def test_a_misspelt_folder_is_no_hub_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpora" / "english").mkdir(parents=True)
    for source, near in (("corpora/englsh", "did you mean corpora/english"), ("corpra", "did you mean corpora"),
                         ("corpra/english", "did you mean corpora/english"), ("corpora/other", "is missing: no such file"),
                         ("./nowhere", "is missing"), ("nowhere/", "is missing")):
        with pytest.raises(TextError, match=near):
            src.resolve(TextOptions(source=(source,)))


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
    options = TextOptions(source=(str(folder), str(arrow), str(folder / "*.md")), holdout=0.0)
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


def test_retries_for_a_misspelt_hub_name_are_one_line(monkeypatch, capsys, caplog):
    def unreachable(name, *_, **__):
        logger = logging.getLogger("huggingface_hub.utils._http")
        for number in (1, 2):
            logger.warning(f"'no name' thrown while requesting HEAD https://hub/{name}")
            logger.warning(f"Retrying in 1s [Retry {number}/5].")
        raise ConnectionError(f"Couldn't reach {name}")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(TextError, match="'nobody/texts' is no preset .*Couldn't reach nobody/texts"):
        src.resolve(TextOptions(source=("nobody/texts",)))
    assert caplog.messages == [] and capsys.readouterr().err == "nobody/texts: the hub does not answer; trying again\n"


def test_a_hub_name_that_cannot_be_read_is_one_line():
    """The tests run offline, so every hub name is such a one."""
    with pytest.raises(TextError, match="'nobody/nothing' is no preset .*, no local file and not readable from the hub") as e:
        src.resolve(TextOptions(source=("nobody/nothing:config@main",)))
    assert "\n" not in str(e.value)
