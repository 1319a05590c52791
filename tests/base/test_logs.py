"""The metric file survives crashes and resumes: steps strictly increase."""

import errno
import importlib.util
import os
import subprocess
import sys

import pytest

from saejax.base.errors import ConfigError, DiskError
from saejax.base.logs import MetricWriter, read_metrics


def test_resume_cuts_what_came_after_and_torn_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with_lines = MetricWriter(path)
    for step in (1, 2, 3):
        with_lines.write(step, {"loss": step / 2})
    with_lines.close()
    with open(path, "a") as f:
        f.write('{"step": 4, "lo')
    assert [m["step"] for m in read_metrics(path)] == [1, 2, 3]
    resumed = MetricWriter(path, resume_step=2)
    resumed.write(3, {"loss": 9.0})
    resumed.close()
    assert read_metrics(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1}, {"step": 3, "loss": 9}]


def test_a_new_run_starts_a_new_file(tmp_path):
    for _ in range(2):
        writer = MetricWriter(tmp_path / "m.jsonl", tensorboard=tmp_path / "tb")
        writer.write(1, {"loss": 1.0})
        writer.close()
    assert len(read_metrics(tmp_path / "m.jsonl")) == 1
    assert any(p.name.startswith("events.out.tfevents") for p in (tmp_path / "tb").iterdir())


def events(folder):
    """(step, {tag: value}, whether it starts a session anew) of every event of a folder's files."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    out = []
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12:12 + size])
            values = {value.tag: value.simple_value for value in event.summary.value}
            out.append((event.step, values, event.session_log.status == SessionLog.START))
            data = data[16 + size:]
    return out


def test_tensorboard_gets_the_same_values_and_is_told_of_a_resume(tmp_path):
    for resume in (0, 2):
        writer = MetricWriter(tmp_path / "m.jsonl", tensorboard=tmp_path / f"tb{resume}", resume_step=resume)
        writer.write(3, {"loss": 0.5, "l0": 8})
        writer.close()
        found = events(tmp_path / f"tb{resume}")
        assert found[-1] == (3, {"loss": 0.5, "l0": 8}, False)
        assert [step for step, _, starts in found if starts] == ([3] if resume else [])


def test_a_full_disk_while_logging_is_an_error_and_no_wait(tmp_path):
    code = ("import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
            "from pathlib import Path\nfrom saejax.base.errors import DiskError\nfrom saejax.base.logs import MetricWriter\n"
            "writer = MetricWriter(Path(sys.argv[1] + '.jsonl'), tensorboard=Path(sys.argv[1]))\n"
            "try:\n    for n in range(1000):\n        writer.write(n, {'loss': 1.0})\n    writer.close()\n"
            "except DiskError as error:\n    print(error)\n    sys.exit(7)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "tb")], capture_output=True, text=True, timeout=100)
    assert done.returncode == 7 and "File too large" in done.stdout and "Traceback" not in done.stderr, done.stderr


def test_a_failed_resume_leaves_the_old_lines(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    writer = MetricWriter(path)
    writer.write(1, {"loss": 1.0})
    writer.close()

    def disk_full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(DiskError, match="No space left"):
        MetricWriter(path, resume_step=1)
    assert read_metrics(path) == [{"step": 1, "loss": 1}] and os.listdir(tmp_path) == ["metrics.jsonl"]


def test_wandb_without_the_extra_names_it(tmp_path):
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    with pytest.raises(ConfigError, match=r"pip install 'saejax\[wandb\]'"):
        MetricWriter(tmp_path / "m.jsonl", wandb_project="x")


def test_a_resumed_run_continues_at_wandb(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for resume_step, every_steps in ((0, 5), (3, 7), (0, 7)):  # a start, its resume with other log options, and a new start
        writer = MetricWriter(tmp_path / "m.jsonl", wandb_project="x", name="n", config={"log": {"every_steps": every_steps}},
                              resume_step=resume_step)
        ids.append(writer._wandb.id)
        writer.write(resume_step + 1, {"loss": 1.0})
        writer.close()
    assert ids[0] == ids[1] != ids[2] and len(list(tmp_path.glob(f"wandb/offline-run-*-{ids[0]}"))) >= 1
