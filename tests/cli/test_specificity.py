"""SAEs of two sizes, neurons, random directions and an untrained SAE through the same judge, and side by side."""

import json
import shutil

import numpy as np
import pytest

import saejax
from saejax.cli.main import main
from saejax.features.index.reader import FeatureIndex
from saejax.runs.baseline import baseline_of
from tests.judging.server import sensible, serving


def script(prompt: str, n: int) -> str:
    """Another score for another question, always the same for the same one."""
    return str(sum(prompt.encode()) % 4) if "one digit alone" in prompt else sensible(prompt)


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    copy = tmp_path_factory.mktemp("specificity") / "run"
    shutil.copytree(finished[1], copy)
    assert main(["features", str(copy)]) == 0
    return copy


def test_sparse_directions_fire_as_often_as_the_median_feature(run, capsys):
    features = FeatureIndex.open(run / "features")
    assert main(["features", str(run), "--baseline=sparse_directions"]) == 0
    index = FeatureIndex.open(run / "features_sparse_directions")
    density = features.column("density")
    median, rows = np.median(density[density > 0]), index.manifest["totals"]["kept_rows"]
    fired = index.column("fired")
    assert len(fired) == 256 and rows == features.manifest["totals"]["kept_rows"]
    np.testing.assert_allclose(fired, round(median * rows), rtol=0.02)  # fewer than 65,536: all rows set the thresholds
    assert np.median(fired) == round(median * rows), "but for rows that are equal"
    subject = saejax.open(str(run))
    one, two = (baseline_of("sparse_directions", subject) for _ in range(2))
    np.testing.assert_array_equal(one.params.b_enc, two.params.b_enc)
    assert main(["features", str(run), "--baseline=sparse_directions"]) == 0, "made again, it is that of the index"


@pytest.mark.parametrize("baselines", [("sparse_directions",), pytest.param(("neurons", "directions", "random_sae"),
                                                                            marks=pytest.mark.slow)])
def test_all_through_one_judge(run, tmp_path, capsys, baselines):
    shutil.rmtree(run / "judging", ignore_errors=True)
    with serving(script) as server:
        def judge(*more: str) -> int:
            return main(["judge", str(run), f"--judge={server.url}", "--judge-model=m", "--sample=4", "--do=rubric", *more])

        assert judge() == 0
        for baseline in baselines:
            assert main(["features", str(run), f"--baseline={baseline}"]) == 0
            assert judge(f"--baseline={baseline}") == 0
        capsys.readouterr()
        [folder] = (run / "judging" / "features").iterdir()
        ask = ["specificity", str(run), f"--out={tmp_path}", "--least=2", f"--judge={folder.name}"]
        assert main([*ask, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        by_label = {one["label"]: one for one in said["dictionaries"]}
        assert {"run", *(f"run {baseline}" for baseline in baselines)} <= by_label.keys()
        lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
        scored = [line for line in lines if line["task"] == "rubric" and line["score"] is not None]
        sae = by_label["run"]
        assert sae["size"] == 64 and sae["overall"]["counts"] == [sum(line["score"] == s for line in scored) for s in range(4)]
        for number, level in enumerate(sae["levels"], 1):
            own = {f: [line["score"] for line in scored if (line["feature"], line["interval"]) == (f, number)] for f in range(64)}
            means = [np.mean(scores) for scores in own.values() if scores]
            if sum(map(len, own.values())) < 2 or len(means) < 2:
                assert level["mean"] is None
            else:
                assert level["mean"] == pytest.approx(np.mean(means)) and level["features"] == len(means)
        assert main(ask) == 0
        out = capsys.readouterr().out
        assert all(label in out for label in by_label) and "worth what the judge is" in out
        assert (tmp_path / "scores.png").is_file()
    with serving(script) as server:  # another address is another judge
        assert judge() == 0
    capsys.readouterr()
    assert main(["specificity", str(run), f"--out={tmp_path}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "answers of several judges" in err
    other = next(place for place in (run / "judging" / "features").iterdir() if place != folder)
    assert main(["specificity", str(folder), str(other), f"--out={tmp_path}"]) == 2
    assert "another judge than those in" in capsys.readouterr().err


def test_a_run_that_nobody_judged(finished, tmp_path, capsys):
    assert main(["specificity", str(finished[1]), f"--out={tmp_path / 'out'}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "holds no answers of a judge" in err and not (tmp_path / "out").exists()
