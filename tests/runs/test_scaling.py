"""`saejax scaling` on the tiny experiment: in pieces, interrupted and at once it gives the same points; what it refuses."""

import dataclasses
import json
import re

import pytest

from saejax.base.errors import ScalingError
from saejax.base.records import MeshOptions
from saejax.base.storage import write_json
from saejax.cli.main import main
from saejax.runs import scaling
from saejax.runs.evaluation import evaluate_subject
from saejax.scaling.points import parsed_recipe, read_points
from saejax.scaling.study import study
from saejax.train import loop
from tests import tiny_experiment as tiny
from tests.scaling.test_laws import grid, point, topk_grid

GRID = ("sae.d_sae=32,64,128", "train.tokens=512,1024,2048")
SHORTEST = ["d_sae=32,tokens=512", "d_sae=64,tokens=512", "d_sae=128,tokens=512", "d_sae=32,tokens=1024"]
HOSTILE = "<script>alert(1)</script>\u202e"


@pytest.fixture(scope="module")
def places(model_and_text, tmp_path_factory):
    """What `write` needs: model, text, and a folder with one store for all studies of this file."""
    return *model_and_text, tmp_path_factory.mktemp("scaling")


def write(places, name, extra="", sweep=GRID):
    """(config file, run directory) of a study."""
    model, text, folder = places
    lines = (f"c.sweep.product = {sweep!r}\nc.harvest.store = {str(folder / 'store')!r}\nc.log.tensorboard = False\n"
             f"c.sae.aux_k = 0\n{extra}")
    return tiny.write_config(folder / f"{name}.py", model, text, folder / name, lines), folder / name


def points_of(run):
    return {point.run: point for point in read_points(run / "points.json")}


def checkpoints_of(run):
    return {file: file.stat().st_mtime_ns for file in run.glob("*/checkpoints/*/meta/*")}


@pytest.fixture(scope="module")
def pieces(places):
    """A study in three calls, the second of which is stopped in the middle of a step: (run directory, points after each)."""
    config, run = write(places, "pieces")
    assert main(["scaling", f"--config={config}", "--limit=4"]) == 0
    first, made = points_of(run), checkpoints_of(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Preemption, "requested", lambda self, step: step == 20)
        assert main(["scaling", f"--config={config}"]) == 75
    between = points_of(run)
    assert main(["scaling", f"--config={config}"]) == 0
    assert made and made.items() <= checkpoints_of(run).items()
    return run, first, between, points_of(run)


def test_in_pieces(pieces):
    run, first, between, points = pieces
    assert sorted(first) == sorted(SHORTEST) and between == first
    assert len(points) == 9 and first.items() <= points.items()
    assert not (run / "scaling.html").exists()


def test_at_once_is_the_same(places, pieces, capsys):
    config, run = write(places, "whole", sweep=("sae.d_sae=64,128", "train.tokens=2048"))
    assert main(["scaling", f"--config={config}"]) == 0
    assert points_of(run).items() <= pieces[-1].items() and len(points_of(run)) == 2
    assert "no scaling laws: 2 runs that did not diverge are too few for this fit" in capsys.readouterr().out


def test_what_a_point_says(pieces):
    points = pieces[-1]
    one = points["d_sae=64,tokens=1024"]
    assert (one.d_in, one.features, one.steps, one.batch, one.k, one.lr) == (tiny.D_IN, 64, 16, 64, 8, 1e-3)
    assert one.flops_dense == 16 * 10 * 64 * tiny.D_IN * 64
    assert one.flops_sparse == 16 * 64 * (2 * tiny.D_IN * 64 + 2 * 4 * tiny.D_IN * 8)
    evaluation = evaluate_subject(pieces[0] / one.run)
    assert one.loss == evaluation["fvu"] and one.loss_name == f"FVU on {evaluation['tokens']} tokens of held-out text"
    assert one.alive == 64 - round(64 * one.dead_fraction) and one.dead_tokens == evaluation["tokens"]
    assert len({p.recipe for p in points.values()}) == 1
    assert {"sae.kind", "train.lr_decay", "stream.window_rows", "store", "data_seed"} <= parsed_recipe(one.recipe).keys()


