"""A large dictionary from its first step to what people use: seconds and peak memory of every stage, on simulated devices.

    python benchmarks/large.py --features=1048576 --steps=200 --place=DIR

A random Llama of width 256 and random words. Stages, each a process of its own: harvest; training, which is stopped once and goes
on with another mesh; evaluation; release; index; dashboard; search; conversion. What is in --place is gone on with. Prints a
table in Markdown.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests import tiny_experiment as tiny  # noqa: E402
from tests.lm import tiny_llama  # noqa: E402

WIDTH, BATCH = 256, 1024
_PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=900"  # simulated devices wait for each other on few cores


def write_text(file: Path, letters: int) -> Path:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7))) for _ in range(5000)]
    with open(file, "w") as out:
        for _ in range(letters // 100):
            out.write(json.dumps({"text": " ".join(rng.choices(words, k=20))}) + "\n")
    return file


def write_config(place: Path, features: int, steps: int, mesh: str) -> Path:
    model = place / "model"
    if not model.exists():
        tiny.write_model(model)
        tiny_llama.write(model, {**tiny_llama.CONFIG, "hidden_size": WIDTH, "head_dim": 32, "num_attention_heads": 8,
                                   "intermediate_size": 512})
        write_text(place / "text.jsonl", 2 * steps * BATCH)
    tokens = steps * BATCH
    extra = f"""c.sae.d_sae, c.sae.k, c.sae.aux_k, c.sae.dead_tokens = {features}, 32, 0, {tokens // 4}
c.train.batch, c.train.tokens = {BATCH}, {tokens}
c.train.resample.every_tokens, c.train.resample.sample_rows = {tokens // 2}, 8192
c.harvest.tokens, c.harvest.shard_bytes, c.stream.window_rows, c.text.holdout = {tokens}, 2**24, 2**16, 0.05
c.checkpoint.every_tokens, c.eval.contexts, c.lm.batch_contexts, c.log.every_steps = {tokens // 2}, 256, 32, 1
c.mesh.data, c.mesh.dict = {mesh}
c.log.progress = True
"""
    return tiny.write_config(place / "config.py", model, place / "text.jsonl", place / "run", extra)


def stage(name: str, *words, devices: int = 8, stop_at: int | None = None, run: Path | None = None) -> None:
    """Runs `saejax` and prints a row. stop_at: SIGTERM when the run has so many lines of metrics."""
    own = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT), "XLA_FLAGS": _PATIENCE}
    env = os.environ | own
    began, log = time.monotonic(), (run.parent / f"{name.replace(' ', '_')}.log").open("w")
    job = subprocess.Popen([sys.executable, "-m", "saejax", *map(str, words)], env=env, stdout=log, stderr=log)
    asked = False
    while True:
        done, status, used = os.wait4(job.pid, os.WNOHANG)
        if done:
            break
        metrics = run / "metrics.jsonl"
        if stop_at and not asked and metrics.exists() and metrics.read_text().count("\n") >= stop_at:
            job.send_signal(signal.SIGTERM)
            asked = True
        time.sleep(0.2)
    code = os.waitstatus_to_exitcode(status)
    said = Path(log.name).read_text().splitlines() or ["nothing"]
    note = "" if code in (0, 75) else f"exit code {code}: {said[-1][:200]}"
    print(f"| {name} | {time.monotonic() - began:,.0f} s | {used.ru_maxrss / 2**20:.2f} GiB | {note} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=2**20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--place", type=Path, required=True)
    parser.add_argument("--stages", default="harvest,train,eval,release,features,dashboard,search,convert")
    args = parser.parse_args()
    args.place.mkdir(parents=True, exist_ok=True)
    place, run = args.place.absolute(), args.place.absolute() / "run"
    wanted = args.stages.split(",")
    parameters = 2 * args.features * WIDTH + args.features
    print(f"{args.features:,} features of width {WIDTH}, topk, {args.steps} steps of {BATCH} rows, 8 simulated devices; "
          f"parameters {4 * parameters / 2**30:.2f} GiB, with Adam's moments {12 * parameters / 2**30:.2f} GiB\n")
    print("| stage | time | peak memory | |\n|---|---|---|---|")

    def config(mesh: str) -> str:
        return f"--config={write_config(place, args.features, args.steps, mesh)}"

    if "harvest" in wanted:
        stage("harvest", "harvest", config("1, 8"), run=run)
    if "train" in wanted:
        stage("train, stopped", "train", config("1, 8"), stop_at=args.steps * 3 // 4, run=run)
        stage("train, goes on with 2 x 4", "train", config("2, 4"), run=run)
    jobs = {"eval": ("eval", config("1, 8")), "release": ("release", config("1, 8")),
            "features": ("features", run), "dashboard": ("dashboard", run),
            "search": ("search", "like", run, "5"), "convert": ("convert", run / "release", place / "converted", "--to=saelens")}
    for name, words in jobs.items():
        if name in wanted:
            stage(name, *words, run=run)


if __name__ == "__main__":
    main()
