"""Several processes meet within a time limit, say why they do not, and refuse to go on with different configs."""

import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from saejax.base.distributed import _raise_unless_equal, announced, check_agreement
from saejax.base.errors import ConfigError
from saejax.cli.main import JOBS
from saejax.cli.main import processes as processes_of
from saejax.cli.parsing import parse
from tests import tiny_experiment as tiny
from tests.kills import Experiment, write_text
from tests.processes import environment, free_port


@pytest.fixture
def config_file(model_and_text, tmp_path):
    return tiny.write_config(tmp_path / "config.py", *model_and_text, tmp_path / "run")


def processes(config_file, port, number, *, of=2, each=lambda i: (), flags=("--start_timeout=60",)):
    """Starts the processes that are numbered so, and returns (exit code, last line on stderr, seconds) of each."""
    clock = time.monotonic()
    command = [sys.executable, "-m", "saejax.cli.main", "train", f"--config={config_file}", "--distributed",
               f"--coordinator=127.0.0.1:{port}", f"--num_processes={of}", *flags]
    jobs = [subprocess.Popen([*command, f"--process_id={i}", *each(i)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env=environment(1)) for i in number]
    try:
        out = [job.communicate(timeout=100)[1].splitlines() for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    errors = [next((line for line in lines if line.startswith("saejax: error:")), lines[-1:]) for lines in out]
    return [(job.returncode, error, time.monotonic() - clock) for job, error in zip(jobs, errors, strict=True)]


@pytest.mark.parametrize("env, who", [
    ({}, ""),
    ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, ""),  # a batch script or a shell, no step of srun
    ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}, "Slurm"),
    ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, ""),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, "TPU workers"),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, ""),
    ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "2"}, "environment"),
    ({"JAX_COORDINATOR_ADDRESS": "a:1"}, ""),
])
def test_who_announces_several_processes(env, who):
    assert announced(env) == who


def test_flags_and_environment_decide_together(config_file, monkeypatch):
    def distributed(*flags):
        return processes_of(parse(JOBS["train"], [f"--config={config_file}", *flags]))

    assert distributed() is None and distributed("--distributed")["coordinator"] is None
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert distributed() is not None and distributed("--no-distributed") is None
    given = distributed("--distributed", "--coordinator=a:1", "--num_processes=2", "--process-id=0", "--heartbeat=7")
    assert given == {"coordinator": "a:1", "num_processes": 2, "process_id": 0}


@pytest.mark.parametrize("flags, message", [
    (("--coordinator=nowhere", "--num_processes=2", "--process_id=0"), "coordinator=nowhere: write HOST:PORT"),
    (("--coordinator=a:1", "--num_processes=2", "--process_id=2"), "are numbered from 0 to 1"),
])
def test_addresses_and_numbers_are_checked_first(flags, message, config_file, capsys):
    from saejax.cli.main import main
    assert main(["train", f"--config={config_file}", "--distributed", *flags]) == 2
    assert message in capsys.readouterr().err


def test_the_environment_must_say_which_process_this_is(monkeypatch):
    from saejax.base import distributed
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ConfigError, match="neither JAX_PROCESS_ID nor JOB_COMPLETION_INDEX says which"):
        distributed.start()


def test_an_unreachable_coordinator_ends_in_one_line_in_time(config_file):
    [(code, error, seconds)] = processes(config_file, free_port(), [1], flags=("--start_timeout=1",))
    assert code == 2 and seconds < 40
    assert "no job after 1 s: nothing answers at 127.0.0.1:" in error


@pytest.mark.slow
def test_processes_that_do_not_come_are_missed(config_file):
    [(code, error, _)] = processes(config_file, free_port(), [0], flags=("--start_timeout=2",))
    assert code == 2 and "not all 2 processes came to 127.0.0.1:" in error
    port = free_port()
    ends = processes(config_file, port, [0, 1], of=3, flags=("--start_timeout=8",))
    assert [code for code, _, _ in ends] == [2, 2]
    assert any("answers, but the job is not complete" in error or "not all 3 processes" in error for _, error, _ in ends)


def test_disagreement_names_keys_and_processes():
    names = ["config.sae.k", "config.train.lr", "job"]
    _raise_unless_equal(np.array([[1, 2, 3]] * 4), names, "change it")
    words = r"^config.train.lr: not the same in all 4 processes \(process 2, 3 differs.*; change it$"
    with pytest.raises(ConfigError, match=words):
        _raise_unless_equal(np.array([[1, 2, 3], [1, 2, 3], [1, 9, 3], [1, 8, 3]]), names, "change it")
    check_agreement({"config.sae.k": 3})  # one process agrees with itself