def test_a_finished_study_only_reads_its_points(pieces, tmp_path, capsys):
    run = tmp_path / "moved"
    run.mkdir()
    for name in ("config.json", "points.json"):
        (run / name).write_bytes((pieces[0] / name).read_bytes())
    assert main(["scaling", str(run)]) == 0
    assert "d_sae=128,tokens=2048" in capsys.readouterr().out
    assert sorted(p.name for p in run.iterdir()) == ["config.json", "points.json"]


def test_points_of_another_config_are_refused(places, pieces, capsys):
    config, run = write(places, "other", "c.train.lr = 0.01")
    run.mkdir()
    (run / "points.json").write_bytes((pieces[0] / "points.json").read_bytes())
    assert main(["scaling", f"--config={config}"]) == 2
    assert re.search(r"points.json: the point of 'd_sae=32,tokens=512' is of another config \(lr: 0.001 -> 0.01\)",
                     capsys.readouterr().err)
    assert [file.name for file in run.iterdir()] == ["points.json"]


def test_a_store_that_is_too_short_is_refused_unless_epochs_are_meant(places, pieces, capsys):
    sweep = ("sae.d_sae=32", "train.tokens=512,8192")
    config, run = write(places, "short", sweep=sweep)
    assert main(["scaling", f"--config={config}"]) == 2
    assert re.search(r"config.harvest.tokens: the store gives 3,\d+ rows once and the longest run takes 8,192; it would see rows",
                     capsys.readouterr().err)
    assert main(["scaling", f"--config={config}", f"--config.harvest.store={run / 'none'}"]) == 2
    assert "the longest run takes 8,192" in capsys.readouterr().err and not (run / "none").exists(), "known before the harvest"
    assert main(["scaling", f"--config={config}", "--epochs", "--limit=1"]) == 0
    assert list(points_of(run)) == ["d_sae=32,tokens=512"]


def test_a_study_grows_with_its_store(places, pieces, tmp_path, capsys):
    """Longer runs want more rows. Of the same text they are the same recipe; of other text they are not."""
    def points(name, tokens, sweep, extra=""):
        lines = f"c.harvest.store = {str(tmp_path / name)!r}\nc.harvest.tokens = {tokens}\n{extra}"
        config, run = write(places, name, lines, ("sae.d_sae=32", sweep))
        assert main(["scaling", f"--config={config}"]) == 0
        return points_of(run)

    short = points("grown", 1024, "train.tokens=512")
    both = points("grown", 6144, "train.tokens=512,4096")
    assert "grows from 32 to 192 contexts" in capsys.readouterr().err
    assert short.items() <= both.items() and len(both) == 2
    assert {p.recipe for p in both.values()} == {p.recipe for p in pieces[-1].values()}
    [other] = points("other_text", 1024, "train.tokens=512", "c.text.holdout = 0.2").values()
    assert other.recipe != both[other.run].recipe


def test_a_run_that_diverges_is_a_point_with_its_reason(places, pieces, capsys):
    config, run = write(places, "diverged", "c.train.clip = None", ("sae.d_sae=32", "train.lr=1e30,1e-3", "train.tokens=1024"))
    assert main(["scaling", f"--config={config}"]) == 0
    bad, good = sorted(points_of(run).values(), key=lambda p: p.loss is not None)
    assert re.fullmatch(r"loss or gradient not finite, stopped at step \d+", bad.diverged) and bad.loss is None and good.loss > 0
    assert f"diverged: {bad.diverged}" in capsys.readouterr().out
    steps = sorted(run.glob("lr=1e*/checkpoints/*"))
    assert main(["scaling", f"--config={config}"]) == 0 and sorted(run.glob("lr=1e*/checkpoints/*")) == steps
    write_json(run / "points.json", [good.to_json()])  # killed before it was a point: it is stopped still
    assert main(["scaling", f"--config={config}"]) == 0 and points_of(run)[bad.run] == bad


