"""Stopped anywhere and started again, a run ends in the same bits; whatever is damaged is named and never used."""

import itertools
import json
import os
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import saejax
from saejax.base import sharding
from saejax.base.errors import CheckpointCorruptError, CheckpointError, Preempted, StoreError
from saejax.base.fingerprints import fingerprints
from saejax.base.logs import read_metrics
from saejax.base.records import MeshOptions
from saejax.sae import SAESpec
from saejax.train import loop
from saejax.train.checkpoint import read_meta, restore_step, steps_in
from saejax.train.state import abstract_state

from .synthetic import D_IN, HOOKPOINT, KINDS, VARIANTS, WIDTHS, OnDemand, kinds, make_config, make_store

# 336 unmasked rows and batches of 32: the epoch edge lies inside step 11. Resampling happens after step 24.
OPTIONS = {"train__resample__every_tokens": 24 * 32, "train__resample__sample_rows": 128, "sae__d_sae": 128,
           "sae__dead_tokens": 64, "sae__penalty_coef": 30.0}


def options(kind):
    """Features of kinds that start strong die within 50 steps only at a larger learning rate; not all of them should."""
    lr = 0.1 if kind == "jumprelu_tanh" else 0.03
    return OPTIONS | ({} if kind in ("relu", "topk") else {"train__lr": lr, "sae__penalty_coef": 0.3})


def moments(steps, typical):
    """The two oldest kinds at every step; the others at a typical one, some of them in the slow tier."""
    core = ("batchtopk",)
    return [*itertools.product(("relu", "topk"), steps),
            *(pytest.param(kind, typical, marks=() if kind in core else pytest.mark.slow) for kind in (*KINDS[2:], *VARIANTS))]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("resume") / "store")


@pytest.fixture(scope="module")
def straight(store, tmp_path_factory):
    """Final fingerprints of runs that nobody disturbed, and the run directories."""
    def make(kind):
        run_dir = tmp_path_factory.mktemp("straight") / kind
        trained = loop.train(make_config(kind, run_dir, **options(kind)), store)
        return fingerprints(trained.state), run_dir

    return OnDemand(make)


