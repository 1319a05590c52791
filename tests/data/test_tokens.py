"""The token store: every token once, the same bytes whoever makes it, random access, nothing altered unseen."""

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saejax.base.errors import StoreCorruptError, StoreError, TextError
from saejax.base.verified import BLOCK, continued, digests
from saejax.config import TextOptions
from saejax.data import packing, parts, permutation
from saejax.data import sources as src
from saejax.data.packing import Packing, is_held_out
from saejax.data.parts import Part
from saejax.data.token_store import MANIFEST, SPEC
from saejax.data.tokens import TokenStore, TokenWriter, build, in_memory
from tests.data.making import directory, loaded, sentences, word_tokenizer, write_jsonl
from tests.data.test_numbering import naive
from tests.processes import environment, free_port

ROOT = Path(__file__).parents[2]
word = st.integers(2, 49)
document = st.one_of(st.none(), st.just(""), st.lists(word, min_size=1, max_size=30))
some = st.fixed_dictionaries({
    "docs": st.lists(document, min_size=1, max_size=60), "n_parts": st.integers(1, 9), "contexts": st.integers(1, 80),
    "options": st.builds(TextOptions, context=st.integers(2, 9), bos=st.sampled_from(["row", "doc", "none"]),
                         separator=st.sampled_from(["eos", "none"]), shuffle=st.booleans(), holdout=st.just(0.4),
                         packing=st.sampled_from(["packed", "packed", "document"])),
    "split": st.sampled_from(["train", "heldout"]), "seed": st.integers(0, 9)})


large = some.flatmap(lambda case: st.builds(
    lambda seed, n: case | {"docs": random_documents(seed, n)}, st.integers(0, 999), st.integers(5, 150)))


def random_documents(seed: int, n: int) -> list:
    """Short documents and empty ones, one among them that is long."""
    rng = np.random.default_rng(seed)
    docs = [rng.integers(2, 50, min(k, 30)).tolist() if k else [None, ""][i % 2]
            for i, k in enumerate(rng.geometric(0.15, n) - 1)]
    docs[rng.integers(n)] = rng.integers(2, 50, 99).tolist()
    return docs


def as_text(ids):
    return ids if ids is None or ids == "" else " ".join(f"w{i}" for i in ids)


class Case:
    """A text of hypothesis, and a token store of it in few parts."""

    def __init__(self, docs, n_parts, contexts, options, split, seed):
        self.options, self.n_parts, self.contexts, self.split, self.seed = options, n_parts, contexts, split, seed
        self.sources = loaded(options, [as_text(d) for d in docs])
        self.how = {"seed": seed, "split": split, "sources": self.sources}

    def sequences(self) -> list[list[int]]:
        """What each part must hold, one document behind the other."""
        order = [d for batch in src.read(self.sources, self.seed) for d in batch]
        o, out = self.options, []
        for p in range(self.n_parts):
            ids = [[int(w[1:]) for w in d.split()] for d in order[p::self.n_parts]
                   if d and is_held_out(d, o.holdout) == (self.split == "heldout")]
            if o.packing == "document":
                before = [0] * (o.bos != "none")
                rows = [([*before, *d] + [1] * (o.separator == "eos"))[:o.context] for d in ids]
                out.append([i for row in rows for i in row + [1] * (o.context - len(row))])
            else:
                out.append([i for d in ids for i in [0] * (o.bos == "doc") + d + [1] * (o.separator == "eos")])
        return out

    def writer(self, path) -> TokenWriter:
        writer = TokenWriter(path, self.options, word_tokenizer(), **self.how)
        writer.begin()
        return writer

    def make(self, path, n_processes=1, contexts=None) -> Path:
        """As `build` does it, the processes one after the other."""
        while rows := self.writer(path).rows_wanted(contexts or self.contexts):
            for process in range(n_processes):
                for _ in self.writer(path).extend(rows, process, n_processes):
                    pass
        if not (path / MANIFEST).is_file():
            self.writer(path).finish()
        return path