@pytest.mark.slow
def test_processes_with_different_configs_refuse_to_start(config_file, tmp_path):
    def own(i):
        return f"--config.train.lr={1 + i}", f"--config.sae.k={8 - i}", f"--config.log.every_steps={1 + i}"

    ends = processes(config_file, free_port(), [0, 1], each=own)
    for code, error, _ in ends:
        assert code == 2, error
        assert "config.sae.k, config.train.lr: not the same in all 2 processes (process 1 differs from process 0)" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_within_the_heartbeat(model_and_text, tmp_path):
    run = tmp_path / "run"
    config = tiny.write_config(tmp_path / "config.py", *model_and_text, run, "c.mesh.data = 2\nc.train.tokens = 64_000_000")
    command = [sys.executable, "-m", "saejax.cli.main", "run", f"--config={config}", "--distributed",
               f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2", "--heartbeat=10"]
    jobs = [subprocess.Popen([*command, f"--process_id={i}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                             env=environment(1)) for i in range(2)]
    try:
        end = time.monotonic() + 150
        while not (run / "metrics.jsonl").is_file() and time.monotonic() < end:
            time.sleep(0.1)
        assert (run / "metrics.jsonl").is_file()
        jobs[1].kill()
        clock = time.monotonic()
        jobs[0].communicate(timeout=60)
        assert jobs[0].returncode != 0 and time.monotonic() - clock < 30
    finally:
        for job in jobs:
            job.kill()


def launched(job, config_file, number, of, port, *flags, limit=""):
    """One process of several, or the only one."""
    command = [sys.executable, "-m", "saejax.cli.main", job, f"--config={config_file}", *flags]
    if of > 1:
        command += ["--distributed", f"--coordinator=127.0.0.1:{port}", f"--num-processes={of}", f"--process-id={number}"]
    return subprocess.Popen(["bash", "-c", f'{limit} exec "$@"', "-", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=environment(1))


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_and_keeps_its_code(config_file):
    """Process 1 cannot write files of more than 2 KB: its shards. Process 0 waits for it, until its heart has stopped."""
    port, heartbeat = free_port(), 10
    jobs = [launched("harvest", config_file, i, 2, port, f"--heartbeat={heartbeat}", limit="ulimit -f 2;" if i else "")
            for i in range(2)]
    try:
        _, error = jobs[1].communicate(timeout=100)
        clock = time.monotonic()
        jobs[0].communicate(timeout=100)
        seconds = time.monotonic() - clock
    finally:
        for job in jobs:
            job.kill()
    assert jobs[1].returncode == 2, error
    assert [line for line in error.splitlines() if "File too large" in line][0].startswith("saejax: error:"), error
    assert "Traceback" not in error
    assert jobs[0].returncode != 0 and seconds < heartbeat + 5


@pytest.mark.parametrize("of", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_harvest_stops_on_request_and_goes_on(config_file, tmp_path, of):
    """SIGTERM to the last process: all end with code 75 at a shard's edge, and the same command finishes the store.

    Several processes agree within two seconds or so; a shard takes milliseconds, so there are a thousand.
    """
    planned = 1024 if of > 1 else 128
    words = random.Random(0).choices(["in", "the", "beginning", "was", "a", "word", "and", "another"], k=100_000)
    (tmp_path / "words.jsonl").write_text("".join(json.dumps({"text": " ".join(words[i:i + 50])}) + "\n"
                                                  for i in range(0, len(words), 50)))
    port, flags = free_port(), (f"--config.text.source={tmp_path}/words.jsonl", f"--config.harvest.tokens={planned * 128}",
                                f"--config.harvest.shard_bytes={4 * 32 * 2 * 48}",
                                f"--config.harvest.store={tmp_path}/store")
    jobs = [launched("harvest", config_file, i, of, port, *flags) for i in range(of)]
    shards, deadline = tmp_path / "store/shards", time.monotonic() + 100
    while not list(shards.glob("*.bin")) and jobs[-1].poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    jobs[-1].send_signal(signal.SIGTERM)
    errors = [job.communicate(timeout=100)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [75] * of, errors
    assert "shards written; start the same command again to go on" in errors[0]
    there = len(list(shards.glob("*.bin")))
    assert 0 < there < planned and not (tmp_path / "store" / ".lease").exists()
    again = launched("harvest", config_file, 0, 1, port, *flags)
    _, error = again.communicate(timeout=300)
    assert again.returncode == 0, error


@pytest.mark.slow
@pytest.mark.parametrize("of", [2, 3])
def test_processes_that_make_tokens_stop_on_request_together(config_file, tmp_path, of):
    """SIGTERM to the last of them, before the tokens are there: all end with code 75, and the same command goes on."""
    flags = (f"--config.text.source={write_text(tmp_path / 'text.jsonl')}", "--config.harvest.tokens=2_000_000",
             "--config.text.holdout=0", f"--config.harvest.store={tmp_path}/store", "--config.harvest.shard_bytes=200_000")
    jobs = [launched("harvest", config_file, i, of, port, *flags) for port in [free_port()] for i in range(of)]
    text, deadline = tmp_path / "store/text", time.monotonic() + 100
    while not (text / "spec.json").exists() and jobs[-1].poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    jobs[-1].send_signal(signal.SIGTERM)
    errors = [job.communicate(timeout=100)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [75] * of, errors
    assert not list((tmp_path / "store/shards").glob("*.bin")) and not (tmp_path / "store/.lease").exists()
    assert "store/text: stopped on request" in errors[-1] or "process" in errors[-1], errors


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_the_rerun_is_that_of_no_kill(tmp_path):
    """One trial of the campaign in `benchmarks/faults.py`."""
    trial = Experiment(tmp_path).trial("harvest", 0)
    assert not trial.wrong and "shards" in trial.at, trial
