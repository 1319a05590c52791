"""`saejax steer`, `saejax attribute` and `saejax neurons` as a user meets them, on a finished run."""

import html
import json
import re
import shutil

import numpy as np
import pytest

import saejax
from saejax.cli.main import main
from saejax.features.index.reader import FeatureIndex


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    """A copy of the run with its index."""
    copy = tmp_path_factory.mktemp("effects") / "run"
    shutil.copytree(finished[1], copy)
    assert main(["features", str(copy)]) == 0
    return copy


@pytest.fixture(scope="module")
def alive(run):
    return int(FeatureIndex.open(run / "features").column("max").argmax())


def test_side_by_side(run, alive, tmp_path, capsys):
    np.save(tmp_path / "direction.npy", np.arange(48.0))
    (tmp_path / "positives.txt").write_text("zz\nzzz\n")
    (tmp_path / "negatives.txt").write_text("the cat\n")
    ways = [f"--feature={alive}", "--scale", "-5,0,50", "--ablate", f"--add-direction={tmp_path / 'direction.npy'}",
            f"--positives={tmp_path / 'positives.txt'}", f"--negatives={tmp_path / 'negatives.txt'}", "--vector_scale=1,20"]
    asked = ["steer", str(run), "--prompt=the <script>cat", *ways, "--tokens=16"]
    assert main([*asked, "--json", f"--html={tmp_path / 'page.html'}"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["change"] for row in rows] == [
        "unsteered", *(f"feature {alive} x {scale}" for scale in (-5, 0, 50)), f"feature {alive} ablated",
        "direction direction.npy x 1", "direction direction.npy x 20", "few-shot vector x 1", "few-shot vector x 20"]
    assert rows[2]["text"] == rows[4]["text"], "0 times the maximum is ablation"
    assert len({row["text"] for row in rows}) > 3
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and "&lt;script&gt;cat" in page
    assert re.search(r'Content-Security-Policy"\s+content="default-src .none.', page) and f"feature {alive} x 50" in page
    assert main([*asked, "--positions=last"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 9 + 2 + 8 and out.startswith("unsteered ") and out.count("KL ") == 8


def test_pages_link_to_the_dashboard_of_the_index_that_was_read(run, alive, tmp_path):
    copy = shutil.copytree(run, tmp_path / "a <run>")
    steered = copy / "pages" / "steered.html"
    asked = ["steer", str(copy), "--prompt=the cat", f"--feature={alive},3", "--tokens=2"]
    attributed = ["attribute", str(copy), "--prompt=the cat", "--token=a", "--ablate=top:1"]
    assert main([*asked, f"--html={steered}"]) == 0
    fires_on = html.escape(FeatureIndex.open(copy / "features").fires_on(alive))
    assert "href" not in steered.read_text() and f"fires on {fires_on}" in steered.read_text()
    assert main(["dashboard", str(copy)]) == 0
    assert main([*asked, f"--html={steered}"]) == 0 and main([*attributed, f"--html={tmp_path / 'attributed.html'}"]) == 0
    for feature in (alive, 3):
        assert f'<a href="../dashboard/index.html#feature={feature}">feature {feature}</a>' in steered.read_text()
    assert '<a href="a%20%3Crun%3E/dashboard/index.html#feature=' in (tmp_path / "attributed.html").read_text()
    mark = json.loads((copy / "dashboard" / "dashboard.json").read_text())
    (copy / "dashboard" / "dashboard.json").write_text(json.dumps(mark | {"index": "0" * 64}))
    assert main([*asked, f"--html={steered}"]) == 0 and "href" not in steered.read_text(), "the dashboard of another index"


def test_attribution_with_its_ablation(run, tmp_path, capsys):
    asked = ["attribute", str(run), "--prompt=the <b>\u202ecat", "--token=a"]
    assert main([*asked, "--against=b", "--ablate=all", "--json", f"--html={tmp_path / 'page.html'}"]) == 0
    said = json.loads(capsys.readouterr().out)
    features, errors, biases = ([one for one in said["found"] if one["kind"] == kind] for kind in ("feature", "error", "bias"))
    assert said["agreement"]["pairs"] == len(features) > 20 and said["agreement"]["attribution"] > 0.5
    assert all(one["ablation"] is not None and 0 <= one["feature"] < 64 for one in features)
    assert sorted(one["position"] for one in errors) == sorted(one["position"] for one in biases) and len(errors) > 5
    assert sum(one["attribution"] for one in said["found"]) == pytest.approx(said["sums"]["sum"], abs=1e-4)
    page = (tmp_path / "page.html").read_text()
    assert "<b>" not in page and "\u202e" not in page and page.count("<circle") == len(features)
    assert page.count(">error</td>") > 0 and page.count('type="radio"') == 3 and "<script" not in page
    assert f"error {said['sums']['error']:.3g}" in page and "correlation with the ablation" in page


def test_what_is_shown_is_ablated(run, tmp_path, capsys):
    """The largest by default; beside those drawn at random, which alone make the correlation."""
    asked = ["attribute", str(run), "--prompt=the cat", "--token=a"]
    for more, pairs in ([], 0), (["--ablate=top:3"], 0), (["--ablate=random:5"], 5):
        assert main([*asked, *more]) == 0
        out = capsys.readouterr().out
        first, _, *rows = out.splitlines()
        assert all(f"{name} " in first for name in ("features", "error", "bias", "BOS", "sum", "logit difference"))
        rows = [row for row in rows if "  attribution" in row]
        assert len(rows) == 15 and "nan" not in out and any(row.startswith("   error ") for row in rows)
        assert (f"over {pairs} pairs, drawn at random" in out) == (pairs > 0) and "Templeton" not in out
    assert main([*asked, "--ablate=random:5", f"--html={tmp_path / 'page.html'}"]) == 0
    rows = re.findall(r'<tr><td class="token">(.*?)</tr>', (tmp_path / "page.html").read_text().split("of the largest")[1], re.S)
    assert len(rows) == 40 and not [row for row in rows if '<td class="n"></td>\n<td class="text' in row]
    assert "Over 5 pairs" in (tmp_path / "page.html").read_text()


def test_neurons_are_counted(run, capsys):
    assert main(["neurons", str(run), "--tokens=800", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["features"] + said["left_out"] == 64 and 0 <= said["absolute"] <= said["correlation"] <= 1
    assert main(["neurons", str(run), "--tokens=800"]) == 0
    assert sum(part["features"] for part in said["parts"]["fired"]) == said["features"]
    assert "Templeton" not in (out := capsys.readouterr().out) and "82 %" not in out and f"{said['features']} features" in out
    assert out.count("  fired ") == len(said["parts"]["fired"]) and out.count("highest in layer") == len(said["parts"]["layer"])
    assert main(["neurons", str(run), "--tokens=1600"]) == 2
    assert "choose another directory" in capsys.readouterr().err


@pytest.mark.slow
def test_files_of_another_library_take_a_model_and_a_maximum(run, alive, model_and_text, tmp_path, capsys):
    shutil.copytree(run / "release", tmp_path / "foreign")
    prompt, feature = "--prompt=the cat", f"--feature={alive}"
    largest = FeatureIndex.open(run / "features").column("max")[alive]
    assert main(["steer", str(run), prompt, feature, "--tokens=4", "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert main(["steer", str(tmp_path / "foreign"), prompt, feature, f"--max={largest}", f"--model={model_and_text[0]}",
                 "--tokens=4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == expected
    assert main(["steer", str(tmp_path / "foreign"), prompt, feature, f"--model={model_and_text[0]}"]) == 2
    assert "give index=DIR or max=VALUE" in capsys.readouterr().err
    assert saejax.load(tmp_path / "foreign").cfg.d_sae == 64


@pytest.mark.parametrize("arguments, message", [
    (["steer", "RUN"], "give --prompt=TEXT"), (["steer", "RUN", "--prompt=a"], "give --feature=N, --add-direction"),
    (["steer", "RUN", "--prompt=a", "--feature=64"], "numbered 0 to 63"),
    (["steer", "RUN", "--prompt=a", "--feature=x"], "expected feature numbers as 1,2,3"),
    (["steer", "RUN", "--prompt=a", "--feature=1", "--scale=2,y"], "expected numbers as"),
    (["steer", "RUN", "--prompt=a", "--feature=1", "--max=1", "--positions=1,9"], "the prompt has tokens 0 to 1"),
    (["steer", "RUN", "--prompt=a", "--feature=1", "--max=1", "--positions=x"], "all, last, or token numbers"),
    (["steer", "RUN", "--prompt=a", "--scale=3"], "need --feature=N"),
    (["steer", "RUN", "--prompt=a", "--feature=1,1", "--max=1"], "expected feature numbers"),
    (["steer", "RUN", "--prompt=a", "--feature=1", "--values=2", "--scale=3"], "leave --scale and --max out"),
    (["steer", "RUN", "--prompt=a", "--feature=1", "--max=1", "--top-p=2", "--temperature=1"], "top_p=2.0"),
    (["steer", "RUN", "--prompt=a", "--feature=1", "--max=1", "--chat"], "no chat template"),
    (["steer", "RUN", "--prompt=a", "--positives=x"], "go together"),
    (["steer", "RUN", "--prompt=a", "--add-direction=no.npy"], "not a readable .npy"),
    (["steer", "RUN", "--prompt=" + "a" * 63, "--feature=1", "--max=1"], "do not fit the context of 64"),
    (["steer", "STEP", "--prompt=a", "--feature=1"], "another checkpoint"),
    (["steer", "RUN/store", "--prompt=a", "--feature=1"], "neither a release"),
    (["steer", "RUN", "--prompt=a", "--feature=1", "--max=1", "--vector-scale=2"], "--vector-scale has no effect without"),
    (["steer", "RUN", "--prompt=a", "--feature=1", "--max=1", "--seed=3", "--top-p=.5"], "--seed, --top-p have no effect"),
    (["steer", "RUN", "--prompt=a", "--feature=1", "--max=1", "--samples=3", "--temperature=0"], "--samples has no effect"),
    (["steer", "RUN", "--prompt=a", "--feature=1", "--ablate", "--max=1"], "--max has no effect where features are only ablated"),
    (["steer", "RUN", "--prompt=a", "--feature=1", "--values=1", "--index=RUN/features"], "--index has no effect where"),
    (["neurons", "RUN", "--store=RUN/store"], "--store has no effect as the text"),
    (["attribute", "RUN", "--prompt=a"], "give --token=TOKEN"),
    (["attribute", "RUN", "--prompt=a", "--token=b", "--ablate=5"], "top:N, random:N or all"),
    (["attribute", "RUN", "--prompt=a", "--token=b", "--ablate=top:0"], "top:N, random:N or all"),
    (["attribute", "RUN", "--prompt=a", "--token=ab"], "'ab' is 2 tokens"),
    (["attribute", "RUN", "--prompt= ", "--token=a"], "prompt is empty")])
def test_mistakes_end_in_one_line(run, arguments, message, capsys):
    first = min((step for step in (run / "checkpoints").iterdir() if step.name.isdigit()), key=lambda step: int(step.name))
    capsys.readouterr()
    assert main([a.replace("RUN", str(run)).replace("STEP", str(first)) for a in arguments]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("saejax: error")]
    assert out == "" and len(lines) == 1 and message in lines[0], err
