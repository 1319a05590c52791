"""An evaluation belongs to the content behind the names, needs no store, and is never thrown away."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

import saejax
from saejax.base.errors import StoreError
from saejax.cli.main import main
from saejax.runs import evaluation
from saejax.runs.opening import open_all
from tests import tiny_experiment as tiny
from tests.processes import as_user


@pytest.fixture(scope="module")
def made(model_and_text, tmp_path_factory):
    """(model, text, run) of a finished run, for tests that change a copy."""
    run = tmp_path_factory.mktemp("evaluation") / "run"
    assert main(["run", f"--config={tiny.write_config(run.parent / 'config.py', *model_and_text, run)}"]) == 0
    return *model_and_text, run


@pytest.fixture
def run(made, tmp_path):
    """A run of its own model and text, which may be changed."""
    model, text = shutil.copytree(made[0], tmp_path / "model"), shutil.copytree(made[1], tmp_path / "text")
    assert main(["run", f"--config={tiny.write_config(tmp_path / 'config.py', model, text, tmp_path / 'run')}"]) == 0
    return tmp_path / "run"


def test_without_the_store_the_figures_are_the_same(made, tmp_path):
    run = shutil.copytree(made[2], tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["run_dir"], config["harvest"]["store"] = str(run), str(run / "store")
    (run / "config.json").write_text(json.dumps(config))
    before = saejax.evaluate(run, contexts=5, out=tmp_path / "before")
    shutil.rmtree(run / "store")
    after = saejax.evaluate(run, contexts=5, out=tmp_path / "after")
    assert after == before and before["contexts"] == 5
    (run / "statistics.json").write_text("{}")
    with pytest.raises(StoreError, match="statistics.json: not readable as statistics"):
        saejax.evaluate(run, contexts=6)


@pytest.mark.parametrize("changed", ["weights", *(pytest.param(name, marks=pytest.mark.slow)
                                                 for name in ("text", "special id", "nothing"))])
def test_other_content_behind_the_same_names_is_measured_again(run, monkeypatch, changed):
    model, measured = run.parent / "model", []
    if changed == "weights":
        weights = load_file(model / "model.safetensors")
        weights["model.norm.weight"][0] += 1
        save_file(weights, model / "model.safetensors")
    if changed == "text":
        file = sorted((run.parent / "text").glob("*.txt"))[0]
        file.write_text(file.read_text().replace("e", "a"))
    if changed == "special id":
        file = model / "tokenizer_config.json"
        file.write_text(file.read_text().replace('"eos_token": "</s>"', '"eos_token": "<unk>"'))
    evaluate = evaluation.evaluate_all
    monkeypatch.setattr(evaluation, "evaluate_all", lambda *args, **more: measured.append(1) or evaluate(*args, **more))
    saejax.evaluate(run)
    assert len(measured) == (changed != "nothing")


def test_neighbours_of_one_model_and_text_are_measured_in_one_pass(made, monkeypatch):
    run, passes, evaluate = made[2], [], evaluation.evaluate_all
    monkeypatch.setattr(evaluation, "evaluate_all", lambda saes, *args, **more: passes.append(len(saes))
                        or evaluate(saes, *args, **more))
    step = max(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())
    places = [run, run / "release", run / "checkpoints" / str(step)]
    subjects = [found for place in places for found in open_all(place)]
    found = list(evaluation.evaluated_all(list(subjects), contexts=7))
    assert [subject for subject, _ in found] == subjects and passes == [3]
    assert found[0][1] == found[2][1] and found[1][1]["ce_spliced"] == pytest.approx(found[0][1]["ce_spliced"], rel=1e-4)
    assert found[0][1] == saejax.evaluate(run, contexts=7) and passes == [3]  # kept
    monkeypatch.setattr(evaluation, "TOGETHER", 0)
    list(evaluation.evaluated_all([found for place in places for found in open_all(place)], contexts=6))
    assert passes == [3, 1, 1]  # the third is what the first one kept


def test_what_cannot_be_kept_is_shown(made, tmp_path):
    """A file system that takes no more than 1 KB stands for a run that may only be read."""
    command = [sys.executable, "-m", "saejax", "eval", str(made[2]), "--contexts=3", "--json"]
    done = subprocess.run(["bash", "-c", 'ulimit -f 1; exec "$@"', "-", *command], capture_output=True, text=True,
                          env=as_user(Path(saejax.__file__).parents[1]))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["contexts"] == 3
    assert "eval.json: File too large" in done.stderr and "the evaluation is not kept (out=DIR keeps it elsewhere)" in done.stderr
    assert main(["eval", str(made[2]), "--contexts=3", f"--out={tmp_path}"]) == 0
    assert len(json.loads((tmp_path / "eval.json").read_text())["entries"]) == 1
    assert main(["eval", str(made[2]), str(made[2]), f"--out={tmp_path}"]) == 2
