"""Repositories of the Hugging Face hub: what is asked for, the offline cache, and one line where there is no network."""

import shutil
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest

import saejax
from saejax.base.errors import FormatError
from saejax.formats import hub
from tests.formats.building import f32, weights

ROOT = Path(__file__).parent / "fixtures"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache with one repository, laid out as the library lays it out; the network is off."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "models--some--gemma-scope-2b-pt-res"
    snapshot = repo / "snapshots" / COMMIT
    place = snapshot / "layer_3" / "width_16k" / "average_l0_5"
    place.mkdir(parents=True)
    np.savez(place / "params.npz", **f32(weights()))
    shutil.copytree(ROOT / "saelens" / "topk", snapshot / "lens")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return tmp_path


def test_from_the_cache_with_its_commit(cache):
    sae = saejax.load("some/gemma-scope-2b-pt-res:layer_3/width_16k/average_l0_5")
    assert (sae.cfg.model, sae.cfg.hookpoint) == ("google/gemma-2-2b", "blocks.3.hook_resid_post")
    assert sae.cfg.metadata["hub"] == {
        "repo": "some/gemma-scope-2b-pt-res",
        "path": "layer_3/width_16k/average_l0_5",
        "revision": COMMIT,
    }
    for source in (f"some/gemma-scope-2b-pt-res@{COMMIT}:lens", "some/gemma-scope-2b-pt-res@main:lens"):
        assert saejax.load(source).cfg.metadata["hub"]["revision"] == COMMIT


def test_no_network_is_one_line(cache):
    with pytest.raises(
        FormatError, match="nobody/nothing:here: could not be fetched from the Hugging Face hub and is not in its cache"
    ) as e:
        saejax.load("nobody/nothing:here")
    assert "\n" not in str(e.value)


def test_a_path_that_is_not_there(cache):
    with pytest.raises(FormatError, match="has none of the files that are read there"):
        saejax.load("some/gemma-scope-2b-pt-res:layer_4")


def test_a_place_that_holds_many(cache, monkeypatch):
    """Those below it are named, as the repository lists them, else as far as they are in the cache."""
    repo = "some/gemma-scope-2b-pt-res:"
    for path, line in (("", f"holds 2 below it; give {repo} and one of layer_3/width_16k/average_l0_5, lens$"),
                       ("layer_3", f"holds 1 below it; give {repo}layer_3/ and one of width_16k/average_l0_5$")):
        with pytest.raises(FormatError, match=line):
            saejax.load(f"{repo}{path}")
    there = [f"layer_{n}/width_16k/params.npz" for n in range(26)] + ["README.md", "layer_1/config.json", "trainer/ae_1.pt"]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo, revision: there)
    with pytest.raises(FormatError, match=r"holds 27 below it.* one of (layer_\d/width_16k, ){9}layer_9/width_16k and 17 more$"):
        saejax.load(repo)


@pytest.mark.parametrize("path", ["a/b:../../etc", "a/b:x/../../y", "a/b:.git/config", "a/b:x/*"])
def test_paths_stay_in_the_repository(path):
    with pytest.raises(FormatError, match="is not a safe file name"):
        hub.parse(path)


def test_what_is_a_path_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b:c").mkdir()
    assert hub.parse("a/b:c") is None and hub.parse("runs/demo") is None and hub.parse(Path("x/y:z")) is None
    assert hub.parse("x/y@v1:p/q/") == hub.Source("x/y", "v1", "p/q")


def test_only_files_of_a_format_are_asked_for(monkeypatch):
    asked = {}

    def download(repo, revision=None, allow_patterns=None):
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(ROOT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    local, _ = hub.fetch(hub.Source("a/b", "v1", "saelens/topk"))
    assert local == ROOT / "saelens/topk" and asked["revision"] == "v1"
    assert not [p for p in asked["patterns"] if "*" in p]
    assert {"saelens/topk/cfg.json", "saelens/topk/params.npz", "saelens/config.json"} <= set(asked["patterns"])
    with pytest.raises(FormatError):
        hub.fetch(hub.Source("a/b", None, "saelens/l19.pt"))
    assert asked["patterns"] == ["saelens/config.json", "saelens/l19.pt"]
