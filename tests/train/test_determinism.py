"""`train.deterministic`: what reaches the compiler, where it changes nothing, and what is said and recorded."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from saejax.base import sharding
from saejax.base.fingerprints import fingerprints
from saejax.base.records import MeshOptions
from saejax.config import TrainOptions
from saejax.config.recipes import WITH_K
from saejax.plan.compiled import lowered
from saejax.runs.inspect import inspect_path
from saejax.sae import SAESpec
from saejax.train import determinism, loop
from saejax.train.checkpoint import machine_of
from saejax.train.state import initial_state
from saejax.train.step import make_step, takes_pairs

from .synthetic import D_IN, KINDS, VARIANTS, WIDTHS, make_config, make_store

CPU = {"jaxlib": "0.10.2", "platform": "cpu", "device": "cpu", "runtime": "cpu"}
GPU = {"jaxlib": "0.11.1", "platform": "gpu", "device": "NVIDIA H100 80GB HBM3", "runtime": "cuda 12090"}
SCATTER = re.compile(r'"stablehlo\.scatter"\(.*?unique_indices = (true|false).*?\^bb0\([^\n]*\n(.*?)stablehlo\.return', re.S)


def unordered(text):
    """The float scatter-adds of a program as a GPU's compiler is given it, whose indices may repeat."""
    return [body for unique, body in SCATTER.findall(text) if unique == "false" and re.search(r"stablehlo\.add .*f32", body)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("determinism") / "store")


def deterministic(kind, path, **options):
    return make_config(kind, path, train__deterministic=True, **options)


def state_and_rows(config, store, mesh):
    spec, rows = SAESpec.from_options(config.sae, WIDTHS), np.random.default_rng(0).standard_normal((32, D_IN), np.float32)
    state = initial_state(config, spec, [store.stats(name) for name in config.sae.hookpoints], rows, mesh)
    return spec, state, sharding.place(rows, sharding.sharding(mesh, "rows_at_rest", None))


@pytest.mark.parametrize("named", [False, True])
def test_options_reach_the_compiler_on_a_gpu_only(store, tmp_path, monkeypatch, named):
    """The compiler itself writes down the options of a program; those of GPUs are known to every build of jaxlib."""
    config, mesh = deterministic("topk", tmp_path), sharding.single_device_mesh()
    spec, state, rows = state_and_rows(config, store, mesh)
    found = {}
    for platform in ("cpu", "gpu"):
        with monkeypatch.context() as patch, jax.set_mesh(mesh):
            if named:
                step = make_step(config, spec, 10, platform)
            else:
                patch.setattr(jax, "default_backend", lambda name=platform: name)
                step = make_step(config, spec, 10)
            dump = tmp_path / platform
            step.lower(state, rows).compile(compiler_options={"xla_dump_to": str(dump)})
            found[platform] = next(dump.glob("*debug_options")).read_text()
    assert not any(name in found["cpu"] for name in determinism.OPTIONS)
    for name, value in determinism.OPTIONS.items():
        assert f"{name}: {str(value).lower()}\n" in found["gpu"]


def test_changes_nothing_on_a_cpu(store, tmp_path):
    options = {"train__resample__every_tokens": 24 * 32, "train__resample__sample_rows": 128, "sae__dead_tokens": 64}
    bits = [fingerprints(loop.train(make("topk", tmp_path / make.__name__, **options), store).state)
            for make in (make_config, deterministic)]
    assert bits[0] == bits[1]


@pytest.mark.parametrize("kind", (*KINDS, *VARIANTS))
def test_a_deterministic_step_has_no_unordered_additions_on_a_gpu(tmp_path, kind):
    """And no operation that the compiler would refuse."""
    config = deterministic(kind, tmp_path, sae__d_sae=256, **({"train__path": "auto"} if kind.startswith("pairs") else {}))
    spec = SAESpec.from_options(config.sae, WIDTHS)
    text = lowered(config, spec, sharding.make_mesh(MeshOptions(1, 4), jax.devices()[:4]), "cuda").as_text()
    assert "select_and_scatter" not in text and not unordered(text)
    if config.sae.aux_k and config.sae.kind in WITH_K:
        assert len(SCATTER.findall(text)) >= 3, "gradients of the rows of dead features"