@settings(deadline=None, max_examples=60)
@given(some)
def test_every_token_of_every_document_in_order_exactly_once(case):
    case = Case(**case)
    with patch.object(parts, "PARTS", case.n_parts):
        payload = Packing(case.options, word_tokenizer(), case.split).payload
        whole = [len(s) // payload for s in case.sequences()]
        rests = [i for s, n in zip(case.sequences(), whole, strict=True) for i in s[n * payload:]]
        if not any(whole) and len(rests) < payload:
            with pytest.raises(TextError):
                in_memory(case.options, word_tokenizer(), 10**6, **case.how)
            return
        store = in_memory(case.options, word_tokenizer(), 10**6, **case.how)
        assert store.contexts == sum(whole) + len(rests) // payload and store.dropped == len(rests) % payload
        rows, found = store.read(0, store.contexts), [[] for _ in whole]
        for (part, _), row in zip(naive(whole, [True] * len(whole)), rows[:sum(whole)].tolist(), strict=True):
            assert payload == case.options.context or row[0] == 0
            found[part] += row[-payload:]
        assert found == [s[:n * payload] for s, n in zip(case.sequences(), whole, strict=True)]
        last = [i for row in rows[sum(whole):].tolist() for i in row[-payload:]]
        assert last == rests[:len(last)] and not (rows[sum(whole):, :case.options.context - payload]).any()


@settings(deadline=None, max_examples=40)
@given(large, st.integers(1, 80), st.integers(1, 64))
def test_the_same_bytes_whoever_makes_it_and_however_it_grew(tmp_path_factory, case, more, at_once):
    case = Case(**case)
    with patch.object(parts, "PARTS", case.n_parts), patch.object(parts, "_DOCUMENTS", at_once):
        folder = tmp_path_factory.mktemp("t")
        try:
            case.make(folder / "1")
        except TextError:
            return
        made = directory(folder / "1")
        for n in (2, 3, 4):
            assert directory(case.make(folder / str(n), n)) == made
        one, memory = TokenStore.open(folder / "1"), in_memory(case.options, word_tokenizer(), case.contexts, **case.how)
        rows = one.read(0, one.contexts)
        one.verify()
        assert one.contexts >= case.contexts or case.make(folder / "1", contexts=10**6) and directory(folder / "1") == made
        assert memory.contexts == one.contexts and np.array_equal(memory.read(0, one.contexts), rows)
        assert np.array_equal(one.read(np.arange(one.contexts)[::-2]), rows[::-2])
        case.make(folder / "1", 2, case.contexts + more)
        assert directory(folder / "1") == directory(case.make(folder / "straight", 1, case.contexts + more))
        grown = directory(folder / "1")
        assert all(grown[name].startswith(data) for name, data in made.items() if name.endswith(".i32"))
        assert np.array_equal(TokenStore.open(folder / "1").read(0, len(rows)), rows)
        assert np.array_equal(one.read(0, len(rows)), rows)  # one that was open meanwhile
        assert directory(case.make(folder / "1", 1, 1)) == grown  # fewer are there already


@settings(deadline=None, max_examples=40)
@given(large, st.lists(st.integers(0, 30), min_size=1, max_size=6),
       st.sampled_from([(parts, "write_json"), (parts, "continued"), (Part, "add"), (Packing, "pieces")]))
def test_whoever_is_killed_is_gone_on_with(tmp_path_factory, case, kills, place):
    """In the middle of a batch of documents, before it, between the rows and their record, or before both."""
    case = Case(**case)
    with patch.object(parts, "PARTS", case.n_parts), patch.object(parts, "_KEPT", 1), patch.object(parts, "_DOCUMENTS", 3):
        folder, known = tmp_path_factory.mktemp("t"), getattr(*place)
        try:
            case.make(folder / "straight")
        except TextError:
            return
        for kill in kills:
            left = iter(range(kill))

            def counted(*args, left=left):
                if next(left, None) is None:
                    raise KeyboardInterrupt
                return known(*args)

            try:
                with patch.object(*place, counted):
                    case.make(folder / "killed", 1 + kill % 3)
            except KeyboardInterrupt:
                pass
        assert directory(case.make(folder / "killed")) == directory(folder / "straight")


def jsonl(folder, texts=None, **changes):
    path = write_jsonl(folder / "a.jsonl", texts or sentences(900))
    return TextOptions(**{"source": (str(path),), "holdout": 0.2, "context": 16, **changes})


@pytest.mark.parametrize("streaming", [False, True])
def test_a_process_tokenises_only_its_own_documents(tmp_path, monkeypatch, streaming):
    texts = [f"{s} w{i}" for i, s in enumerate(sentences(900))]
    options = jsonl(tmp_path, texts, streaming=streaming)
    sources, encode, read = src.resolve(options), Packing._encode, src._at
    order = [d for batch in src.read(sources, 3) for d in batch]
    made, seen, looked = [], [], []
    monkeypatch.setattr(Packing, "_encode", lambda self, documents: seen.extend(documents) or encode(self, documents))
    monkeypatch.setattr(src, "_at", lambda *args: looked.extend(args[-1].tolist()) or read(*args))
    for process in range(3):
        seen.clear(), looked.clear()
        writer = TokenWriter(tmp_path / "t", options, word_tokenizer(), seed=3)
        writer.begin()
        made.append(sum(writer.extend(10**6, process, 3)))
        own = {i for i in range(900) if i % parts.PARTS % 3 == process}
        assert set(looked) == (set() if streaming else own)
        assert Counter(seen) == Counter(order[i] for i in own if not is_held_out(order[i], 0.2))
    writer.finish()
    store = TokenStore.open(tmp_path / "t")
    assert sum(made) == store.contexts * 15 + store.dropped and min(made) > 0


@pytest.mark.parametrize("streaming", [False, True])
def test_few_contexts_cost_few_documents(tmp_path, monkeypatch, streaming):
    options, encode, seen = jsonl(tmp_path, sentences(5000), streaming=streaming), Packing._encode, []
    monkeypatch.setattr(Packing, "_encode", lambda self, documents: seen.extend(documents) or encode(self, documents))
    store = in_memory(options, word_tokenizer(), 256, seed=0)  # 4 rows of 15 tokens of each part, about 2 documents
    assert 256 <= store.contexts and len(seen) <= (512 if streaming else 300)


@pytest.mark.parametrize("streaming", [False, True])
def test_files_and_memory_are_the_same(tmp_path, capsys, streaming):
    options = jsonl(tmp_path, streaming=streaming)
    store, told = build(tmp_path / "t", options, word_tokenizer(), 700, seed=1), []
    assert len(directory(tmp_path / "t")) == 2 + 2 * parts.PARTS + 2 and capsys.readouterr().err == ""
    again = build(tmp_path / "t", options, word_tokenizer(), 700, seed=1, advance=told.append)
    memory = in_memory(options, word_tokenizer(), 700, seed=1)
    assert 700 <= store.contexts == again.contexts == memory.contexts and not told and store.digest == again.digest
    numbers = np.random.default_rng(0).integers(0, 700, 300)
    assert np.array_equal(store.read(numbers), memory.read(numbers))
    assert np.array_equal(store.read(numbers), store.read(0, 700)[numbers])
    with pytest.raises(IndexError):
        store.read(0, store.contexts + 1)
    whole = build(tmp_path / "t", options, word_tokenizer(), 10**6, seed=1, advance=told.append)
    assert np.array_equal(whole.read(numbers), memory.read(numbers)) and sum(told) > 0
    build(tmp_path / "straight", options, word_tokenizer(), 10**6, seed=1)
    assert directory(tmp_path / "t") == directory(tmp_path / "straight")
    said = f"tokens: the text ended after {whole.contexts} contexts of 16 tokens; {whole.dropped} tokens that fill no context"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("texts, changes, words", [
    ([], {}, "no documents"),
    (["", None], {}, "none of 2 documents has text in the 'train' split"),
    (["w3 w4"], {}, "has 4 tokens, one context needs 128"),
    (["w3 w4"], {"holdout": 0.999999}, "none of 1 documents has text in the 'train' split")])
def test_too_little_text_says_how_much_there_was(tmp_path, texts, changes, words):
    options = TextOptions(**changes)
    how = {"seed": 0, "sources": loaded(options, texts)}
    for make in (build, in_memory):
        with pytest.raises(TextError, match=words) as error:
            make(*[tmp_path / "t"][:make is build], options, word_tokenizer(), 9, **how)
        assert "\n" not in str(error.value)
    with pytest.raises(StoreError, match="tokens.json: missing, so the token store is not finished"):
        TokenStore.open(tmp_path / "t")
    more = replace(options, context=3, holdout=0.0)
    assert build(tmp_path / "t", more, word_tokenizer(), 2, seed=0, sources=loaded(more, ["w3 w4"] * 9)).contexts == 9


@pytest.mark.parametrize("long", [0, 3, 8])
def test_one_document_much_longer_than_the_others(tmp_path, long):
    """Fewer documents than parts; its part alone has the later rounds."""
    options = TextOptions(context=4, bos="none", holdout=0.0, shuffle=False)
    texts = ["w3 w4 w5"] * 9
    texts[long] = " ".join(f"w{5 + i % 40}" for i in range(4003))
    how = {"seed": 0, "sources": loaded(options, texts)}
    store = build(tmp_path / "t", options, word_tokenizer(), 500, **how)
    assert store.contexts == 8 + 1001 and store.dropped == 0
    rows = store.read(0, store.contexts)
    assert rows[:long].tolist() == [[3, 4, 5, 1]] * long and rows[long].tolist() == [5, 6, 7, 8]
    assert rows[9:].ravel().tolist() == [5 + i % 40 for i in range(4, 4003)] + [1]
    assert np.array_equal(rows, in_memory(options, word_tokenizer(), 500, **how).read(0, store.contexts))


def finished(tmp_path):
    options = jsonl(tmp_path, ["w3 w4 w5 w6"] * 65_000, context=1024, bos="none", holdout=0.0)
    with patch.object(parts, "PARTS", 1):
        return options, build(tmp_path / "t", options, word_tokenizer(), 300, seed=0)


def test_blocks_go_on_where_they_were(tmp_path):
    data, size, blocks = np.random.default_rng(0).bytes(3 * BLOCK + 17), 0, []
    for step in (0, 5, BLOCK - 5, BLOCK + 9, 1, BLOCK + 7, 0):
        blocks, size = continued(blocks, size, data[size:size + step]), size + step
    (tmp_path / "a").write_bytes(data)
    assert size == len(data) and blocks == digests(tmp_path / "a")["blocks"]


def test_altered_bytes_are_never_returned(tmp_path):
    _, store = finished(tmp_path)
    rows, file = store.read(0, 300), tmp_path / "t" / "part-00000.i32"
    data = file.read_bytes()
    assert len(data) > BLOCK
    for place in (0, BLOCK - 1, BLOCK, len(data) - 1):
        file.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1:])
        store = TokenStore.open(tmp_path / "t")
        with pytest.raises(StoreCorruptError, match=re.escape(f"{file}: altered since it was written, at bytes")):
            store.read([place // 4096])
        with pytest.raises(StoreCorruptError):
            store.verify()
    assert np.array_equal(store.read(0, 256), rows[:256])  # of the other block
    file.write_bytes(data[:-4])
    with pytest.raises(StoreCorruptError, match=r"part-00000.i32: \d+ bytes, its record says"):
        TokenStore.open(tmp_path / "t")
    file.unlink()
    with pytest.raises(StoreCorruptError, match="part-00000.i32: missing"):
        TokenStore.open(tmp_path / "t")


@pytest.mark.parametrize("name", [MANIFEST, "part-00000.json"])
def test_altered_records_are_refused(tmp_path, name):
    options, _ = finished(tmp_path)
    file = tmp_path / "t" / name
    values = json.loads(file.read_text())
    for key, value in values.items():
        for other in (None, -1, "x", [], value + 1 if isinstance(value, int) else [value]):
            file.write_text(json.dumps({**values, key: other}))
            with pytest.raises(StoreError, match=re.escape(str(file))) as error:
                TokenStore.open(tmp_path / "t")
            assert "\n" not in str(error.value)
    file.unlink()
    with pytest.raises(StoreError, match=re.escape(str(file))):
        TokenStore.open(tmp_path / "t")


def test_another_config_is_refused_with_all_differences(tmp_path):
    options = jsonl(tmp_path)
    build(tmp_path / "t", options, word_tokenizer(), 100, seed=0)
    made = directory(tmp_path / "t")

    def refused(*words, options=options, tokenizer=None, **how):
        with pytest.raises(StoreError) as error:
            build(tmp_path / "t", options, tokenizer or word_tokenizer(), 200, **{"seed": 0, **how})
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
        assert directory(tmp_path / "t") == made

    refused("context: 16 -> 8", "text.holdout: 0.2 -> 0.5", options=replace(options, context=8, holdout=0.5))
    refused("text.seed: 0 -> 1", "split: 'train' -> 'heldout'", seed=1, split="heldout")
    refused("tokenizer: ", tokenizer=word_tokenizer(vocab=60))
    for module, key in ((packing, "packing_version"), (permutation, "order_version")):
        with patch.object(module, "VERSION", 7):
            refused(f"{key}: 1 -> 7")
    with patch.object(parts, "PARTS", 7):
        refused("parts: 64 -> 7")
    write_jsonl(tmp_path / "a.jsonl", sentences(901))
    refused("text.digest: ")
    TokenStore.open(tmp_path / "t").verify()  # which needs no text


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "mine.txt").write_text("x")
    with pytest.raises(StoreError, match="is not empty and not a token store"):
        build(tmp_path / "t", jsonl(tmp_path), word_tokenizer(), 9, seed=0)
    with pytest.raises(StoreError, match="no token store here"):
        TokenStore.open(tmp_path / "t")
    assert not (tmp_path / "t" / SPEC).exists()


WORKER = """
import json, sys
import jax
o = json.loads(sys.argv[1])
jax.distributed.initialize(f"127.0.0.1:{o['port']}", num_processes=o["processes"], process_id=o["process"],
                           initialization_timeout=60)
from saejax.config import TextOptions
from saejax.data.tokens import build
from tests.data.making import word_tokenizer
options = TextOptions(**o["options"])
build(o["path"], options, word_tokenizer(), 50, seed=0)
build(o["path"], options, word_tokenizer(), 10**6, seed=0)
"""


def test_contexts_that_repeat_an_earlier_one_are_masked_and_counted(tmp_path, capsys):
    texts = sentences(400)
    options = jsonl(tmp_path, texts + texts[:60] + texts[20:50], packing="document", mask=("first", "special", "repeated"))
    made = build(tmp_path / "t", options, word_tokenizer(), 10**6, seed=0)
    rows = made.read(0, made.contexts)
    seen, expected = set(), []
    for number, row in enumerate(rows):
        if row.tobytes() in seen:
            expected.append(number)
        seen.add(row.tobytes())
    assert made.repeated.tolist() == expected and len(expected) > 50
    assert f"{len(expected)} of {made.contexts} contexts are exactly like an earlier one and masked" in capsys.readouterr().err
    keep = made.keep(rows, np.arange(made.contexts))
    plain = replace(options, mask=("first", "special"))
    assert not keep[expected].any()
    of_all = in_memory(plain, word_tokenizer(), 10**6, seed=0)
    others = np.setdiff1d(np.arange(made.contexts), expected)
    assert np.array_equal(keep[others], of_all.keep(rows, np.arange(made.contexts))[others]) and not len(of_all.repeated)
    assert in_memory(options, word_tokenizer(), 10**6, seed=0).repeated.tolist() == expected
    for contexts in (64, 200, 10**6):  # growing changes nothing for what was there
        grown = build(tmp_path / "grown", options, word_tokenizer(), contexts, seed=0)
        assert grown.repeated.tolist() == [n for n in expected if n < grown.contexts]
    assert directory(tmp_path / "grown") == directory(tmp_path / "t")
    data = (tmp_path / "t" / "repeated.i64").read_bytes()
    for wrong in (data[:-8], data[8:] + data[:8], None):
        (tmp_path / "t" / "repeated.i64").write_bytes(wrong) if wrong else (tmp_path / "t" / "repeated.i64").unlink()
        with pytest.raises(StoreCorruptError, match=r"repeated.i64: (altered|missing)"):
            TokenStore.open(tmp_path / "t").keep(rows[:1], np.arange(1))


def test_real_processes_make_the_same_store(tmp_path):
    options = jsonl(tmp_path)
    plain = {"source": options.source, "holdout": options.holdout, "context": options.context}
    shared, jobs = {"port": free_port(), "processes": 3, "options": plain, "path": str(tmp_path / "t")}, []
    for process in range(3):
        jobs.append(subprocess.Popen([sys.executable, "-c", WORKER, json.dumps(shared | {"process": process})], cwd=ROOT,
                                     env=environment(1), stderr=subprocess.PIPE, text=True))
    try:
        for job in jobs:
            _, err = job.communicate(timeout=120)
            assert job.returncode == 0, err[-2000:]
    finally:
        for job in jobs:
            job.kill()
    build(tmp_path / "alone", options, word_tokenizer(), 10**6, seed=0)
    assert directory(tmp_path / "t") == directory(tmp_path / "alone")
