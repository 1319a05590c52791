"""What a run of weeks needs: a trace of some steps, rates against the chips' peak, programs that need not be compiled again."""

import dataclasses
import gzip
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from jax import monitoring

from saejax.base import hardware
from saejax.base.errors import Preempted
from saejax.base.fingerprints import fingerprints
from saejax.base.logs import read_metrics
from saejax.config import differences
from saejax.train import compilation_cache, loop, rates
from saejax.train.profile import SETTLED, traces, window

from .synthetic import make_config, make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("long") / "store")


def stopped(config, store, monkeypatch, step):
    with monkeypatch.context() as patch:
        patch.setattr(loop.Preemption, "requested", lambda self, number: number == step)
        with pytest.raises(Preempted):
            loop.train(config, store)


def events(file: Path) -> list[dict]:
    return json.loads(gzip.open(file).read())["traceEvents"]


def test_the_steps_asked_for_are_traced_once(store, tmp_path, monkeypatch, capsys):
    config = make_config("topk", tmp_path / "run", train__profile=4, checkpoint__every_tokens=32 * 20)
    profile = tmp_path / "run" / "profile"
    stopped(config, store, monkeypatch, 18)
    [trace] = traces(profile)
    steps = [int(event["args"]["step_num"]) for event in events(trace) if event.get("name") == "train"]
    assert sorted(steps) == [11, 12, 13, 14]
    assert {"wait for rows", "wait for the step before"} <= {event.get("name") for event in events(trace)}
    assert list(profile.glob("plugins/profile/*/*.xplane.pb")), "what XProf reads"
    said = [line for line in capsys.readouterr().err.splitlines() if "profile of steps" in line]
    assert len(said) == 1 and "steps 11 to 14" in said[0] and str(trace) in said[0]
    loop.train(config, store)
    assert traces(profile) == [trace] and "holds a profile already" in capsys.readouterr().err


def test_a_trace_that_is_cut_short_is_whole(store, tmp_path, monkeypatch):
    config = make_config("topk", tmp_path / "run", train__profile=30)
    stopped(config, store, monkeypatch, 15)
    [trace] = traces(tmp_path / "run" / "profile")
    assert [event for event in events(trace) if event.get("name") == "train"]


def test_saes_of_a_sweep_share_one_trace_and_the_devices(store, tmp_path):
    configs = [make_config(kind, tmp_path / kind, train__profile=2) for kind in ("relu", "topk")]
    loop.train_all(configs, store)
    assert len(traces(tmp_path / "profile")) == 1 and not (tmp_path / "relu" / "profile").exists()
    for kind in ("relu", "topk"):
        line = read_metrics(tmp_path / kind / "metrics.jsonl")[-2]
        of_both = 2 * 10 * 16 * 64 / 8  # topk is dense here
        assert line["flops_per_second"] == pytest.approx(of_both * line["tokens_per_second"], rel=1e-6)


def test_a_profile_changes_no_bit(store, tmp_path):
    runs = [loop.train(make_config("topk", tmp_path / str(n), train__profile=n), store) for n in (0, 3)]
    assert fingerprints(runs[0].state) == fingerprints(runs[1].state)


@pytest.mark.parametrize("steps, start, total, every, expected", [
    (0, 0, 1000, 100, range(0)),
    (5, 0, 1000, 100, range(11, 16)),            # after the first steps
    (5, 0, 1000, 12, range(11, 16)),             # no room between checkpoints
    (5, 0, 1000, 15, range(26, 31)),             # else not across one: step 15 is saved
    (5, 400, 1000, 100, range(411, 416)),        # a resumed run
    (5, 0, 12, 100, range(8, 13)),               # a short one
    (5, 0, 3, 100, range(2, 4)),
    (5, 0, 1, 100, range(0)),
])
def test_which_steps_are_traced(steps, start, total, every, expected):
    assert list(window(steps, start, total, every)) == list(expected) and SETTLED == 10


