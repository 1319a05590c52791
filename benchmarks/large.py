"""A large dictionary from first step to what people use: seconds and peak memory of every stage, on simulated devices or one GPU.

    python benchmarks/large.py --features=1048576 --steps=200 --place=DIR
    python benchmarks/large.py --gpu --features=1048576 --width=2304 --batch=4096 --steps=4000 --epochs=5 --place=DIR

A random Llama and random words. Stages, each a process of its own: harvest; training, which is stopped once and goes
on with half as many devices; evaluation; release; index; dashboard; search; conversion. What is in --place is gone on
with. Prints a table in Markdown.
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

_PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=900"  # simulated devices wait for each other on few cores


def write_text(file: Path, letters: int) -> Path:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7))) for _ in range(5000)]
    with open(file, "w") as out:
        for _ in range(letters // 100):
            out.write(json.dumps({"text": " ".join(rng.choices(words, k=20))}) + "\n")
    return file


def write_config(args: argparse.Namespace, mesh: str) -> Path:
    place, tokens = args.place, args.steps * args.batch
    model = place / "model"
    if not model.exists():
        tiny.write_model(model)
        head = 128 if args.gpu else 32
        tiny_llama.write(model, {**tiny_llama.CONFIG, "hidden_size": args.width, "head_dim": head,
                                   "num_attention_heads": args.width // head, "intermediate_size": 2 * args.width,
                                   "max_position_embeddings": 256})
        write_text(place / "text.jsonl", 2 * tokens // args.epochs)
    extra = f"""c.sae.d_sae, c.sae.k, c.sae.aux_k, c.sae.dead_tokens = {args.features}, {args.k}, 0, {tokens // 4}
c.train.batch, c.train.tokens = {args.batch}, {tokens}
c.train.resample.every_tokens, c.train.resample.sample_rows = {tokens // 2}, 8192
c.harvest.tokens, c.harvest.shard_bytes, c.stream.window_rows, c.text.holdout = {tokens // args.epochs}, 2**24, 2**16, 0.05
c.checkpoint.every_tokens, c.eval.contexts, c.lm.batch_contexts, c.log.every_steps = {tokens // 2}, 256, 32, 1
c.mesh.data, c.mesh.dict = {mesh}
c.log.progress = True
"""
    if args.no_resampling:
        extra += "c.train.resample.every_tokens = None\n"
    if args.optimizer:
        extra += f"c.train.optimizer = {args.optimizer!r}\n"
    if args.gpu:
        extra += """c.lm.dtype = "bfloat16"
c.text.context, c.lm.batch_contexts, c.eval.contexts, c.harvest.shard_bytes = 256, 64, 512, 2**30
c.train.optimizer, c.log.every_steps = "lazy", 50
"""
    return tiny.write_config(place / "config.py", model, place / "text.jsonl", place / "run", extra)


def stage(args: argparse.Namespace, name: str, *words, devices: int = 8, stop_at: int | None = None) -> None:
    """Runs `saejax` and prints a row. stop_at: SIGTERM when the run has made so many steps."""
    own = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    own |= {} if args.gpu else {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "XLA_FLAGS": _PATIENCE}
    began, log = time.monotonic(), (args.place / f"{name.replace(' ', '_')}.log").open("w")
    job = subprocess.Popen([sys.executable, "-m", "saejax", *map(str, words)], env=os.environ | own, stdout=log, stderr=log)
    asked = False
    while True:
        done, status, used = os.wait4(job.pid, os.WNOHANG)
        if done:
            break
        if stop_at and not asked and last_metrics(args.place / "run").get("step", 0) >= stop_at:
            job.send_signal(signal.SIGTERM)
            asked = True
        time.sleep(0.2)
    code = os.waitstatus_to_exitcode(status)
    said = Path(log.name).read_text().splitlines() or ["nothing"]
    note = "" if code in (0, 75) else f"exit code {code}: {said[-1][:200]}"
    last = last_metrics(args.place / "run")
    if name.startswith("train") and not note:
        shown = {"tokens_per_second": "{:,.0f} tokens/s", "peak_device_bytes": "{:.3g} bytes of the device",
                 "dead_fraction": "{:.1%} dead", "data_wait_share": "{:.0%} of the time waiting for rows"}
        note = ", ".join(text.format(last[key]) for key, text in shown.items() if last.get(key) is not None)
    print(f"| {name} | {time.monotonic() - began:,.0f} s | {used.ru_maxrss / 2**20:.2f} GiB | {note} |", flush=True)


def last_metrics(run: Path) -> dict:
    """The last whole line of the run's metrics."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines()[-2:] if file.exists() else []
    for line in reversed(lines):
        try:
            return json.loads(line)
        except json.JSONDecodeError:  # being written
            continue
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=2**20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=1, help="so often the store is trained on")
    parser.add_argument("--index-tokens", type=int, default=16_384, help="of the store that the index is made of")
    parser.add_argument("--no-resampling", action="store_true")
    parser.add_argument("--optimizer", default="", help="config.train.optimizer")
    parser.add_argument("--gpu", action="store_true", help="one GPU, lazy rows; else 8 simulated devices")
    parser.add_argument("--place", type=Path, required=True)
    parser.add_argument("--stages", default="harvest,train,eval,release,features,dashboard,search,convert")
    args = parser.parse_args()
    args.place = args.place.absolute()
    args.place.mkdir(parents=True, exist_ok=True)
    place, run, wanted = args.place, args.place / "run", args.stages.split(",")
    parameters = 2 * args.features * args.width + args.features
    print(f"{args.features:,} features of width {args.width}, topk, {args.steps} steps of {args.batch} rows, "
          f"{'one GPU' if args.gpu else '8 simulated devices'}; "
          f"parameters {4 * parameters / 2**30:.2f} GiB, with Adam's moments {12 * parameters / 2**30:.2f} GiB\n")
    print("| stage | time | peak memory | |\n|---|---|---|---|")
    one, other = ("1, 1", "1, 1") if args.gpu else ("1, 8", "1, 4")

    def config(mesh: str) -> str:
        return f"--config={write_config(args, mesh)}"

    if "harvest" in wanted:
        stage(args, "harvest", "harvest", config(one))
    if {"train", "stopped"} & set(wanted):
        stage(args, "train, stopped", "train", config(one), stop_at=args.steps * 3 // 4)
    if {"train", "goes on"} & set(wanted):
        stage(args, "train, goes on" + ("" if args.gpu else " with 4 devices"), "train", config(other), devices=4)
    jobs = {"eval": ("eval", config(one)), "release": ("release", config(one)),
            "features": ("features", run, f"--tokens={args.index_tokens}"), "dashboard": ("dashboard", run),
            "search": ("search", "like", run, "5"), "convert": ("convert", run / "release", place / "converted", "--to=saelens")}
    for name, words in jobs.items():
        if name in wanted:
            stage(args, name, *words)


if __name__ == "__main__":
    main()
