"""The metric file survives crashes and resumes: steps strictly increase. Progress on a terminal, a pipe, and off."""

import errno
import importlib.util
import io
import logging
import os
import re
import subprocess
import sys

import pytest

from saejax.base.errors import ConfigError, DiskError
from saejax.base.logs import MetricWriter, Progress, one_line_of_retries, read_metrics


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


def test_a_hub_that_does_not_answer_is_one_line(capsys, caplog):
    """What else the library says stays, and all of it afterwards."""
    logger = logging.getLogger("huggingface_hub.utils._http")
    with one_line_of_retries("me/texts"):
        for number in (1, 2):
            logger.warning("'no name' thrown while requesting HEAD https://hub/me/texts")
            logger.warning(f"Retrying in {number}s [Retry {number}/5].")
        logger.warning("Rate limited. Waiting 60s before retry [Retry 1/5].")
    logger.warning("Retrying in 8s [Retry 3/5].")
    assert caplog.messages == ["Rate limited. Waiting 60s before retry [Retry 1/5].", "Retrying in 8s [Retry 3/5]."]
    assert capsys.readouterr().err.count("me/texts: the hub does not answer; trying again\n") == 1


_WORK = """
import time
from saejax.base import logs
logs.LINE_SECONDS = 1.0
with logs.Progress("first pass", 4000, initial=1000, unit="row", enabled={enabled}) as bar:
    time.sleep(2.5)                      # two lines while nothing advances
    bar.advance(1000, loss=0.25)
    logs.say("a message")
    time.sleep(1.0)                      # one more
    bar.advance(1000)
    bar.shorten(1000)
with logs.Progress("quick", None, unit="B", enabled={enabled}) as bar:
    bar.advance(5_000_000)
"""


def _lines_of(enabled: bool) -> bytes:
    return subprocess.run([sys.executable, "-c", _WORK.format(enabled=enabled)], stderr=subprocess.PIPE, check=True).stderr


def test_on_a_pipe_progress_is_whole_lines_at_their_times():
    said = _lines_of(True)
    assert b"\r" not in said and said.endswith(b"\n")
    lines = said.decode().splitlines()
    assert lines.index("a message") == 2 and len(lines) == 6
    waiting, moved, last, quick = lines[0], lines[3], lines[4], lines[5]
    assert re.fullmatch(r"first pass:  25% 1\.00k/4\.00k \[00:01<\?, \?row/s\]", waiting)
    assert moved.startswith("first pass:  50% 2.00k/4.00k [00:03<00:0") and moved.endswith("row/s, loss=0.25]")
    assert last.startswith("first pass: 100% 3.00k/3.00k [00:03<00:00, ") and "row/s" in last
    assert re.fullmatch(r"quick: 5\.00MB \[00:00, .*B/s\]", quick)


def test_progress_can_be_off():
    assert _lines_of(False) == b"a message\n"


def test_on_a_terminal_progress_is_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    with Progress("first pass", 10, unit="row") as bar:
        bar.advance(10)
    assert screen.getvalue().startswith("\rfirst pass:   0%|") and "10.0/10.0 [" in screen.getvalue()
