"""Evaluation by several processes, each on its share of the contexts, gives what one process measures."""

import json
import subprocess
import sys

import pytest

from tests import tiny_experiment as tiny
from tests.processes import environment, free_port


def evaluate(config, out, of):
    port, command = free_port(), [sys.executable, "-m", "saejax", "eval", f"--config={config}", f"--out={out}"]
    own = ["--distributed", f"--num-processes={of}", f"--coordinator=127.0.0.1:{port}"] if of > 1 else []
    jobs = [subprocess.Popen([*command, *own, *([f"--process-id={i}"] if own else [])], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, env=environment(4 // of)) for i in range(of)]
    said = [job.communicate(timeout=300) for job in jobs]
    assert all(job.returncode == 0 for job in jobs), said
    return json.loads((out / "eval.json").read_text())["entries"][-1]["result"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["topk", "relu"])
def test_several_processes_measure_what_one_does(tmp_path, model_and_text, kind):
    extra = f"c.mesh.data, c.mesh.dict, c.eval.contexts = 2, 2, 11\nc.sae.kind = {kind!r}"
    extra += "\nc.sae.aux_k = 0" if kind == "relu" else ""
    config = tiny.write_config(tmp_path / "config.py", *model_and_text, tmp_path / "run", extra)
    done = subprocess.run([sys.executable, "-m", "saejax", "run", f"--config={config}"], env=environment(4), text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    alone, two = (evaluate(config, tmp_path / f"out{of}", of) for of in (1, 2))
    assert alone["contexts"] == two["contexts"] == 11 and alone["masked_tokens"] == two["masked_tokens"] > 0
    for name in ("tokens", "outlier_tokens", "predicted_tokens", "l0_mean", "l0_median", "dead_fraction", "density_histogram"):
        assert two[name] == alone[name], name
    for name in ("fvu", "cosine", "ce_clean", "ce_spliced", "ce_zero", "ce_mean", "kl"):
        assert two[name] == pytest.approx(alone[name], rel=1e-5), name