def test_the_sparse_path_has_unordered_additions(tmp_path):
    config = make_config("topk", tmp_path, train__path="sparse")
    text = lowered(config, SAESpec.from_options(config.sae, WIDTHS), sharding.single_device_mesh(), "cuda").as_text()
    assert len(unordered(text)) >= 3


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_takes_the_dense_path_on_a_gpu_unless_told(tmp_path, platform):
    for on in (False, True):
        wide = make_config("topk", tmp_path, train__deterministic=on, sae__d_sae=2**20)
        assert takes_pairs(wide, wide.sae, platform) == (not on or platform == "cpu")
        always = dataclasses.replace(wide, train=dataclasses.replace(wide.train, path="sparse"))
        assert takes_pairs(always, always.sae, platform)


@pytest.mark.parametrize("platform, version, slow", [
    ("gpu", "0.10.2", True), ("gpu", "0.11.0", True), ("cuda", "0.11.0.dev20260701", True), ("gpu", "0.11.1", False),
    ("gpu", "0.12.0.1", False), ("gpu", "1.0", False), ("cpu", "0.10.2", False), ("tpu", "0.10.2", False)])
def test_slow_scatters_are_named(platform, version, slow):
    said = determinism.slow_scatters(platform, version)
    assert bool(said) == slow
    assert not slow or (version in said and "0.11.1" in said and "Python 3.12" in said)


def test_loops_are_named_where_there_are_any():
    asked = TrainOptions(deterministic=True, path="sparse")
    assert "train.path" in determinism.looped_scatters(asked, "gpu")
    assert "train.optimizer" in determinism.looped_scatters(TrainOptions(deterministic=True, optimizer="lazy"), "gpu")
    assert not determinism.looped_scatters(asked, "cpu")
    assert not determinism.looped_scatters(TrainOptions(path="sparse"), "gpu")
    assert not determinism.looped_scatters(TrainOptions(deterministic=True), "gpu")


def test_a_move_is_named_where_bits_are_promised():
    newer = {**GPU, "jaxlib": "0.12.0"}
    assert "jaxlib 0.11.1 -> 0.12.0" in determinism.moved(True, GPU, newer)
    assert "device" not in determinism.moved(True, GPU, newer)
    assert "platform gpu -> cpu" in determinism.moved(False, GPU, CPU)
    assert not determinism.moved(False, GPU, newer), "nothing was promised"
    assert not determinism.moved(True, GPU, GPU)
    assert not determinism.moved(True, {}, GPU), "a checkpoint from before machines were recorded"


def test_what_is_promised():
    assert "ends in the same bits" in determinism.promise(False, CPU)
    assert "ends in the same bits" in determinism.promise(True, GPU)
    assert "does not end in the same bits" in determinism.promise(False, GPU)
    assert determinism.promise(True, {}) == ""


def test_a_run_records_its_machine_and_says_when_it_goes_on_elsewhere(store, tmp_path, monkeypatch, capsys):
    config, here = deterministic("relu", tmp_path / "run"), determinism.machine()
    with monkeypatch.context() as patch:
        patch.setattr(loop.Preemption, "requested", lambda self, step: step == 20)
        patch.setattr(determinism, "machine", lambda: {**here, "jaxlib": "0.0.1"})
        with pytest.raises(loop.Preempted):
            loop.train(config, store)
    assert "resumed on other" not in capsys.readouterr().err
    loop.train(config, store)
    err = capsys.readouterr().err
    assert err.count(f"(jaxlib 0.0.1 -> {here['jaxlib']})") == 1
    assert machine_of(tmp_path / "run" / "checkpoints" / "50") == here
    facts = inspect_path(tmp_path / "run").facts
    assert facts["deterministic"] is True and "ends in the same bits" in facts["resume"]
    assert inspect_path(tmp_path / "run" / "checkpoints" / "50").facts["written_on"] == here