@pytest.mark.slow
def test_a_run_goes_on_on_the_other_path(store, tmp_path, monkeypatch):
    paths = [make_config("topk", tmp_path / "run", train__path=path) for path in ("dense", "sparse")]
    with monkeypatch.context() as patch:
        patch.setattr(loop.Preemption, "requested", lambda self, step: step == 20)
        with pytest.raises(Preempted):
            loop.train(paths[0], store)
    resumed = loop.train(paths[1], store).state
    expected = loop.train(make_config("topk", tmp_path / "straight", train__path="dense"), store).state
    assert int(resumed.step) == int(expected.step) == 50
    for a, b in zip(jax.tree.leaves(resumed.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5)


def finish(config, store):
    return fingerprints(loop.train(config, store).state)


@pytest.mark.parametrize("kind", kinds("relu", "topk", "batchtopk"))
def test_the_disturbed_moments_exist(straight, kind):
    lines = read_metrics(straight[kind][1] / "metrics.jsonl")
    assert sum(line.get("resampled", 0) for line in lines) > 0, "a resampling step replaced something"
    assert read_meta(straight[kind][1] / "checkpoints" / "50").counters.stream.epochs[0] >= 3


@pytest.mark.parametrize("kind, stop", moments([1, 10, 11, 24, 25, 49], 25))
def test_preempted_and_resumed_is_bitwise_equal(store, straight, tmp_path, monkeypatch, kind, stop):
    config = make_config(kind, tmp_path / "run", **options(kind))
    with monkeypatch.context() as patch:
        patch.setattr(loop.Preemption, "requested", lambda self, step: step == stop)
        with pytest.raises(Preempted, match=f"stopped at step {stop} of 50"):
            loop.train(config, store)
    assert finish(config, store) == straight[kind][0]
    steps = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert steps == sorted(set(steps)) and steps[-1] == 50


@pytest.mark.parametrize("kind, crash", moments([3, 17, 44], 44))
def test_crashed_and_resumed_is_bitwise_equal(store, straight, tmp_path, monkeypatch, kind, crash):
    config = make_config(kind, tmp_path / "run", **options(kind))
    step = loop._Log.step

    def crashing(self, n, metrics):
        if n == crash:
            raise RuntimeError("power cut")
        step(self, n, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Log, "step", crashing)
        with pytest.raises(RuntimeError, match="power cut"):
            loop.train(config, store)
    assert finish(config, store) == straight[kind][0]


def test_a_finished_run_starts_nothing(store, straight):
    before = (straight["topk"][1] / "metrics.jsonl").read_bytes()
    assert finish(make_config("topk", straight["topk"][1], **OPTIONS), store) == straight["topk"][0]
    assert (straight["topk"][1] / "metrics.jsonl").read_bytes() == before


def test_every_mesh_restores_the_same_bits(straight):
    config = make_config("topk", straight["topk"][1], **OPTIONS)
    spec = SAESpec.from_options(config.sae, WIDTHS)
    for shape in ((1, 1), (1, 8), (8, 1), (2, 4)):
        mesh = sharding.make_mesh(MeshOptions(*shape), jax.devices()[: shape[0] * shape[1]])
        state, _ = restore_step(straight["topk"][1] / "checkpoints" / "50", abstract_state(config, spec, mesh))
        assert fingerprints(state) == straight["topk"][0]
        assert state.params.W_enc.sharding.mesh.shape == mesh.shape


def test_goes_on_on_another_mesh(store, straight, tmp_path, monkeypatch):
    config = make_config("topk", tmp_path / "run", **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Preemption, "requested", lambda self, step: step == 20)
        with pytest.raises(Preempted):
            loop.train(config, store)
    loop.train(make_config("topk", tmp_path / "run", mesh__data=4, mesh__dict=2, **OPTIONS), store)
    got, want = (read_metrics(d / "metrics.jsonl")[-1]["loss"] for d in (tmp_path / "run", straight["topk"][1]))
    assert got == pytest.approx(want, rel=1e-4)


def checkpoint_files(step_dir):
    return sorted(p for p in step_dir.rglob("*") if p.is_file())


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_equal_or_a_typed_error(straight, tmp_path, damage):
    """Whatever happens to any one file of a checkpoint: the same values come back, or an error names the checkpoint."""
    source = straight["topk"][1] / "checkpoints" / "50"
    config = make_config("topk", tmp_path, **OPTIONS)
    mesh = sharding.make_mesh(MeshOptions(1, 8))
    abstract = abstract_state(config, SAESpec.from_options(config.sae, WIDTHS), mesh)
    refused = 0
    for file in checkpoint_files(source):
        step = tmp_path / "50"
        shutil.rmtree(step, ignore_errors=True)
        shutil.copytree(source, step)
        target = step / file.relative_to(source)
        data = bytearray(target.read_bytes())
        if damage == "delete":
            target.unlink()
        elif damage == "truncate":
            target.write_bytes(data[: len(data) // 2])
        else:
            data[int(len(data) * 0.6)] ^= 4
            target.write_bytes(data)
        try:
            state, meta = restore_step(step, abstract)
        except CheckpointError as error:
            assert str(step) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert fingerprints(state) == straight["topk"][0], file
            assert meta == read_meta(source)
    assert refused >= 3


def test_damaged_newest_is_set_aside_and_the_older_one_used(store, straight, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(straight["topk"][1], run)
    shutil.rmtree(run / "checkpoints" / "50" / "state" / "d")
    config = make_config("topk", run, **OPTIONS)
    assert finish(config, store) == straight["topk"][0]
    assert (run / "checkpoints" / "corrupt-50").is_dir()
    assert "corrupt-50" in capsys.readouterr().err


def test_a_run_whose_checkpoints_all_fail_does_not_start_over(store, straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight["topk"][1], run)
    good = shutil.copytree(run / "checkpoints" / "50", tmp_path / "good")
    for step in steps_in(run / "checkpoints"):
        shutil.rmtree(run / "checkpoints" / str(step) / "state" / "d")
    config = make_config("topk", run, **OPTIONS)
    for _ in range(2):  # the second start finds no step at all
        with pytest.raises(CheckpointError, match=r"none of the checkpoints verifies \(corrupt-40, corrupt-50\); repair one"):
            loop.train(config, store)
    shutil.rmtree(run / "checkpoints" / "corrupt-50")
    shutil.move(good, run / "checkpoints" / "50")
    assert finish(config, store) == straight["topk"][0]


@pytest.mark.parametrize("error, raised", [
    (MemoryError(), MemoryError),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4294967296 bytes."), jax.errors.JaxRuntimeError),
    (TimeoutError("no answer"), CheckpointError),
    (OSError(24, "Too many open files"), CheckpointError),
    (PermissionError(13, "Permission denied"), CheckpointError),
    (ValueError("PERMISSION_DENIED: Error opening file"), CheckpointError),
])
def test_trouble_that_is_not_damage_sets_nothing_aside(store, straight, tmp_path, monkeypatch, error, raised):
    run = tmp_path / "run"
    shutil.copytree(straight["topk"][1], run)

    def fail(*_, **__):
        raise error

    for method in ("restore", "metadata"):
        with monkeypatch.context() as patch:
            patch.setattr(ocp.PyTreeCheckpointHandler, method, fail)
            with pytest.raises(raised) as caught:
                loop.train(make_config("topk", run, **OPTIONS), store)
        assert not isinstance(caught.value, CheckpointCorruptError)
    assert steps_in(run / "checkpoints") == [40, 50] and not list((run / "checkpoints").glob("corrupt-*"))


def test_strays_in_the_checkpoint_directory_are_ignored(store, straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight["topk"][1], run)
    (run / "checkpoints" / "60.orbax-checkpoint-tmp").mkdir()
    (run / "checkpoints" / "70").mkdir()
    (run / "checkpoints" / "notes.txt").write_text("mine")
    shutil.copytree(run / "checkpoints" / "50", run / "checkpoints" / "80",
                    ignore=shutil.ignore_patterns("d", "commit_success.txt"))
    assert finish(make_config("topk", run, **OPTIONS), store) == straight["topk"][0]
    assert (run / "checkpoints" / "notes.txt").exists()


def test_keeps_newest_and_every_nth(straight, store, tmp_path):
    assert steps_in(straight["topk"][1] / "checkpoints") == [40, 50]
    loop.train(make_config("topk", tmp_path / "run", checkpoint__keep_every_tokens=20 * 32, **OPTIONS), store)
    assert steps_in(tmp_path / "run" / "checkpoints") == [20, 40, 50]


def test_a_run_directory_belongs_to_one_config(store, straight):
    with pytest.raises(CheckpointError, match=r"another config \(train.lr: 0.003 -> 0.1\)"):
        loop.train(make_config("topk", straight["topk"][1], train__lr=0.1, **OPTIONS), store)


def test_another_store_is_refused(straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight["topk"][1], run)
    other = make_store(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="other data .*store_digest"):
        loop.train(make_config("topk", run, **OPTIONS), other)


def test_width_of_the_store_must_be_the_configs(store, tmp_path):
    with pytest.raises(StoreError, match=f"config.sae.d_in is 17, the store's {HOOKPOINT} is {D_IN} wide"):
        loop.train(make_config("topk", tmp_path / "run", sae__d_in=17), store)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key, value, message", [
    ("lm__model", "gpt2", "config.lm.model is 'gpt2', the store was harvested from 'synthetic'"),
    ("text__context", 16, "config.text.context is 16, the store's contexts have 8 tokens"),
])
def test_a_store_of_something_else_is_refused(store, tmp_path, key, value, message):
    with pytest.raises(StoreError, match=message):
        loop.train(make_config("topk", tmp_path / "run", **{key: value}), store)


@pytest.mark.parametrize("kind", kinds("relu", "topk", "batchtopk"))
def test_release_run_and_checkpoint_are_the_same_sae(straight, kind):
    from saejax.formats.release import release
    run = straight[kind][1]
    out = release(saejax.load(run), run / "release")
    x = np.random.default_rng(0).standard_normal((5, 3, D_IN)).astype(np.float32)
    values = [np.asarray(saejax.load(p).encode(x)) for p in (run, run / "checkpoints" / "50", out)]
    np.testing.assert_array_equal(values[0], values[1])
    np.testing.assert_array_equal(values[0], values[2])
    assert kind != "topk" or (values[0] > 0).sum(-1).max() <= 4
    mid = release(saejax.load(run / "checkpoints" / "40"), run / "mid")
    assert np.abs(np.asarray(saejax.load(mid).encode(x)) - values[0]).max() > 0


def test_a_config_in_a_run_directory_is_never_executed(straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight["topk"][1], run)
    (run / "config.py").write_text("open('pwned', 'w')")
    values = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(values | {"__reduce__": "os.system"}))
    with pytest.raises(saejax.base.errors.ConfigError, match="unknown key '__reduce__'"):
        saejax.load(run)
    assert not os.path.exists("pwned")
