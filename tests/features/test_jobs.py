"""`saejax features` and `saejax dashboard` as a user meets them, on a finished run."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from saejax.features.index import FeatureIndex
from saejax.main import main
from tests.processes import environment, free_port


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    """A copy of the run with its index and its dashboard."""
    copy = tmp_path_factory.mktemp("jobs") / "run"
    shutil.copytree(finished[1], copy)
    assert main(["features", str(copy)]) == 0
    assert main(["dashboard", str(copy)]) == 0
    return copy


def test_what_a_run_has_afterwards(run, capsys):
    assert main(["features", str(run), "--verify=200", "--json", "--export=neuronpedia"]) == 0
    said = json.loads(capsys.readouterr().out)
    index = FeatureIndex.open(run / "features", full=True)
    assert said["alive"] == (index.column("fired") > 0).sum() and said["verified"]["within_tolerance"] > 0.98
    assert said["exported"] == str(run / "neuronpedia") and (run / "neuronpedia" / "batch-0.json").is_file()
    meta = (run / "dashboard" / "data" / "meta.js").read_text()
    assert "CE recovered" in meta and "../report.html" in meta and (run / "dashboard" / "index.html").is_file()


def test_an_index_by_itself(run, tmp_path, capsys):
    shutil.move(shutil.copytree(run / "features", tmp_path / "features"), tmp_path / "mine")
    assert main(["dashboard", str(tmp_path / "mine"), f"--out={tmp_path / 'site'}"]) == 0
    assert (tmp_path / "site" / "index.html").is_file() and str(tmp_path / "site") in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    (["features"], "saejax features: give"), (["features", "RUN", "--tokens=0"], "tokens"),
    (["features", "RUN", "--text=x"], "train|heldout"),
    (["features", "RUN/store"], "not a run directory"), (["dashboard", "RUN", "RUN"], "give one run or one index"),
    (["features", "RUN/checkpoints/FIRST"], "another checkpoint"), (["features", "RUN", "--tokens=1000"], "another corpus"),
    (["dashboard", "RUN", "--out=RUN/store"], "no dashboard; choose another --out")])
def test_mistakes_end_in_one_line(run, arguments, message, capsys):
    first = min(int(step.name) for step in (run / "checkpoints").iterdir() if step.name.isdigit())
    capsys.readouterr()
    assert main([a.replace("RUN", str(run)).replace("FIRST", str(first)) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err, err


@pytest.mark.slow
def test_two_processes_build_the_same_index(run, tmp_path):
    port, out = free_port(), tmp_path / "features"
    jobs = [subprocess.Popen([sys.executable, "-m", "saejax.main", "features", str(run), f"--out={out}", "--distributed",
                              f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={i}"], env=environment(2),
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in range(2)]
    try:
        for job in jobs:
            _, err = job.communicate(timeout=240)
            assert job.returncode == 0, err[-3000:]
    finally:
        for job in jobs:
            job.kill()
    one, two = FeatureIndex.open(run / "features"), FeatureIndex.open(out, full=True)
    np.testing.assert_array_equal(two.column("fired"), one.column("fired"))
    for feature in range(0, one.features, 7):
        for a, b in zip(one.examples(feature), two.examples(feature), strict=True):
            assert (a["interval"], a["context"], a["position"]) == (b["interval"], b["context"], b["position"])
            np.testing.assert_allclose(a["acts"], b["acts"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_search_by_the_command(run, tmp_path, capsys):
    (tmp_path / "positives.txt").write_text("zz zz\n\nzzz a\n")
    for way in (["--prompt=the cat"], ["--prompt=the cat", "--answer=a", "--against=b"], ["--find=a"],
                ["--like=3"], ["--like=3", f"--within={run}"], ["--set=bias"],
                ["--set=multilingual"], [f"--positives={tmp_path / 'positives.txt'}"]):
        assert main(["search", str(run), *way, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found and all(0 <= one["feature"] < 64 and one["why"] for one in found), way
    assert main(["search", str(run), "--prompt=the cat"]) == 0
    assert "fires on: " in capsys.readouterr().out


def test_an_index_of_another_step_names_no_tokens(run, capsys):
    first = min((step for step in (run / "checkpoints").iterdir() if step.name.isdigit()), key=lambda step: int(step.name))
    capsys.readouterr()
    assert main(["search", str(first), "--like=3"]) == 0
    out, err = capsys.readouterr()
    assert "another checkpoint" in err and "fires on" not in out
    assert main(["search", str(first), "--find=a"]) == 2


@pytest.mark.parametrize("arguments, message", [
    (["RUN"], "one of --prompt"), (["RUN", "--prompt="], "prompt is empty"), (["RUN", "--like=64"], "numbered 0 to 63"),
    (["RUN", "--like=x"], "no such feature"), (["RUN", "--set=x"], "choose one of"),
    (["RUN", "--positives=no.txt"], "no.txt: no readable text file"),
    (["RUN", "--prompt=a", "--find=b"], "one of --prompt")])
def test_mistaken_searches_end_in_one_line(run, arguments, message, capsys):
    capsys.readouterr()
    assert main(["search", *(a.replace("RUN", str(run)) for a in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err, err
