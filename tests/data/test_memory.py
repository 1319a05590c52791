"""What a harvest and a stream hold in memory, beside the formulas of the plan. Each size in a process of its own."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from saejax.config import StreamOptions
from saejax.data.order import RowOrder
from saejax.plan.plan import make_plan
from tests import tiny_experiment as tiny
from tests.kills import write_text
from tests.lm import tiny_llama
from tests.processes import as_user

ROOT = Path(__file__).parents[2]
MB, WIDTH = 1 << 20, 384

STATUS = """
import re
from pathlib import Path

def status(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def growth(body):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    body()
    return status("VmHWM") - before
"""

STREAM = STATUS + """
import json, sys
import numpy as np
from saejax.config import StreamOptions
from saejax.data.arrays import write_rows
from saejax.data.stream import Stream

given = json.loads(sys.argv[1])
rows, width, rng = 400_000, 512, np.random.default_rng(0)
part = rng.standard_normal((20_000, width), np.float32)
store = write_rows(given["path"], (part for _ in range(rows // 20_000)), rows, {"h": width}, context=100, shard_contexts=200)

def read():
    with Stream(store, ("h",), 4096, StreamOptions(window_rows=given["window"]), 0) as stream:
        for _ in range(2 * given["window"] // 4096 + 20):
            next(stream)

print(growth(read))
"""

HARVEST = STATUS + """
import json, sys
from saejax import lm
from saejax.data.harvest import harvest
from tests import tiny_experiment as tiny

given = json.loads(sys.argv[1])
model = lm.load(given["model"])

def run(name, **changes):
    harvest(tiny.make_config(given["model"], given["text"], given["place"] + name, **changes), model)

changes = {"lm.batch_contexts": 64, "text.holdout": 0.0}
run("/small", **changes)
run("/large", **changes, **{"harvest.shard_bytes": given["shard"], "harvest.tokens": given["tokens"]})
print(status("VmHWM"))
"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]


def printed(program: str, **given) -> int:
    done = subprocess.run([sys.executable, "-c", program, json.dumps(given)], cwd=ROOT, env=as_user(ROOT), text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("window", [2**15, 2**16, 2**17])
def test_a_stream_holds_two_windows_and_a_batch(tmp_path, window):
    order = RowOrder.for_batches(400_000, 100, StreamOptions(window_rows=window), 4096)
    size = order.batches_held(4096 // order.lanes) * 4096 * 512 * 2
    assert 50 * MB <= size and 0.7 * size <= printed(STREAM, path=str(tmp_path / "s"), window=window) <= 1.1 * size


@pytest.fixture(scope="module")
def harvested(tmp_path_factory):
    """(bytes of the program at the peak of a harvest with shards of so many bytes, what the plan says of the shards)."""
    place = tmp_path_factory.mktemp("harvest")
    model, text = tiny.write_model(place / "model"), write_text(place / "text.jsonl")
    tiny_llama.write(model, {**tiny_llama.CONFIG, "hidden_size": WIDTH, "head_dim": 12})

    @functools.cache
    def taken(shard: int) -> tuple[int, int]:
        config = tiny.make_config(model, text, place, **{"lm.batch_contexts": 64, "harvest.shard_bytes": shard})
        tokens = max(3 * shard // (2 * WIDTH), 100_000)
        found = printed(HARVEST, model=str(model), text=str(text), place=str(place / str(shard)), shard=shard, tokens=tokens)
        return found, make_plan(config)["harvest"]["host_bytes"]

    return taken


@pytest.mark.parametrize("shard", [64 * MB, 128 * MB, 192 * MB])
def test_a_harvest_holds_two_shards(harvested, shard):
    """Beside what one with small shards holds: Python, jax, its program, the text."""
    (small, without), (found, size) = harvested(MB), harvested(shard)
    expected = small + size - without
    assert 2 * shard * 0.9 <= size and 0.8 * expected <= found <= 1.1 * expected