def test_utilisation_is_given_where_the_peak_is_known(monkeypatch):
    kinds = {("gpu", "NVIDIA H100 80GB HBM3"): 9.89e14, ("gpu", "NVIDIA H200"): 9.89e14, ("tpu", "TPU v5 lite"): 1.97e14,
             ("tpu", "TPU v5p"): 4.59e14, ("gpu", "NVIDIA H100 PCIe"): None, ("gpu", "NVIDIA H100 NVL"): None,
             ("gpu", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"): None, ("gpu", "NVIDIA A100-SXM4-40GB"): None, ("cpu", "cpu"): None}
    devices = {key: SimpleNamespace(platform=key[0], device_kind=key[1]) for key in kinds}
    assert {key: hardware.peak(device) for key, device in devices.items()} == kinds
    clock, waited = iter([10.0, 12.0]), iter([1.0, 1.5])
    monkeypatch.setattr(rates.time, "monotonic", lambda: next(clock))
    reader = rates.Rates(32, lambda: 1e14, lambda: next(waited), devices["gpu", "NVIDIA H200"])
    assert reader.at(1) == {}
    found = reader.at(5)
    assert found == {"tokens_per_second": 64.0, "data_wait_share": 0.25, "flops_per_second": 2e14, "mfu": pytest.approx(2 / 9.89)}
    assert rates.on_bar(found) == {"mfu": found["mfu"]}


def test_a_cpu_has_flops_and_no_utilisation(store, tmp_path):
    config = make_config("relu", tmp_path / "run", mesh__data=2, mesh__dict=4)
    loop.train(config, store)
    line = read_metrics(tmp_path / "run" / "metrics.jsonl")[-2]
    by_hand = 10 * 16 * 64 / 8 * line["tokens_per_second"]  # 2 x (2 + 3) D F, of each of 8 devices
    assert line["flops_per_second"] == pytest.approx(by_hand, rel=1e-6)
    assert "mfu" not in line and "peak_device_bytes" not in line


@pytest.fixture
def asked():
    """Events of jax's cache, so far: a program is asked for, and is there."""
    counted = []
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    monitoring.register_event_listener(lambda event, **_: counted.append(event.split("/")[-1]))
    yield counted
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def kept_here(monkeypatch):
    """As where several processes train on chips."""
    monkeypatch.setattr(compilation_cache, "place", lambda run_dir: run_dir.absolute().parent / compilation_cache.NAME)


@pytest.mark.slow
def test_a_run_that_loads_its_programs_resumes_in_the_same_bits(store, tmp_path, monkeypatch, asked):
    straight = fingerprints(loop.train(make_config("topk", tmp_path / "straight"), store).state)
    config = make_config("topk", tmp_path / "runs" / "run")
    kept_here(monkeypatch)
    stopped(config, store, monkeypatch, 16)
    folder = tmp_path / "runs" / compilation_cache.NAME
    programs = {file.name for file in folder.glob("*-cache")}
    assert any(name.startswith("jit_train_step") for name in programs)
    assert not (tmp_path / "runs" / "run" / compilation_cache.NAME).exists(), "nothing that runs lies in a run directory"
    shutil.copytree(config.run_dir, tmp_path / "runs" / "again")
    for run_dir in (config.run_dir, str(tmp_path / "runs" / "again")):
        jax.clear_caches()
        asked.clear()
        assert fingerprints(loop.train(dataclasses.replace(config, run_dir=run_dir), store).state) == straight
    assert asked.count("cache_hits") == asked.count("compile_requests_use_cache") >= 1, "nothing was compiled again"


@pytest.mark.slow
def test_half_an_entry_is_compiled_anew(store, tmp_path, monkeypatch, asked):
    config = make_config("topk", tmp_path / "a")
    kept_here(monkeypatch)
    ends = [fingerprints(loop.train(config, store).state)]
    for file in (tmp_path / compilation_cache.NAME).glob("jit_train_step*-cache"):
        file.write_bytes(file.read_bytes()[:100])
    jax.clear_caches()
    again = dataclasses.replace(config, run_dir=str(tmp_path / "b"))
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        ends.append(fingerprints(loop.train(again, store).state))
    assert ends[0] == ends[1]


def test_where_programs_are_kept(tmp_path, monkeypatch):
    run = tmp_path / "runs" / "run"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        assert compilation_cache.place(run) is None, "one process compiles in seconds"
        monkeypatch.setattr(jax, "process_count", lambda: 8)
        assert compilation_cache.place(run) == tmp_path / "runs" / ".compilation_cache" / "gpu"
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
        assert compilation_cache.place(run) is None, "a cache that jax was told of is left as it is"
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
        assert compilation_cache.place(run) is None, "collectives of CPUs do not work when they are loaded"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_profile_makes_no_other_run(tmp_path):
    a, b = make_config("topk", tmp_path / "run"), make_config("topk", tmp_path / "run", train__profile=20)
    assert differences(a, b) == []
