"""`saejax push-to-hub`: a dry run by default, the files of a release and nothing else, one line where it cannot."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

import saejax
from saejax.cli.main import main
from saejax.formats import saelens

FIXTURE = Path(__file__).parent / "fixtures" / "saelens" / "topk"


@pytest.fixture
def released(tmp_path):
    saelens.write(tmp_path / "release", saejax.load(FIXTURE))
    (tmp_path / "release" / "README.md").write_text("# a card\n")
    (tmp_path / "release" / "private.txt").write_text("not part of a release")
    return tmp_path / "release"


@pytest.fixture
def hub(monkeypatch):
    """What the hub's client was asked to do."""
    asked = SimpleNamespace(repos=[], files={})

    def create_commit(self, repo, operations, commit_message):
        asked.files = {o.path_in_repo: o.path_or_fileobj for o in operations}
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo}/commit/1")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo, exist_ok: asked.repos.append((repo, exist_ok)))
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    return asked


def test_dry_run_is_the_default(released, hub, capsys):
    assert main(["push-to-hub", str(released), "--repo=me/sae"]) == 0
    said = capsys.readouterr().out
    assert "would write to https://huggingface.co/me/sae" in said and "nothing was uploaded" in said
    assert "sae_weights.safetensors" in said and "private.txt" not in said and "none declared" in said
    assert not hub.repos and not hub.files


def test_upload(released, hub, capsys):
    assert main(["push-to-hub", str(released), "--repo=me/sae", "--license=apache-2.0", "--yes"]) == 0
    assert hub.repos == [("me/sae", True)] and set(hub.files) == {"cfg.json", "sae_weights.safetensors", "README.md"}
    assert hub.files["sae_weights.safetensors"] == str(released / "sae_weights.safetensors")
    card = hub.files["README.md"].decode()
    assert card.startswith("---\n") and 'license: "apache-2.0"' in card and card.endswith("# a card\n")
    assert "wrote https://huggingface.co/me/sae/commit/1" in capsys.readouterr().out


def test_altered_release_is_not_published(released, hub, capsys):
    data = bytearray((released / "sae_weights.safetensors").read_bytes())
    data[-1] ^= 1
    (released / "sae_weights.safetensors").write_bytes(data)
    assert main(["push-to-hub", str(released), "--repo=me/sae", "--yes"]) == 2
    assert "altered since cfg.json was written" in capsys.readouterr().err and not hub.files


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--repo=sae"], "expected ORG/NAME"),
        (["--repo=a/../b"], "expected ORG/NAME"),
        (["--repo=a/b", "--license=my: own"], "license=my: own"),
        ([], "give --repo=ORG/NAME"),
    ],
)
def test_mistakes_are_one_line(released, hub, arguments, message, capsys):
    assert main(["push-to-hub", str(released), *arguments, *(["--yes"] if arguments else [])]) == 2
    assert message in capsys.readouterr().err and not hub.files


def test_files_of_others_are_not_published(tmp_path, hub, capsys):
    shutil.copytree(FIXTURE, tmp_path / "theirs")
    assert main(["push-to-hub", str(tmp_path / "theirs"), "--repo=me/sae", "--yes"]) == 2
    assert "was not written by saejax" in capsys.readouterr().err and not hub.files
