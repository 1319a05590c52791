"""`saejax features` and `saejax dashboard` as a user meets them, on a finished run."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import saejax
from saejax.cli.main import main
from saejax.features.index.reader import FeatureIndex
from tests.judging.server import serving
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


def test_long_jobs_show_their_progress(run, tmp_path, capsys):
    """Each of their parts to its end, in whole lines: the tests' stderr is no terminal. The run says whether they do."""
    copy = shutil.copytree(run, tmp_path / "run")
    capsys.readouterr()
    assert main(["features", str(copy), "--verify=50"]) == 0 and "%" not in capsys.readouterr().err
    config = json.loads((copy / "config.json").read_text())
    config["log"]["progress"] = True
    (copy / "config.json").write_text(json.dumps(config))
    assert main(["features", str(copy), "--rebuild", "--verify=50", "--export=neuronpedia"]) == 0
    said = capsys.readouterr().err
    parts = re.findall(r"^(.+): 100% (\S+)/\2 \[\d\d:\d\d<00:00, .*/s\]$", said, re.MULTILINE)
    assert [title for title, _ in parts] == ["index, pass 1", "index, examples", "index, pass 2", "index, tables",
                                             "index, digests", "verify", "export"]
    assert "\r" not in said and dict(parts)["index, tables"] == "64.0"
    assert main(["dashboard", str(copy)]) == 0
    assert re.search(r"^dashboard: 100% 64.0/64.0 \[.*feature/s\]$", capsys.readouterr().err, re.MULTILINE)
    assert '["Language model",' in (copy / "dashboard" / "data" / "meta.js").read_text()


def test_report_and_dashboard_name_each_other_in_either_order(run, finished, tmp_path, capsys):
    """Whichever is made last; neither names what is not there."""
    link, other = 'href="dashboard/index.html"', "../report.html"
    assert link not in (finished[1] / "report.html").read_text() and link in (run / "report.html").read_text()
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "report.html").unlink()
    assert main(["dashboard", str(copy)]) == 0
    out, meta = capsys.readouterr().out, copy / "dashboard" / "data" / "meta.js"
    assert f"next     saejax steer {copy} " in out and other not in meta.read_text()
    assert main(["run", str(copy)]) == 0 and main(["run", str(copy)]) == 0
    assert link in (copy / "report.html").read_text() and meta.read_text().count(other) == 1
    json.loads(meta.read_text().removeprefix('saejax("meta",0,').removesuffix(");\n"))
    assert main(["features", str(copy)]) == 0 and f"next     saejax dashboard {copy}\n" in capsys.readouterr().out


def test_an_index_by_itself(run, tmp_path, capsys):
    shutil.move(shutil.copytree(run / "features", tmp_path / "features"), tmp_path / "mine")
    assert main(["dashboard", str(tmp_path / "mine"), f"--out={tmp_path / 'site'}"]) == 0
    assert (tmp_path / "site" / "index.html").is_file() and str(tmp_path / "site") in capsys.readouterr().out


def test_an_index_is_inspected(run, tmp_path, capsys):
    copy = shutil.copytree(run / "features", tmp_path / "mine")
    assert main(["inspect", str(copy)]) == 0 and "feature index" in capsys.readouterr().out
    file = copy / "features.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert main(["inspect", str(copy)]) == 2 and f"BAD  {file}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    (["features"], "saejax features: give"), (["features", "RUN", "--tokens=0"], "--tokens=0: expected a whole number"),
    (["features", "RUN", "--split=x"], "choose from"),
    (["features", "RUN/store"], "neither a release nor anything"), (["dashboard", "RUN", "RUN"], "takes SAE_OR_INDEX, not also"),
    (["features", "RUN/checkpoints/FIRST"], "another checkpoint"), (["features", "RUN", "--tokens=1000"], "another corpus"),
    (["dashboard", "RUN", "--out=RUN/store"], "no dashboard; choose another directory"),
    (["dashboard", "RUN", "--out=RUN/config.json"], "is a file; choose another directory"),
    (["features", "RUN", "--tokens=3", "--tokens=4"], "--tokens is given twice"),
    (["steer", "RUN", "--prompt=a", "--feature=1", "--feature=2"], "--feature is given twice"),
    (["steer", "RUN", "--prompt=a", "--feature=1", "--max=1", "--tokens=1", "--html=RUN"], "/run: is a directory; name a file"),
    (["search", "like", "RUN", "RUN/none.npy"], "/none.npy: not a readable .npy file"),
    (["compare", "RUN", "RUN", "--least=2"], "least=2"), (["compare", "RUN", "RUN", "--rows=64", "--out=RUN"], "is a directory")])
