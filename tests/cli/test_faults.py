"""Faults of the machine, one fixed trial each: two equal commands at once, and files that cannot grow.

The campaigns with many random trials, on disks that really fill up, are benchmarks/faults.py.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import saejax
from saejax.base.logs import read_metrics
from saejax.cli.main import main
from tests import tiny_experiment as tiny
from tests.processes import as_user

ROOT = Path(saejax.__file__).parents[1]
pytestmark = pytest.mark.slow


def start(*words, limit=""):
    """`saejax` with these words; limit: what the shell does before, as `ulimit -f 8` for files of at most 8 KB."""
    command = ["bash", "-c", f'{limit} exec "$@"', "-", sys.executable, "-m", "saejax", *map(str, words)]
    env = as_user(ROOT) | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def finished(job):
    """(exit code, error lines); no traceback whatever happened."""
    out, err = job.communicate(timeout=300)
    assert "Traceback" not in out + err, err
    return job.returncode, [line for line in err.splitlines() if line.startswith("saejax: error:")]


def test_of_two_equal_commands_one_does_the_work(model_and_text, tmp_path):
    config = tiny.write_config(tmp_path / "config.py", *model_and_text, tmp_path / "run", "c.log.every_steps = 1")
    (code, _), (other, lines) = sorted(map(finished, [start("run", f"--config={config}") for _ in range(2)]))
    assert code == 0 and other in (0, 2)
    if other == 2:
        assert len(lines) == 1 and "another job writes here (`saejax run`, process" in lines[0]
    assert [line["step"] for line in read_metrics(tmp_path / "run/metrics.jsonl")] == list(range(1, 33))
    assert not list(tmp_path.rglob(".lease"))


@pytest.fixture(scope="module")
def before(model_and_text, tmp_path_factory):
    """A folder with the config, the store and the run; as it is before `train`, and before `features` and `release`."""
    folder = tmp_path_factory.mktemp("before")
    config = tiny.write_config(folder / "config.py", *model_and_text, folder / "run")
    assert main(["harvest", f"--config={config}"]) == 0
    shutil.copytree(folder / "run", folder / "harvested")
    assert main(["train", f"--config={config}"]) == 0
    shutil.copytree(folder / "run", folder / "trained")
    return folder


@pytest.mark.parametrize("job, kilobytes", [("train", 16), ("features", 64), ("release", 8)])
def test_files_that_cannot_grow_are_one_line_and_the_same_command_goes_on(before, job, kilobytes):
    config, run = before / "config.py", before / "run"
    shutil.rmtree(run)
    shutil.copytree(before / ("harvested" if job == "train" else "trained"), run)
    words = [job, f"--config={config}"] if job == "train" else [job, run]
    code, lines = finished(start(*words, limit=f"ulimit -f {kilobytes};"))
    assert code == 2 and len(lines) == 1 and "File too large" in lines[0], lines
    assert finished(start(*words)) == (0, [])
    assert not list(run.rglob(".lease"))
