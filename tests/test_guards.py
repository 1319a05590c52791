"""No command holds a dictionary in one place, or an array of rows x features: what was largest, counted in real runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny_experiment as tiny
from tests.processes import environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT, DEVICES, BATCH = Path(__file__).parents[1], 8, 1024
LARGE, SMALL = 2**20, 2**17  # features; an index of the large one takes five minutes on two cores
TILE = 4 * 2**24             # bytes of pre-activations that a CPU computes at once
OTHERS = 120 * 2**20         # of the host, at any size: modules and compiled programs


def largest(place: Path, features: int, *words: str) -> dict[str, int]:
    """Bytes of the largest array that a command held: in a compiled program, alive on a device, on the host."""
    env = environment(DEVICES) | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 "
                                  "--xla_cpu_collective_call_terminate_timeout_seconds=900"}
    file_bytes = 4 * features * tiny.D_IN // 3  # of a release: a file holds one shard
    command = [sys.executable, "-m", "tests.largest_arrays", str(place / "found.json"), f"--file-bytes={file_bytes}", *words]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((place / "found.json").read_text())
    print(words[0], features, {name: value for name, value in found.items() if name != "programs"})
    return {name: found[name][0] for name in ("compiled", "live", "host")}


def config(place: Path, features: int) -> Path:
    model, text = tiny.write_model(place / "model"), tiny.write_text(place / "text")
    return tiny.write_config(place / "config.py", model, text, place / "run", f"""
c.sae.d_sae, c.sae.dead_tokens, c.sae.aux_k = {features}, {BATCH}, 0
c.train.batch, c.train.tokens, c.harvest.tokens, c.text.holdout = {BATCH}, {4 * BATCH}, {4 * BATCH}, 0.5
c.train.resample.every_tokens, c.train.resample.sample_rows = {2 * BATCH}, {BATCH}
c.checkpoint.every_tokens, c.eval.contexts, c.lm.batch_contexts, c.log.every_steps = {2 * BATCH}, 32, {BATCH // 32}, 1
c.harvest.shard_bytes, c.stream.window_rows, c.mesh.data, c.mesh.dict = 2**20, {4 * BATCH}, 1, {DEVICES}
""")


def test_from_the_first_step_to_a_release(tmp_path):
    """All devices are of one process, so a host that reads a checkpoint has both matrices in its hands once, and no more."""
    made, matrix = config(tmp_path, LARGE), 4 * LARGE * tiny.D_IN
    dense = 4 * BATCH * LARGE // DEVICES
    on_host = {"harvest": 0, "train": matrix / 4, "eval": 2 * matrix, "release": 2 * matrix}
    for job, most in on_host.items():
        found = largest(tmp_path, LARGE, job, f"--config={made}")
        assert found["live"] <= 1.01 * matrix / DEVICES, job
        assert found["compiled"] <= 1.01 * TILE < dense / 3, job
        assert found["host"] <= 1.1 * most + OTHERS, job
    assert len([*(tmp_path / "run" / "release").glob("*.safetensors")]) == 8
    found = largest(tmp_path, LARGE, "eval", str(tmp_path / "run" / "release"))
    assert found["live"] <= 1.01 * matrix / DEVICES and found["compiled"] <= 1.01 * TILE
    assert found["host"] <= matrix / 2 + OTHERS, "two files at a time"


def test_index_and_search(tmp_path):
    made = config(tmp_path, SMALL)
    for job in ("harvest", "train"):
        largest(tmp_path, SMALL, job, f"--config={made}")
    of_state = 4 * 16 * 8 * SMALL // DEVICES  # the samples of `FeatureState`, its largest array
    found = largest(tmp_path, SMALL, "features", str(tmp_path / "run"), "--neighbours=none")
    assert found["live"] <= 1.01 * of_state
    assert found["host"] <= 3 * 1024 * SMALL + OTHERS, "row samples of all features, sorted: 3 KB of each"
    assert found["compiled"] <= 1.01 * max(TILE, of_state)
    found = largest(tmp_path, SMALL, "search", "like", str(tmp_path / "run"), "5")
    assert found["compiled"] <= 1.01 * 4 * 256 * SMALL // DEVICES, "cosines of 256 queries with a shard"
