"""Files, folders and data sets as documents."""

import json
import logging
from dataclasses import replace

import datasets
import pytest

from saejax.base.errors import TextError
from saejax.config import TextOptions
from saejax.data import finding
from saejax.data import sources as src
from saejax.data.packing import is_held_out
from saejax.data.text import describe
from tests.data.making import documents, sentences, write_jsonl


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


def test_streaming_gives_the_same_documents(tmp_path):
    texts = sentences(700)
    source = (str(write_jsonl(tmp_path / "a.jsonl", texts)),)
    options = TextOptions(source=source, holdout=0.1, streaming=True, context=16)
    kept = [t for t in texts if not is_held_out(t, 0.1)]
    assert sorted(documents(options, 0)) == sorted(kept) != list(documents(options, 0))


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


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_are_read_at_the_commit_that_was_digested(monkeypatch, streaming):
    """Also when the hub moves on between the two."""
    commit, asked = "ab" * 20, []

    class Builder:
        hash = commit

    def load(path, split, **options):
        asked.append((path, options["name"], options["revision"]))
        return datasets.Dataset.from_dict({"text": ["x"]})

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, config, revision: Builder)
    monkeypatch.setattr(datasets, "load_dataset", load)
    options = TextOptions(source=("some/texts@main", "some/more:small"), streaming=streaming)
    sources = src.resolve(options)
    sources.datasets()
    assert asked == [("some/texts", None, commit), ("some/more", "small", commit)]
    assert describe(options, sources, 0)["revisions"] == {"some/texts": commit, "some/more:small": commit}
    monkeypatch.setattr(Builder, "hash", "ba" * 20)
    assert src.resolve(options).digest != sources.digest