def test_no_study_is_refused(places, capsys):
    config, _ = write(places, "none", sweep=())
    for arguments, why in (([f"--config={config}"], "config.sweep: is empty"),
                           ([], "give --config=FILE, RUN_DIR or --points=FILES"),
                           ([f"--config={config}", "--points=a.json"], "got both --points and a study"),
                           (["--points=a.json", "--limit=3"], "--limit has no effect where points are only read"),
                           (["--points=a.json"], "a.json: missing")):
        assert main(["scaling", *arguments]) == 2 and why in capsys.readouterr().err


def saved(folder, points):
    write_json(folder / "points.json", [p.to_json() for p in points])
    return f"--points={folder / 'points.json'}"


def test_saved_points_are_fitted_and_reported(tmp_path, capsys):
    points = [dataclasses.replace(p, run=f"{p.run} {HOSTILE}", loss_name=HOSTILE) for p in grid(1e-3)]
    given, out = saved(tmp_path, points), tmp_path / "out"
    assert main(["scaling", given, "--predict=4096,1e6", f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    law = re.search(r"features N\*\(C\) +(\S+) \((\S+) to (\S+)\)", printed)
    assert float(law[2]) < float(law[1]) < float(law[3])
    e = study(points).laws.predict(4096, 1e6 / 256)
    assert f"4,096 features, 1,000,000 tokens: loss {e.value:.4g} ({e.low:.4g} to {e.high:.4g}), inside the fitted" in printed
    assert re.search(r"left out laws: budget \S+ FLOPs: ", printed)
    assert "note     Fitted: 36 runs" in printed and "\u202e" not in printed
    page = (out / "scaling.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page and "Held out" not in page
    assert read_points(out / "scaling.json") == points and (out / "loss.svg").is_file()


def test_a_prediction_is_of_the_runs_of_the_laws(tmp_path, capsys):
    """A pilot of another batch and learning rate in front changes nothing of them. How far outside a run lies is told."""
    pilot = dataclasses.replace(point("pilot", 0.5), batch=1024, lr=5e-4)
    usual, both = tmp_path / "usual", tmp_path / "both"
    for folder, points in ((usual, grid(1e-3)), (both, [pilot, *grid(1e-3)])):
        folder.mkdir()
        assert main(["scaling", saved(folder, points), "--predict=1e6,2560", f"--out={folder}"]) == 0
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith("1,000,000 features")]
    assert len(set(lines)) == 1 and len(lines) == 2
    assert re.search(r"outside of their sizes by 2\.0, their lengths by 2\.0 powers of ten$", lines[0])
    assert said.count("note     The laws are of the learning rate 0.001 and of k = 32.") == 2
    page = (both / "scaling.html").read_text()
    assert "0.001" in page and "0.0005" not in page


def test_a_grid_that_diverged_is_not_the_usual_one():
    bad = [dataclasses.replace(p, run=f"bad {p.run}", lr=1e-2, loss=None, diverged="loss not finite") for p in grid()]
    found = study([*bad, *grid(1e-3)[:30]])
    assert found.lr == 1e-3 and found.laws.points == 30 and all(p.lr == 1e-3 for p in found.grid)


def test_studies_that_were_made_apart(tmp_path, capsys):
    """Their sweeps give the same names to runs that differ in the learning rate or the seed of the config."""
    def file(name, points):
        (tmp_path / name).mkdir()
        return saved(tmp_path / name, points).partition("=")[2]

    rates = [file(f"lr{i}", [dataclasses.replace(p, lr=1e-3 * 2.0 ** i, loss=p.loss * (1 + 0.05 * (i - 0.3) ** 2))
                             for p in grid(1e-3)]) for i in (-2, -1, 0, 1, 2)]
    assert main(["scaling", f"--points={','.join(rates)}"]) == 0
    assert "learning rate LR*(C)" in (said := capsys.readouterr().out) and f"{rates[0]}: 0,0" in said and "twice" not in said
    seeds = [file(f"seed{i}", grid(1e-3, i)) for i in range(2)]
    assert main(["scaling", f"--points={','.join(seeds)}"]) == 0 and "Fitted: 72 runs" in capsys.readouterr().out
    assert main(["scaling", f"--points={seeds[0]},{seeds[0]}"]) == 0 and "Fitted: 36 runs" in capsys.readouterr().out


@pytest.mark.parametrize("sizes, parts", [((500, 1000, 8000), 4), ((4096, 12_500), 4), ((4096, 8192), 8), ((501, 8000), 1)])
def test_one_mesh_divides_all_sizes(model_and_text, tmp_path, sizes, parts):
    members = [tiny.make_config(*model_and_text, tmp_path, **{"sae.d_sae": size, "sae.d_in": 2048, "train.batch": 4096})
               for size in sizes]
    found = scaling._mesh(members)
    assert (found.data * found.dict, found.dict) == (8, parts) and all(size % parts == 0 for size in sizes)
    given = [dataclasses.replace(member, mesh=MeshOptions(2, 4)) for member in members]
    assert scaling._mesh(given) == MeshOptions(2, 4)


def test_runs_are_held_out_and_compared(tmp_path, capsys):
    points = grid(5e-3)
    corner = [p for p in points if p.features >= 4000 and p.steps >= 4000]
    points[points.index(corner[-1])] = wrong = dataclasses.replace(corner[-1], loss=2 * corner[-1].loss)
    given = saved(tmp_path, points)
    assert main(["scaling", given, f"--leave-out=4000,{4000 * 256}", f"--out={tmp_path / 'out'}"]) == 0
    report = json.loads((tmp_path / "out/scaling.json").read_text())
    inside = {h["run"]: h["inside"] for h in report["held_out"]}
    assert inside.keys() == {p.run for p in corner} and not inside[wrong.run] and sum(inside.values()) >= 0.75 * (len(corner) - 1)
    assert report["laws"]["points"] == len(points) - len(corner) and len(report["points"]) == len(points)
    assert "Held out of the fit" in (tmp_path / "out/scaling.html").read_text()
    assert re.search(rf"{wrong.run} .* no\n", capsys.readouterr().out)
    for sizes in ("10,10", "1e9,0"):
        assert main(["scaling", given, f"--leave-out={sizes}"]) == 2 and "nothing can be compared" in capsys.readouterr().err


def test_points_that_no_law_goes_through(tmp_path, capsys):
    """Mixed recipes, and a grid that ends before the optimum."""
    points = grid()
    mixed = [dataclasses.replace(points[0], recipe='{"kind":"relu"}'), *points[1:]]
    assert main(["scaling", saved(tmp_path, mixed)]) == 2
    captured = capsys.readouterr()
    assert "these runs differ in recipe, hookpoint" in captured.err and points[0].run in captured.out
    small = [p for p in points if p.features < 3000]
    assert main(["scaling", saved(tmp_path, small), "--predict=4096,1e6"]) == 2
    captured = capsys.readouterr()
    assert "add runs with more features" in captured.err and "no prediction for 4,096 features" in captured.out


def test_learning_rates_beside_a_grid(tmp_path):
    """Runs with other learning rates at four budgets: a law of the rate from these, the other laws from the usual rate alone."""
    usual = grid(1e-3)
    swept = [point(f"lr {i} {j}", p.loss * (1 + 0.05 * (j - 0.3) ** 2), p.features, p.steps, lr=p.lr * 2.0 ** j)
             for i, p in enumerate(usual[::7][:4]) for j in (-2, -1, 1, 2)]
    found = study(usual + swept)
    assert found.laws.points == 36 and len(found.rates.budgets) == 4 and found.refused == ()
    assert found.rates.budgets[0].lr.value == pytest.approx(1e-3 * 2 ** 0.3, rel=0.1)
    assert study(usual).rates is None
    few = study([*usual, swept[0]])
    assert few.laws and few.rates is None and few.refused[0].startswith("no law of the learning rate: 0 of 1 budgets")


def test_several_k_beside_a_grid(tmp_path, capsys):
    """The surface over k comes from the longest runs, the other laws from the usual k alone; by itself it has a report, too."""
    usual, several = grid(1e-3), [p for p in topk_grid(1e-3) if p.k != 32]
    short = [dataclasses.replace(p, run=f"short {p.run}", steps=p.steps // 2) for p in several]
    both = study([*usual, *(dataclasses.replace(p, steps=64_000) for p in several), *short])
    assert both.laws.points == 36 and both.topk.runs == tuple(p.run for p in several) and both.refused == ()
    assert main(["scaling", saved(tmp_path, several), f"--out={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"beta_k +\S+ \(", printed) and "no scaling laws: 6 runs" in printed
    report = json.loads((tmp_path / "out/scaling.json").read_text())
    assert report["laws"] is None and report["topk"]["points"] == len(several) and report["refused"]
    page = (tmp_path / "out/scaling.html").read_text()
    assert "Surface over features and k" in page and "Power laws" not in page and "What a budget buys" not in page
    assert study(usual[:5]).topk is None
    few = study([*usual, dataclasses.replace(usual[-1], run="k", k=64)])
    assert few.laws and few.topk is None and few.refused[0].startswith("no surface over k: 2 runs")


def test_the_same_points_twice_count_once(tmp_path):
    points = grid()
    assert study(points + points).laws.points == 36
    with pytest.raises(ScalingError, match="nothing can be compared"):
        study(points, leave_out=(1, 1))


def test_files_of_a_study_are_no_saes(pieces, tmp_path, capsys):
    run = tmp_path / "run"
    for name in ("config.json", "points.json", *SHORTEST[:2]):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).symlink_to(pieces[0] / name)
    (run / "scaling.html").write_text("")
    assert main(["eval", *sorted(map(str, run.iterdir()))]) == 0
    assert len(re.findall(r"d_sae=\d+,tokens=512", capsys.readouterr().out.splitlines()[0])) == 2


def test_the_report_lies_beside_the_points(places, pieces, capsys):
    """Losses of a known law in the place of the measured ones: 4 x 4 runs have three budgets with three sizes."""
    sizes, lengths = (32, 64, 128, 256), (8, 16, 32, 64)
    sweep = (f"sae.d_sae={','.join(map(str, sizes))}", f"train.tokens={','.join(str(64 * steps) for steps in lengths)}")
    config, run = write(places, "law", sweep=sweep)
    one = next(iter(pieces[-1].values()))
    law = [dataclasses.replace(one, run=f"d_sae={n},tokens={64 * s}", features=n, steps=s, loss=0.1 + 2 * n ** -0.5 + s ** -0.5,
                               flops_dense=640.0 * tiny.D_IN * n * s) for n in sizes for s in lengths]
    run.mkdir()
    saved(run, law)
    assert main(["scaling", f"--config={config}"]) == 0
    printed = capsys.readouterr().out
    assert f"report   {run / 'scaling.html'}" in printed and "no scaling laws" not in printed
    surface = json.loads((run / "scaling.json").read_text())["laws"]["surface"]
    assert surface["form"] == "sum" and surface["parameters"]["a"]["value"] == pytest.approx(0.5, rel=1e-3)
    assert {"scaling.html", "points.csv", "loss.png", "features.svg", "steps.svg"} <= {file.name for file in run.iterdir()}
