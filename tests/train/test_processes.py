"""Real processes: killed, terminated, several of them. Every wait has a deadline."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from saejax.base.errors import EXIT_PREEMPTED
from saejax.base.logs import read_metrics
from saejax.train.checkpoint import read_meta, steps_in
from saejax.train.profile import traces
from tests.processes import environment, free_port

from .synthetic import make_store

ROOT = Path(__file__).parent.parent.parent
OVERRIDES = {"train__resample__every_tokens": 24 * 32, "train__resample__sample_rows": 128, "sae__d_sae": 128,
             "sae__dead_tokens": 64, "sae__penalty_coef": 30.0, "checkpoint__every_tokens": 7 * 32, "log__every_steps": 1}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("processes") / "store").path


def launch(store, run_dir, kind="topk", processes=1, devices=4, slow=None, **overrides):
    port, env, jobs = free_port(), environment(devices), []
    for process in range(processes):
        options = {"store": str(store), "run_dir": str(run_dir), "kind": kind, "processes": processes, "process": process,
                   "devices": devices, "port": port, "overrides": OVERRIDES | overrides,
                   "slow_seconds": slow[process] if slow else 0}
        jobs.append(subprocess.Popen([sys.executable, "-m", "tests.train.worker", json.dumps(options)], cwd=ROOT, env=env,
                                     stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return jobs


def finish(jobs, deadline=170):
    outs, end = [], time.monotonic() + deadline
    try:
        for job in jobs:
            outs.append(job.communicate(timeout=max(1, end - time.monotonic())))
    finally:
        for job in jobs:
            job.kill()
    return [(job.returncode, *out) for job, out in zip(jobs, outs, strict=True)]


def fingerprints(results):
    values = []
    for code, out, err in results:
        assert code == 0, err[-3000:]
        values.append(json.loads(next(line for line in out.splitlines() if line.startswith("FINGERPRINTS"))[13:]))
    assert all(v == values[0] for v in values), "processes disagree on the state"
    return values[0]


def wait_for_step(run_dir, step, deadline=120):
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        lines = read_metrics(run_dir / "metrics.jsonl")
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached in {deadline} s")


def test_sigterm_saves_and_says_so(store, tmp_path):
    [job] = launch(store, tmp_path / "run", slow=[0.1])
    wait_for_step(tmp_path / "run", 3)
    job.send_signal(signal.SIGTERM)
    [(code, out, err)] = finish([job])
    assert code == EXIT_PREEMPTED, err[-3000:]
    step = steps_in(tmp_path / "run" / "checkpoints")[-1]
    assert f"stopped at step {step} of 50" in out and step < 50


@pytest.mark.slow
def test_two_processes_train_stop_together_and_resume_bitwise(store, tmp_path):
    straight = fingerprints(finish(launch(store, tmp_path / "straight", processes=2, devices=2, mesh__data=2, train__profile=3)))
    assert len(traces(tmp_path / "straight" / "profile")) == 1, "one of the processes writes"
    jobs = launch(store, tmp_path / "run", processes=2, devices=2, mesh__data=2, slow=[0.02, 0.1])
    wait_for_step(tmp_path / "run", 4)
    jobs[1].send_signal(signal.SIGTERM)
    results = finish(jobs)
    assert [code for code, _, _ in results] == [EXIT_PREEMPTED] * 2, results[0][2][-2000:] + results[1][2][-2000:]
    stops = {next(line for line in out.splitlines() if line.startswith("PREEMPTED")) for _, out, _ in results}
    assert len(stops) == 1, stops
    assert fingerprints(finish(launch(store, tmp_path / "run", processes=2, devices=2, mesh__data=2))) == straight


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_trains_on_the_same_rows_and_reads_its_share(tmp_path, processes):
    """Two devices end in the same bits; a sum over four is not added in the same order by one process and by four."""
    store = make_store(tmp_path / "store", contexts=256)
    options = {"mesh__data": 2, "stream__window_rows": 512, "train__tokens": 32 * 40, "train__resample__every_tokens": None}
    alone, several = (launch(store.path, tmp_path / f"run{n}", processes=n, devices=processes // n, **options)
                      for n in (1, processes))
    of_one, of_several = finish(alone), finish(several)
    assert (fingerprints(of_one) == fingerprints(of_several)) or processes == 4
    losses = [[line["loss"] for line in read_metrics(tmp_path / f"run{n}" / "metrics.jsonl")] for n in (1, processes)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 40
    state = read_meta(tmp_path / f"run{processes}" / "checkpoints" / "40").counters.stream
    assert len(state.lanes) == 32
    trained, ahead = 32 * 40 * store.rows / store.kept_rows, 3 * 32 * 16  # up to three windows a lane: at the end, before, ahead
    for count, results in ((1, of_one), (processes, of_several)):
        for _, out, _ in results:
            rows = int(next(line for line in out.splitlines() if line.startswith("READ")).split()[1])
            assert 0.8 * trained / count <= rows <= (trained + ahead) / count, (count, rows)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_killed_at_random_moments_ends_in_the_same_bits(store, tmp_path, kind):
    straight = fingerprints(finish(launch(store, tmp_path / "straight", kind=kind)))
    rng = random.Random(f"{kind}-{os.environ.get('SAEJAX_TEST_SEED', '0')}")
    run = tmp_path / "run"
    for target in sorted(rng.sample(range(1, 50), 4)):
        [job] = launch(store, run, kind=kind, slow=[0.05])
        wait_for_step(run, target)
        time.sleep(rng.random() * 0.2)
        job.kill()
        finish([job])
    assert fingerprints(finish(launch(store, run, kind=kind))) == straight
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl")]
    assert steps == sorted(set(steps)) and steps[-1] == 50


@pytest.mark.slow
def test_a_killed_peer_ends_the_job_and_the_last_checkpoint_is_whole(store, tmp_path):
    run = tmp_path / "run"
    jobs = launch(store, run, processes=2, devices=2, mesh__data=2, slow=[0.05, 0.05])
    wait_for_step(run, 20)
    jobs[1].kill()
    results = finish(jobs, deadline=90)
    assert results[0][0] != 0, "the surviving process must not pretend success"
    resumed = fingerprints(finish(launch(store, run, processes=2, devices=2, mesh__data=2)))
    assert resumed == fingerprints(finish(launch(store, tmp_path / "straight", processes=2, devices=2, mesh__data=2)))
    assert read_meta(run / "checkpoints" / "50").counters.tokens_seen == 1600


def _killed_while_saving(jobs, checkpoints, deadline=120) -> bool:
    """Kills all processes at once while a checkpoint is written; whether it was still unfinished then."""
    end, seen = time.monotonic() + deadline, set(unfinished(checkpoints))
    while time.monotonic() < end and all(job.poll() is None for job in jobs):
        if set(unfinished(checkpoints)) - seen:
            break
        time.sleep(0.001)
    for job in jobs:
        job.kill()
    finish(jobs)
    return bool(unfinished(checkpoints))


def unfinished(checkpoints) -> list[str]:
    return [path.name for path in checkpoints.glob("*-tmp*")]


@pytest.mark.slow
def test_killed_in_the_middle_of_a_save_it_goes_on_with_another_number_of_processes(store, tmp_path):
    options = {"mesh__data": 2, "mesh__dict": 2, "train__resample__every_tokens": None, "checkpoint__every_tokens": 4 * 32}
    straight, run = tmp_path / "straight", tmp_path / "run"
    finish(launch(store, straight, **options))
    for _ in range(8):  # a save takes a moment, which may be over before the signal is there
        if _killed_while_saving(launch(store, run, processes=2, devices=2, slow=[0.02, 0.02], **options), run / "checkpoints"):
            break
    else:
        pytest.fail("no save was ever caught")
    [(code, _, err)] = finish(launch(store, run, processes=1, devices=4, **options))
    assert code == 0 and "corrupt" not in err, err[-2000:]
    assert not unfinished(run / "checkpoints")
    losses = [[line["loss"] for line in read_metrics(place / "metrics.jsonl")] for place in (straight, run)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(losses[1]) == 50


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(-1, -1), (2, 4)])
def test_a_run_goes_on_with_fewer_devices_and_processes(store, tmp_path, mesh):
    """Two processes of four devices, one of four, one of two: the same rows in the same order."""
    options = {"mesh__data": mesh[0], "mesh__dict": mesh[1], "train__resample__every_tokens": None}
    finish(launch(store, tmp_path / "straight", devices=8, **options))
    for target, processes, devices in ((8, 2, 4), (24, 1, 4)):
        jobs = launch(store, tmp_path / "run", processes=processes, devices=devices, slow=[0.05] * processes, **options)
        wait_for_step(tmp_path / "run", target)
        jobs[-1].send_signal(signal.SIGTERM)
        results = finish(jobs)
        assert [code for code, _, _ in results] == [EXIT_PREEMPTED] * processes, results[0][2][-2000:]
    [(code, _, err)] = finish(launch(store, tmp_path / "run", devices=2, **options))
    assert code == 0, err[-2000:]
    assert ("config.mesh: 2 x 4 does not use the 2 devices here; the run goes on with" in err) == (mesh == (2, 4))
    straight, run = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("straight", "run"))
    assert [line["step"] for line in run] == [line["step"] for line in straight] == list(range(1, 51))
    assert [line["loss"] for line in run] == pytest.approx([line["loss"] for line in straight], rel=1e-4)
    states = [read_meta(tmp_path / name / "checkpoints" / "50").counters.stream for name in ("straight", "run")]
    assert states[0] == states[1]
