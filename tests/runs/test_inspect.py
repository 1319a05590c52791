"""`saejax inspect` recognises everything saejax writes, and names every file and leaf that does not verify."""

import json
import re
import shutil

import pytest
from tqdm import tqdm

from saejax.base.errors import FormatError
from saejax.cli.main import main
from saejax.runs.inspect import inspect_path
from tests import tiny_experiment as tiny


@pytest.fixture
def original(finished):
    """The run that tests share: not to be changed."""
    return finished[1]


@pytest.fixture
def run(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run")


def newest(run):
    return max((p for p in (run / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))


def flip(file, at=-100):
    data = bytearray(file.read_bytes())
    data[at] ^= 0x10
    file.write_bytes(data)


def test_every_kind_is_recognised_and_verifies(original, capsys):
    step = newest(original)
    for path, kind, whole in ((original, "run", False), (original / "store", "activation store", True),
                              (step, "checkpoint step", True), (original / "release", "release", False)):
        assert main(["inspect", str(path)]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"{path}: {kind}\n") and out.endswith("  verifies\n" if whole else "but for what was not read\n")
    assert main(["inspect", "--json", str(original / "store")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["verifies"] and facts["hookpoints"] == {tiny.HOOKPOINT: tiny.D_IN} and facts["rows"] == 4096


def test_progress_counts_what_is_read(original, capsys):
    """To the last byte: of a run, those below its checkpoints, store and release."""
    parts = [newest(original).parent, original / "store", original / "release"]
    size = sum(f.stat().st_size for part in parts for f in part.rglob("*") if f.is_file())
    assert main(["inspect", str(original)]) == 0
    shown = tqdm.format_sizeof(size)
    assert re.fullmatch(rf"inspect: 100% {shown}/{shown} \[\d\d:\d\d<00:00, .*B/s\]\n", capsys.readouterr().err)
    inspect_path(original, progress=False)
    assert capsys.readouterr().err == ""


def test_what_has_no_digest_is_named(run, capsys):
    """All files below a run are read, or named as not read."""
    for name in ("neurons/neurons.parquet", "judging/features/me/answers.jsonl", "dashboard/index.html", "store/acts/more",
                 "checkpoints/corrupt-7/state", "features/progress/state.npz"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x")
    assert main(["inspect", str(run), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["not_read"]
    assert {"neurons/", "judging/", "dashboard/", "store/acts/more", "checkpoints/corrupt-7/", "features/", "metrics.jsonl",
            "release/README.md"} <= set(said)
    assert not [name for name in said if name.startswith(("config.json", "store/tokens", f"checkpoints/{newest(run).name}"))]
    for file in (f for f in run.rglob("*") if f.is_file()):
        name = file.relative_to(run).as_posix()
        if not any(name == one or (one.endswith("/") and name.startswith(one)) for one in said):
            before = file.read_bytes()
            other_part = name.startswith("store/text/part-") and "part-00007" not in name and "part-00064" not in name
            if before and not other_part and name.startswith(("store/", "release/sae_weights")):  # others are only parsed
                flip(file, len(before) // 2)
                assert main(["inspect", str(run)]) == 2, f"{name} is neither read nor named"
                file.write_bytes(before)
    assert main(["inspect", str(run)]) == 0 and "not read         " in capsys.readouterr().out


def test_every_bad_file_of_a_store_is_named(run, capsys):
    store = run / "store"
    shard = next((store / "acts").rglob("c/1/0"))
    token = store / "tokens" / "c" / "2"
    record = store / "shards" / "00000.bin"
    flip(shard), token.unlink(), flip(record, 5)
    assert main(["inspect", str(store)]) == 2
    out = capsys.readouterr().out
    assert "does NOT verify: 3 problems" in out
    for file in (shard, token, record):
        assert str(file) in out
    assert main(["inspect", str(run)]) == 2 and str(shard) in capsys.readouterr().out


def test_an_unfinished_store_says_how_far_it_is(run, capsys):
    store = run / "store"
    (store / "manifest.json").unlink()
    (store / "shards" / "00003.bin").unlink()
    assert main(["inspect", str(store)]) == 0
    out = capsys.readouterr().out
    assert "activation store, unfinished" in out and "3 of 4" in out
    flip(next((store / "acts").rglob("c/1/0")))
    assert main(["inspect", str(store)]) == 2 and "c/1/0: does not read back" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_named(run, capsys):
    step = newest(run)
    data = max((f for f in (step / "state").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    flip(data, data.stat().st_size // 2)
    assert main(["inspect", str(step)]) == 2
    out = capsys.readouterr().out
    assert "does NOT verify" in out and str(step) in out
    assert main(["inspect", str(run)]) == 2 and f"checkpoints/{step.name}" in capsys.readouterr().out


def test_a_checkpoint_without_its_run_verifies_its_parameters(run, tmp_path, capsys):
    alone = shutil.copytree(newest(run), tmp_path / "alone" / "a" / "7")
    assert main(["inspect", str(alone)]) == 0
    assert "parameters only" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["state", "meta"])
def test_half_a_checkpoint_is_still_recognised(run, part, capsys):
    step = newest(run)
    shutil.rmtree(step / part)
    assert main(["inspect", str(step)]) == 2
    out = capsys.readouterr().out
    assert f"{step}: checkpoint step" in out and f"{step}/{part}: " in out


def test_a_release_without_weights_and_with_cut_weights(run, capsys):
    weights = run / "release" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert main(["inspect", str(run / "release")]) == 2 and str(weights) in capsys.readouterr().out
    weights.unlink()
    assert main(["inspect", str(run / "release")]) == 2 and f"{weights}: missing" in capsys.readouterr().out


def test_something_else_is_refused(tmp_path):
    with pytest.raises(FormatError, match="neither an activation store"):
        inspect_path(tmp_path)


def test_files_of_another_library_are_read_and_not_said_to_verify(run, tmp_path, capsys):
    theirs = tmp_path / "theirs"
    assert main(["convert", str(run), str(theirs), "--to=sparsify"]) == 0 and main(["inspect", str(theirs)]) == 0
    out = capsys.readouterr().out
    assert f"{theirs}: files of another library" in out and "sparsify" in out and "can be read; it has no digests" in out
    assert inspect_path(theirs, progress=False).to_json()["verifies"] is None
    weights = theirs / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert main(["inspect", str(theirs)]) == 2 and str(weights) in capsys.readouterr().out