def test_mistakes_end_in_one_line(run, arguments, message, capsys):
    first = min(int(step.name) for step in (run / "checkpoints").iterdir() if step.name.isdigit())
    capsys.readouterr()
    assert main([a.replace("RUN", str(run)).replace("FIRST", str(first)) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err, err


@pytest.mark.slow
def test_two_processes_build_the_same_index(run, tmp_path):
    port, out = free_port(), tmp_path / "features"
    jobs = [subprocess.Popen([sys.executable, "-m", "saejax.cli.main", "features", str(run), f"--out={out}", "--distributed",
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


def test_search_by_a_direction(run, tmp_path, capsys):
    direction = np.asarray(saejax.load(run).params.W_dec[5])
    np.save(tmp_path / "d.npy", -3 * direction), np.save(tmp_path / "short.npy", direction[1:])
    assert main(["search", "like", str(run), str(tmp_path / "d.npy"), "--json"]) == 0
    opposite = json.loads(capsys.readouterr().out)
    np.save(tmp_path / "d.npy", 3 * direction)
    assert main(["search", "like", str(run), str(tmp_path / "d.npy"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found[0]["feature"] == 5 and found[0]["score"] == pytest.approx(1, abs=1e-5)
    assert 5 not in [one["feature"] for one in opposite]
    assert main(["search", "like", str(run), str(tmp_path / "short.npy")]) == 2
    assert "the decoder's directions have" in capsys.readouterr().err


@pytest.mark.slow
def test_search_by_the_command(run, tmp_path, capsys):
    for way, *more in (["prompt", "the cat", "--max-density=1"], ["prompt", "the cat", "--by=activation", "--max-density=1"],
                       ["answer", "the cat", "a", "--against=b"], ["text", "a"], ["like", "3"], ["like", "3", f"--within={run}"]):
        assert main(["search", way, str(run), *more, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found and all(0 <= one["feature"] < 64 and one["why"] for one in found), way
    assert main(["search", "sets", str(run), "--set=multilingual", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"found", "best", "bound", "p"}


def test_search_by_a_prompt(run, capsys):
    """By default without dense features, which on so small a dictionary are all; of each token on request."""
    ask = ["search", "prompt", str(run), "the cat", "--n=3"]
    assert main(ask) == 0
    assert "no feature fits; those active on more than 1 % of the tokens are left out (--max-density)" in capsys.readouterr().out
    assert main([*ask, "--max-density=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all("strongest on token " in line and "fires on: " in line for line in lines)
    assert main([*ask, "--max-density=1", "--per-token"]) == 0
    lines = capsys.readouterr().out.splitlines()
    headings = [line for line in lines if line.startswith("token ")]
    assert headings[0].startswith("token 1 ") and len(lines) <= 4 * len(headings)
    assert main([*ask, "--max-density=1", "--per-token", "--json"]) == 0
    each = json.loads(capsys.readouterr().out)
    assert [one["position"] for one in each] == list(range(1, len(headings) + 1))
    assert "".join(one["token"] for one in each) == "the cat"
    assert main(["search", "prompt", str(run / "release"), "the cat", "--n=3", "--max-density=0"]) == 0
    assert "more than 0 %" in capsys.readouterr().out


def test_search_by_sets_of_prompts(run, tmp_path, capsys):
    """Found or not, the bound is said; one pair is refused in one line."""
    files = [tmp_path / name for name in ("positives.txt", "negatives.txt")]
    ask = ["search", "sets", str(run), *(f"--{file.stem}={file}" for file in files)]
    for file, letter in zip(files, "za", strict=True):
        file.write_text("\n".join(letter * n for n in range(1, 9)))
    assert main([*ask, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["found"] and said["p"] <= 0.05 and all(one["score"] > said["bound"] for one in said["found"])
    assert main(ask) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"above chance: best score {said['best']:.3g}, bound ")
    files[1].write_text(files[0].read_text())
    assert main(ask) == 0
    assert capsys.readouterr().out.startswith("nothing above chance, best score 0, bound ")
    for file in files:
        file.write_text("one\n")
    assert main(ask) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "1 pair of prompts" in err and "give at least 5 pairs" in err


def test_an_index_of_another_step_names_no_tokens(run, capsys):
    first = min((step for step in (run / "checkpoints").iterdir() if step.name.isdigit()), key=lambda step: int(step.name))
    capsys.readouterr()
    assert main(["search", "like", str(first), "3"]) == 0
    out, err = capsys.readouterr()
    assert err.count("another checkpoint") == 1 and "fires on" not in out
    assert main(["search", "text", str(first), "a"]) == 2


@pytest.mark.parametrize("arguments, message", [
    (["RUN"], "say which of prompt, answer, sets, text, like"), (["prompt", "RUN"], "give an SAE and a prompt"),
    (["prompt", "RUN", ""], "prompt is empty"), (["like", "RUN", "64"], "numbered 0 to 63"),
    (["like", "RUN", "x"], "no such feature"), (["sets", "RUN", "--set=x"], "choose one of"),
    (["sets", "RUN", "--positives=no.txt", "--negatives=no.txt"], "no.txt: no readable text file"),
    (["sets", "RUN"], "give --set=NAME, or"), (["sets", "RUN", "--positives=x"], "give --set=NAME, or"),
    (["text", "RUN", "king", "--max-density=0.1"], "unknown option"), (["prompt", "RUN", "a", "--max-density=2"], "from 0 to 1"),
    (["sets", "RUN", "--set=bias", "--positives=x"], "give --set=NAME, or"),
    (["sets", "RUN", "--set=bias", "--negatives=x"], "give --set=NAME, or"),
    (["prompt", "RUN", "a", "--within=RUN"], "unknown option --within"), (["like", "RUN", "5", "--answer=a"], "unknown option"),
    (["text", "RUN", "king", "--negatives=foo"], "unknown option --negatives"), (["prompt", "RUN", "a", "--n=0"], "at least 1"),
    (["prompt", "RUN", "a", "b"], "takes SAE PROMPT, not also b"), (["prompt", "RUN", "a", "--by=size"], "choose from")])
def test_mistaken_searches_end_in_one_line(run, arguments, message, capsys):
    capsys.readouterr()
    assert main(["search", *(a.replace("RUN", str(run)) for a in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err, err


@pytest.mark.parametrize("arguments, message", [
    (["features", "RUN", "--split=heldout", "--store=RUN/store"], "features: --store has no effect where the text goes"),
    (["features", "RUN", "--store=RUN/store", "--text=x", "--context=9"], "--text, --context have no effect where the store is"),
    (["dashboard", "RUN/features", "--model=m", "--index=x"], "dashboard: --model, --index have no effect as RUN/features is an"),
    (["search", "like", "RUN", "5", "--within=RUN", "--index=RUN/features"], "search like: --index has no effect with --within"),
    (["bench", "--only=step", "--megabytes=5", "--tokens=9"],
     "bench: --megabytes has no effect without writer or reader in --only")])
def test_options_without_effect_are_refused(run, arguments, message, capsys):
    capsys.readouterr()
    assert main([a.replace("RUN", str(run)) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message.replace("RUN", str(run)) in err, err


def judged(run, server, *more: str) -> int:
    return main(["judge", str(run), f"--judge={server.url}", "--judge-model=m", "--features=1,3", *more])


def test_judging_goes_on_where_it_stopped(run, capsys):
    with serving() as server:
        assert judged(run, server, "--do=explain,rubric,detect,fuzz,simulate", "--json") == 0
        out, err = capsys.readouterr()
        found, asked = json.loads(out), len(server.requests)
        [folder] = (run / "judging" / "features").iterdir()
        assert asked == found["overall"]["answers"] == len((folder / "answers.jsonl").read_text().splitlines())
        assert "rubric: " in err and "questions to ask, about " in err
        assert set(found["features"]) == {"1", "3"} and found["overall"]["rubric"]["mean"] == 3, "as the server says always"
        assert found["overall"]["fuzz"]["mean"] == found["overall"]["detect"]["mean"] == 0.5, "it says yes to everything"
        assert (folder / "report.html").is_file()
        assert json.loads((folder / "results.json").read_text())["overall"] == found["overall"]
        assert judged(run, server) == 0 and len(server.requests) == asked, "all is answered"
        said = re.search(r"rubric, 0 to 3 +features +3\.00 ± 0\.00 \((\d+) answers, 2 features\)", capsys.readouterr().out)
        assert int(said[1]) == sum(map(sum, found["overall"]["rubric_counts"])), "answers, not features"
        assert main(["dashboard", str(run), f"--explanations={folder / 'results.json'}", f"--out={run / 'judged'}"]) == 0
        assert "(rubric 3.00 of 3, " in (run / "judged" / "data" / "said" / "0000.js").read_text()
        assert judged(run, server, "--draw=40") == 0 and len(server.requests) > asked, "activations drawn are others"
        assert main(["judge", str(run), f"--judge={server.url}", "--judge-model=m", "--sample=3", "--do=explain"]) == 0
    assert "SAEJAX_JUDGE_KEY" not in (folder / "judge.json").read_text()


def test_a_judge_that_is_down(run, capsys):
    with serving(lambda prompt, n: "Vowels." if n <= 2 else (503, {"Retry-After": "0"}, b"")) as server:
        assert judged(run, server, f"--out={run / 'down'}") == 2
        err = capsys.readouterr().err
        assert "5 questions in a row got no answer (HTTP 503" in err and "the same command goes on" in err
        lines = [json.loads(line) for line in (run / "down" / "answers.jsonl").read_text().splitlines()]
        assert sum(line["score"] is None for line in lines) >= 5 and {line["score"] for line in lines} == {None, "Vowels."}
        server._script = lambda prompt, n: "2"
        assert judged(run, server, f"--out={run / 'down'}", "--do=rubric") == 0
    assert json.loads((run / "down" / "results.json").read_text())["overall"]["unscored"]["rubric"] == 0


@pytest.mark.parametrize("baseline", ["random_sae", pytest.param("directions", marks=pytest.mark.slow),
                                      pytest.param("neurons", marks=pytest.mark.slow)])
def test_baselines_go_the_same_way(run, baseline, capsys):
    assert main(["features", str(run), f"--baseline={baseline}", "--verify=100"]) == 0
    index = FeatureIndex.open(run / f"features_{baseline}", full=True)
    assert index.features == {"random_sae": 64, "directions": 256, "neurons": 80}[baseline]
    assert (index.column("fired") > 0).mean() > 0.9
    alive = np.flatnonzero(index.column("fired") > 0)[:2]
    with serving() as server:
        assert main(["judge", str(run), f"--baseline={baseline}", f"--judge={server.url}", "--judge-model=m",
                     f"--features={alive[0]},{alive[1]}"]) == 0
    assert list((run / "judging" / f"features_{baseline}").glob("*/report.html"))


def test_people_judge(run, tmp_path, capsys):
    ask = ["judge", str(run), f"--judge=csv:{tmp_path / 'sheets'}", "--features=3", "--do=detect",
           f"--explanations={tmp_path / 'said.jsonl'}"]
    (tmp_path / "said.jsonl").write_text('{"feature": 3, "explanation": "vowels"}\n')
    assert main(ask) == 0
    err = capsys.readouterr().err
    assert "questions wait for an answer" in err
    rows = (tmp_path / "sheets" / "round_1.csv").read_text("utf-8-sig").splitlines()
    first = rows[1].split(",")[0]
    (tmp_path / "sheets" / "filled.csv").write_text(f"id,answer\n{first},yes\n")
    assert main([*ask, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["overall"]["answers"] == 1
    reports = [page.read_text() for page in (run / "judging" / "features").glob("*/report.html")]
    assert [page for page in reports if ">vowels</td>" in page and 'href="answers/3.html"' in page]


@pytest.mark.parametrize("arguments, message", [
    (["--sample=3"], "give --judge=WHO"),
    (["--judge=me", "--sample=3"], "judge=me: give an endpoint"), (["--judge=http://x/v1", "--sample=3"], "judge_model=NAME"),
    (["--judge=csv:SHEETS"], "--features=1,2,3, or how many"),
    (["--judge=csv:SHEETS", "--features=1", "--sample=3"], "--sample=50"),
    (["--judge=csv:SHEETS", "--features=1,x"], "expected feature numbers as 1,2,3"),
    (["--judge=csv:SHEETS", "--features=64"], "features 0 to 63"),
    (["--judge=csv:SHEETS", "--sample=3", "--do=rubrik"], "'rubrik' is none of explain, rubric"),
    (["--judge=csv:SHEETS", "--sample=3", "--explanations=no.jsonl"], "no.jsonl: not readable"),
    (["--judge=csv:SHEETS", "--sample=3", "--baseline=neurons", "--out=SHEETS"], "features_neurons"),
    (["--judge=csv:SHEETS", "--sample=3", "--judge-model=m", "--timeout=3"], "--judge-model, --timeout have no effect"),
    (["--judge=csv:SHEETS", "--sample=3", "--do=detect", "--draw=9"], "--draw has no effect without rubric in --do"),
    (["--judge=csv:SHEETS", "--sample=3", "--do=explain", "--explanations=x"], "--explanations has no effect where nothing but"),
    (["--judge=local:no_such_model", "--sample=3"], "no_such_model")])
def test_mistaken_judging_ends_in_one_line(run, tmp_path, arguments, message, capsys):
    capsys.readouterr()
    if (run / "features_neurons").exists():
        shutil.rmtree(run / "features_neurons")
    assert main(["judge", str(run), *(a.replace("SHEETS", str(tmp_path / "s")) for a in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err, err
    assert not (tmp_path / "s").exists()
