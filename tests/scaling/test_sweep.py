"""Many SAEs over one stream: each is what it would be alone, can be killed at any moment, and stands on its own afterwards."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

import saejax
from saejax.base.errors import CheckpointError, Preempted
from saejax.base.fingerprints import fingerprints
from saejax.base.logs import read_metrics
from saejax.cli.main import main
from saejax.sae import SAESpec
from saejax.scaling.sweep import members
from saejax.train import loop, step
from saejax.train.checkpoint import Checkpoints, read_meta, steps_in
from saejax.train.hyperparameters import alike
from saejax.train.member import total_steps
from tests import tiny_experiment as tiny
from tests.train.synthetic import D_IN, HOOKPOINT, TARGET, WIDTHS, make_config, make_store

# Two that share a step, with AuxK and resampling at different moments; two of other shapes, of which one ends earlier.
MIXED = ("train.lr=0.003", "train.lr=0.02 seed=7", "recipe=relu sae.penalty_coef=0.1 train.lr=0.003",
         f"sae.hookpoint={TARGET} sae.d_sae=96 train.tokens=544")
SHARING = ("lr=0.003", "lr=0.02,seed=7")
OPTIONS = {"train__resample__every_tokens": 15 * 32, "train__resample__sample_rows": 128, "train__tokens": 30 * 32,
           "sae__d_sae": 128, "sae__dead_tokens": 224, "mesh__data": 2, "mesh__dict": 4}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("sweep") / "store")


def sweep_config(run_dir, variations=MIXED, **overrides):
    return make_config("topk", run_dir, sweep__variations=variations, **OPTIONS | overrides)


def train_sweep(config, store):
    return loop.train_all(members(config), store)


def name_of(config):
    return config.run_dir.rsplit("/", 1)[-1]


def checkpoints_of(config):
    return Path(config.run_dir) / "checkpoints"


def final(config):
    """{member: fingerprints of its last checkpoint}."""
    out = {}
    for member in members(config):
        checkpoints = checkpoints_of(member)
        out[name_of(member)] = read_meta(checkpoints / str(steps_in(checkpoints)[-1])).fingerprints
    return out


@pytest.fixture(scope="module")
def straight(store, tmp_path_factory):
    """A sweep that nobody disturbed."""
    config = sweep_config(tmp_path_factory.mktemp("straight") / "run")
    train_sweep(config, store)
    return config, final(config)


MEASURED = ("time", "tokens_per_second", "flops_per_second", "data_wait_share", "mfu", "peak_device_bytes")  # of the machine


def slow(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.slow
@pytest.mark.parametrize("mesh, path", [((1, 8), "auto"), ((8, 1), "auto"), ((2, 4), "sparse")])
def test_every_member_is_what_it_would_be_alone_on_other_meshes(store, tmp_path, mesh, path):
    variations = [v + " train.path=auto" if "relu" in v else v for v in MIXED]  # relu has no other one
    config = sweep_config(tmp_path / "run", variations, mesh__data=mesh[0], mesh__dict=mesh[1], train__path=path)
    train_sweep(config, store)
    check_against_single_runs(config, store, tmp_path)


def test_every_member_is_what_it_would_be_alone(store, straight, tmp_path):
    assert sizes(members(straight[0])) == [2, 1, 1]
    check_against_single_runs(straight[0], store, tmp_path)


def check_against_single_runs(config, store, tmp_path):
    for member in members(config):
        alone = dataclasses.replace(member, run_dir=str(tmp_path / "alone" / name_of(member)))
        trained = loop.train(alone, store)
        step = checkpoints_of(member) / str(trained.step)
        assert steps_in(step.parent)[-1] == trained.step == (17 if "tokens" in name_of(member) else 30)
        lines, expected = (read_metrics(checkpoints_of(c).parent / "metrics.jsonl") for c in (member, alone))
        assert read_meta(step).fingerprints == fingerprints(trained.state), name_of(member)
        assert [line["step"] for line in lines] == [line["step"] for line in expected]
        for got, want in zip(lines, expected, strict=True):
            assert got.keys() == want.keys()
            assert {k: got[k] for k in got if k not in MEASURED} == {k: want[k] for k in want if k not in MEASURED}


def test_the_disturbed_moments_exist(straight):
    config, _ = straight
    lines = {name_of(m): read_metrics(checkpoints_of(m).parent / "metrics.jsonl") for m in members(config)}
    first, second = (lines[name] for name in SHARING)
    assert sum(line.get("resampled", 0) for line in first + second) > 0
    assert any((a["aux"] > 0) != (b["aux"] > 0) for a, b in zip(first, second, strict=True)), "one has dead features, one not"


@pytest.mark.parametrize("stop", [16, *slow(3, 15, 17, 23)])
def test_preempted_and_resumed_is_bitwise_equal(store, straight, tmp_path, monkeypatch, stop):
    config = sweep_config(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(loop.Preemption, "requested", lambda self, step: step == stop)
        with pytest.raises(Preempted, match=f"stopped at step {stop} of 30"):
            train_sweep(config, store)
    train_sweep(config, store)
    assert final(config) == straight[1]
    for member in members(config):
        steps = [line["step"] for line in read_metrics(checkpoints_of(member).parent / "metrics.jsonl")]
        assert steps == sorted(set(steps)) and steps[-1] == (17 if "tokens" in name_of(member) else 30)


@pytest.mark.parametrize("saves", [6, *slow(0, 1, 3, 4, 5, 8, 9, 10)])
def test_killed_between_the_checkpoints_of_one_step_is_bitwise_equal(store, straight, tmp_path, monkeypatch, saves):
    """At the n-th checkpoint of the run (several SAEs save at the same step) the power goes."""
    config, begun = sweep_config(tmp_path / "run"), []
    save = Checkpoints.save

    def crashing(self, *args):
        if len(begun) == saves:
            raise RuntimeError("power cut")
        begun.append(self)
        save(self, *args)
        self.wait()

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", crashing)
        with pytest.raises(RuntimeError, match="power cut"):
            train_sweep(config, store)
    train_sweep(config, store)
    assert final(config) == straight[1]


def test_a_finished_sweep_starts_nothing(store, straight, monkeypatch):
    def refuse(*_):
        raise AssertionError("a step is made")

    monkeypatch.setattr(loop, "shared_step", refuse)
    outcomes = train_sweep(straight[0], store)
    assert [(o.step, o.trouble) for o in outcomes] == [(30, ""), (30, ""), (30, ""), (17, "")]


def test_members_stand_on_their_own(store, straight, tmp_path):
    from saejax.formats.release import release
    for member in members(straight[0]):
        run = checkpoints_of(member).parent
        sae, out = saejax.load(run), release(saejax.load(run), tmp_path / name_of(member))
        width = D_IN if member.sae.hookpoint == HOOKPOINT else WIDTHS[TARGET]
        x = np.random.default_rng(0).standard_normal((5, width)).astype(np.float32)
        np.testing.assert_array_equal(sae.encode(x), saejax.load(out).encode(x))
        assert sae.cfg.d_sae == member.sae.d_sae and sae.cfg.hookpoint == member.sae.hookpoint
        assert loop.train(member, store).step == total_steps(member)


def test_a_member_that_is_ahead_of_all_others_is_named(store, tmp_path, monkeypatch):
    config = sweep_config(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(loop.Preemption, "requested", lambda self, step: step == 23)
        with pytest.raises(Preempted):
            loop.train(members(config)[2], store)
    with pytest.raises(CheckpointError, match=r"steps \[20, 23\] are not among those of .*finish it first with `saejax train"):
        train_sweep(config, store)


def test_a_diverging_member_is_left_behind(store, tmp_path):
    config = sweep_config(tmp_path / "run", ("train.lr=0.003", "train.lr=1e30"), train__clip=None)
    good, bad = train_sweep(config, store)
    assert (good.step, good.trouble) == (30, "") and bad.step < 30 and "not finite in 10 steps in a row" in bad.trouble
    assert np.isfinite(np.asarray(saejax.load(bad.paths.root).W_dec)).all()
    assert [o.step for o in train_sweep(config, store)] == [30, bad.step], "it stays where it was stopped"


DIVERGING = ("train.lr=0.003", "train.lr=1e30", "train.lr=0.001", "recipe=relu sae.penalty_coef=0.1 train.lr=1e30")


@pytest.mark.slow
def test_a_diverging_member_stops_alone(store, tmp_path, capsys):
    config = sweep_config(tmp_path / "run", DIVERGING, train__clip=None)
    outcomes = train_sweep(config, store)
    assert [bool(o.trouble) for o in outcomes] == [False, True, False, True]
    assert [o.step == 30 for o in outcomes] == [True, False, True, False]
    assert "not finite in 10 steps in a row" in outcomes[1].trouble and outcomes[1].trouble in capsys.readouterr().err
    for o in outcomes:
        assert np.isfinite(np.asarray(saejax.load(o.paths.root).W_dec)).all()
    alone = loop.train(dataclasses.replace(members(config)[0], run_dir=str(tmp_path / "alone")), store)
    assert final(config)[name_of(members(config)[0])] == fingerprints(alone.state) and alone.step == 30


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 7, 23])
def test_a_diverged_member_does_not_hinder_resuming(store, tmp_path, monkeypatch, stop):
    straight, again = (sweep_config(tmp_path / name, DIVERGING, train__clip=None) for name in "ab")
    outcomes = train_sweep(straight, store)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Preemption, "requested", lambda self, step: step == stop)
        with pytest.raises(Preempted):
            train_sweep(again, store)
    assert [(o.step, bool(o.trouble)) for o in train_sweep(again, store)] == [(o.step, bool(o.trouble)) for o in outcomes]
    assert final(again) == final(straight)


def test_members_of_equal_shape_are_compiled_once(store, tmp_path, monkeypatch):
    traced, one_step = [], step.one_step
    monkeypatch.setattr(step, "one_step", lambda config, *given: traced.append(config) or one_step(config, *given))
    config = sweep_config(tmp_path / "run", (*(f"train.lr={lr} seed={lr}" for lr in (1, 2, 3)), "sae.k=2"), train__tokens=3 * 32)
    train_sweep(config, store)
    assert [c.sae.k for c in traced] == [4, 2]


@pytest.mark.slow
def test_members_of_equal_shape_with_other_penalties_are_what_each_would_be_alone(store, tmp_path):
    variations = ("sae.penalty_coef=0.1", "sae.penalty_coef=0.4", "train.target_l0=6", "train.target_l0=9",
                  "train.lr=0.001 train.tokens=544")
    config = make_config("relu", tmp_path / "run", sweep__variations=variations, **OPTIONS)
    assert sizes(members(config)) == [2, 2, 1]
    train_sweep(config, store)
    check_against_single_runs(config, store, tmp_path)
    assert len({str(prints) for prints in final(config).values()}) == 5


def sizes(configs, widths=WIDTHS):
    """How many share a compiled step, in order of the first."""
    shapes = [(alike(config), SAESpec.from_options(config.sae, widths)) for config in configs]
    return [shapes.count(shape) for shape in dict.fromkeys(shapes)]


def test_who_shares_a_step(tmp_path):
    lrs = tuple(f"train.lr={lr}" for lr in (0.1, 0.2, 0.3))
    different = (*lrs, "sae.k=2", "train.beta2=0.5", "sae.aux_k=8", "train.tokens=64", "seed=9", f"sae.hookpoint={TARGET}")
    configs = members(sweep_config(tmp_path, different))
    assert sizes(configs) == [4, 1, 1, 1, 1, 1] and sizes(configs, dict.fromkeys(WIDTHS, 16)) == [5, 1, 1, 1, 1]


@pytest.mark.parametrize("kind, variations, expected", [
    ("relu", ("sae.penalty_coef=1", "sae.penalty_coef=2", "train.target_l0=8", "train.target_l0=9"), [2, 2]),
    ("jumprelu", ("sae.penalty_coef=1", "sae.penalty_coef=2", "sae.k=9", "seed=3"), [4]),
    ("topk", ("sae.k=8", "sae.k=9"), [1, 1]),
])
def test_what_may_differ_in_a_shared_step(tmp_path, kind, variations, expected):
    assert sizes(members(make_config(kind, tmp_path, sweep__variations=variations))) == expected


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(config file, run directory) of a sweep that has not been started."""
    folder = tmp_path_factory.mktemp("command")
    model, text = tiny.write_model(folder / "model"), tiny.write_text(folder / "text")
    config = tiny.write_config(folder / "config.py", model, text, folder / "run",
                               "c.sweep.product = ('sae.k=4,8',)\nc.log.tensorboard = False")
    return config, folder / "run"


