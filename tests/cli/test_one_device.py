"""Every job about features on a machine of one device, as most have: the other tests run on eight simulated ones."""

import shutil
import subprocess
import sys

import pytest

from tests.processes import environment

SCRIPT = """
import contextlib, io, json, sys
import jax
from saejax.cli.main import main
from saejax.features.index.reader import FeatureIndex
run, more = sys.argv[1:]
assert jax.device_count() == 1
def job(*arguments):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(list(arguments)) == 0, arguments
    return out.getvalue()
job("features", run, "--tokens=1024", "--verify=20")
alive = int(FeatureIndex.open(run + "/features").column("max").argmax())
for name, words in (("p", "abcde"), ("n", "vwxyz")):
    with open(f"{more}.{name}", "w") as file:
        file.write("\\n".join(words))
for way, *more_ in (["prompt", "the cat", "--max-density=1"], ["answer", "the cat", "a"], ["text", "a"], ["like", "3"],
                    ["sets", f"--positives={more}.p", f"--negatives={more}.n"], ["like", "3", "--within=" + run]):
    assert json.loads(job("search", way, run, *more_, "--json")), way
job("dashboard", run), job("eval", run, "--contexts=2"), job("release", run, "--jumprelu", "--out=" + more)
job("steer", run, "--prompt=a", f"--feature={alive}", "--tokens=2"), job("neurons", run, "--tokens=320")
job("attribute", run, "--prompt=the cat", "--token=a", "--ablate=top:2")
job("features", run, "--baseline=random_sae", "--tokens=512"), job("features", run, "--baseline=directions", "--tokens=512")
job("judge", run, "--judge=csv:" + more + "/sheets", f"--features={alive}", "--do=explain,detect")
job("search", "like", more, "3", "--json"), job("compare", run, more)
import saejax
s = saejax.open(run)
assert s.mesh is None and saejax.compare(s, s).shares()["shared_A"] == 1 and len(s.search(like=3)) == 10
with s.spliced():
    s.lm("the cat")
"""


@pytest.mark.slow
def test_jobs_on_one_device(finished, tmp_path):
    shutil.copytree(finished[1], tmp_path / "run")
    env = environment(1) | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "run"), str(tmp_path / "more")], env=env, text=True,
                          capture_output=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
