"""One writer of a directory at a time, whoever dies or sleeps."""

import json
import subprocess
import sys
import threading
import time

import pytest

from saejax.base import lease
from saejax.base.errors import LeaseError
from tests.processes import environment

HOLD = """
import sys, time
from saejax.base import lease
with lease.writing(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""
RACE = """
import sys, time
from saejax.base import lease
from saejax.base.errors import LeaseError
print("ready", flush=True)
sys.stdin.readline()
try:
    with lease.writing(sys.argv[1]):
        time.sleep(3)
    print("held")
except LeaseError:
    print("refused")
"""


def process(code, folder):
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], env=environment(1), stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lease of tmp_path."""
    other = process(HOLD, tmp_path)
    assert other.stdout.readline() == "held\n"
    yield other
    other.kill()
    other.communicate()


def foreign(folder, **changes):
    """The lease of a process of another machine; returns its file."""
    values = {"name": "theirs", "job": "saejax train", "machine": "elsewhere", "space": "x", "process": 7, "started": "1",
              "beat": 0}
    file = folder / lease.FILE
    file.write_text(json.dumps(values | changes))
    return file


def test_a_job_within_a_job_shares_it_and_nothing_is_left(tmp_path):
    with lease.writing(tmp_path / "a" / "run", tmp_path / "b"):
        with lease.writing(tmp_path / "a" / "run"):
            lease.confirm()
        assert (tmp_path / "a" / "run" / lease.FILE).is_file() and (tmp_path / "b" / lease.FILE).is_file()
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
    with pytest.raises(ZeroDivisionError), lease.writing(tmp_path):
        raise ZeroDivisionError
    assert not (tmp_path / lease.FILE).exists()


def test_a_second_process_is_refused_in_one_line(tmp_path, holder):
    clock = time.monotonic()
    with pytest.raises(LeaseError, match=rf"another job writes here \(`.*`, process {holder.pid} on .*\); wait for its end"), \
            lease.writing(tmp_path / "other", tmp_path):
        pass
    assert time.monotonic() - clock < 5
    assert not (tmp_path / "other" / lease.FILE).exists()  # what it had got already is given back
    holder.communicate("")
    with lease.writing(tmp_path):
        pass


def test_a_dead_process_of_this_machine_is_taken_over_at_once(tmp_path, holder):
    holder.kill()
    holder.wait()
    clock = time.monotonic()
    with lease.writing(tmp_path):
        lease.confirm()
    assert time.monotonic() - clock < 5


def test_a_number_given_again_is_not_the_process(tmp_path, holder):
    values = json.loads((tmp_path / lease.FILE).read_text())
    (tmp_path / lease.FILE).write_text(json.dumps(values | {"started": "1"}))
    with lease.writing(tmp_path):
        lease.confirm()


@pytest.mark.parametrize("content", [
    None, *(pytest.param(text, marks=pytest.mark.slow) for text in ("torn", "[]", '{"name": 3}'))])
def test_a_silent_holder_elsewhere_is_waited_for_then_replaced(tmp_path, monkeypatch, capsys, content):
    file = foreign(tmp_path)
    if content is not None:
        file.write_text(content)
    monkeypatch.setattr(lease, "EXPIRES", 1.0)
    clock = time.monotonic()
    with lease.writing(tmp_path):
        assert time.monotonic() - clock >= 1.0
        lease.confirm()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "waiting up to 1 s" in said[0] and "going on in its place" in said[1]


def test_a_holder_elsewhere_that_renews_is_not_disturbed(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "EXPIRES", 20.0)
    foreign(tmp_path)
    threading.Timer(0.5, foreign, (tmp_path,), {"beat": 1}).start()
    with pytest.raises(LeaseError, match="process 7 on elsewhere"), lease.writing(tmp_path):
        pass
    assert json.loads((tmp_path / lease.FILE).read_text())["beat"] == 1


def test_a_holder_elsewhere_that_ends_meanwhile(tmp_path):
    file = foreign(tmp_path)
    threading.Timer(0.5, file.unlink).start()
    with lease.writing(tmp_path):
        lease.confirm()


def test_who_lost_it_writes_nothing_more(tmp_path):
    with lease.writing(tmp_path / "run"):
        file = foreign(tmp_path / "run")
        with pytest.raises(LeaseError, match="`saejax train`, process 7 on elsewhere writes here now"):
            lease.confirm()
        for held in lease._HELD.values():
            held.renew()
        assert "theirs" in file.read_text()
    assert "theirs" in file.read_text()  # nor is it given back by somebody else
    with lease.writing(tmp_path / "gone"):
        (tmp_path / "gone" / lease.FILE).unlink()
        with pytest.raises(LeaseError, match="its lease was removed"):
            lease.confirm()


def test_renewing_changes_it_and_keeps_it(tmp_path):
    with lease.writing(tmp_path):
        beats = []
        for _ in range(3):
            beats.append(json.loads((tmp_path / lease.FILE).read_text())["beat"])
            for held in lease._HELD.values():
                held.renew()
            lease.confirm()
        assert beats == sorted(set(beats))


def test_of_many_at_once_one_gets_it(tmp_path):
    jobs = [process(RACE, tmp_path) for _ in range(4)]
    assert [job.stdout.readline() for job in jobs] == ["ready\n"] * 4
    for job in jobs:
        job.stdin.write("\n")
        job.stdin.flush()
    said = sorted(job.communicate(timeout=60)[0] for job in jobs)
    assert said == ["held\n"] + ["refused\n"] * 3