@pytest.fixture(scope="module")
def finished(written):
    """The same, made by the command itself."""
    assert main(["run", f"--config={written[0]}"]) == 0
    return written


NAMES = ["k=4", "k=8"]


@pytest.mark.slow
def test_a_run_of_a_sweep(finished, monkeypatch, capsys):
    config, run = finished
    monkeypatch.setattr("saejax.runs.evaluation.evaluate_all", None)  # nothing is measured again
    assert main(["run", str(run)]) == 0
    out = capsys.readouterr().out
    header = out.splitlines()[0]
    assert [header.index(str(run / name)) for name in NAMES] == sorted(header.index(str(run / name)) for name in NAMES)
    assert re.search(r"^L0 +4 .* 8 ", out, re.MULTILINE)
    for name in NAMES:
        assert f"report   {run / name / 'report.html'}" in out and (run / name / "report.html").is_file()
        assert json.loads((run / name / "config.json").read_text())["harvest"]["store"] == str(run / "store")
        assert not (run / name / "store").exists()


@pytest.mark.slow
def test_other_commands_on_a_sweep(finished, tmp_path, capsys):
    _, run = finished
    everything = sorted(str(p) for p in run.iterdir())
    assert main(["eval", *everything, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert [f["run"] for f in figures] == [str(run / name) for name in NAMES]
    assert main(["eval", str(run), "--json"]) == 0 and json.loads(capsys.readouterr().out) == figures
    assert main(["inspect", *(str(run / name) for name in NAMES)]) == 0
    assert main(["inspect", str(run)]) == 0 and "sweep" in capsys.readouterr().out
    assert main(["train", str(run / NAMES[0])]) == 0 and main(["run", str(run / NAMES[1])]) == 0
    assert main(["release", str(run / NAMES[0]), f"--out={tmp_path / 'sae'}"]) == 0
    assert main(["train", str(run)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-2:]] == ["trained"] * 2


@pytest.mark.slow
def test_a_moved_sweep_is_still_one(finished, tmp_path, capsys):
    import shutil
    _, run = finished
    shutil.copytree(run, tmp_path / "elsewhere")
    shutil.move(run, run.with_name("away"))
    try:
        assert main(["eval", str(tmp_path / "elsewhere"), "--contexts=4"]) == 0
        assert main(["train", str(tmp_path / "elsewhere" / NAMES[1])]) == 0
    finally:
        shutil.move(run.with_name("away"), run)


@pytest.mark.slow
def test_a_diverging_member_gives_an_exit_code(finished, tmp_path, capsys):
    config, run = finished
    code = main(["run", f"--config={config}", f"--config.run_dir={tmp_path / 'run'}", f"--config.harvest.store={run / 'store'}",
                 "--config.sweep.product=('train.lr=1e-3,1e30',)", "--config.train.clip=none"])
    out, err = capsys.readouterr()
    assert code == 2 and err.splitlines()[-1].startswith(f"saejax: error: {tmp_path / 'run' / 'lr=1e+30'}: loss or gradient not")
    assert (tmp_path / "run" / "lr=0.001" / "report.html").is_file() and "lr=0.001" in out.splitlines()[0]
    assert not (tmp_path / "run" / "lr=1e+30" / "report.html").exists()


def test_mistakes_are_one_line(written, tmp_path, capsys):
    config, _ = written
    assert main(["train", f"--config={config}", "--config.sweep.product=('train.batch=32,64', 'sae.k=4,4000')"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "config.sweep.product: train.batch cannot vary: all SAEs of a sweep read one stream" in err
