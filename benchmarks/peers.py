"""Rows per second of whole training steps beside those of the other libraries, alternating in one run.

    python benchmarks/peers.py --peer-python=PYTHON [--peer-path=DIR] [--workloads topk relu] [--rounds 7] [--json FILE]

PYTHON: an interpreter with torch and the peers (sae-lens, dictionary-learning, eai-sparsify); DIR: where further packages of it
lie. For every pair (saejax, a peer in a variant) two processes are started on the same processors; they take turns, one
measurement each a round, and the other one waits. A step is all that training does with a batch: gradients, clipping to norm 1,
Adam with beta 0.9 and 0.999 (0 and 0.999 on both sides where ours has lazy rows), constraints of the decoder, dead counters.
float32, the same random rows in memory. Variants:

    shipped   the peer's own trainer, or its training loop's calls one by one where the loop wants a language model
    fused     with torch's fused Adam
    compiled  with that, and what the peer compiles by its own option, or its module by `torch.compile`

eai-sparsify runs with its option `optimizer="adam"`; it does not clip, which is added here (its loss is the FVU). A variant that
fails is listed with the reason. Prints a Markdown table: medians of the rounds with quartiles, ratio of the medians, peak memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORKLOADS = {  # kind, d_in, d_sae, batch, k, train.optimizer
    "topk": ("topk", 768, 16_384, 1024, 32, "adam"),
    "topk-2048": ("topk", 768, 16_384, 2048, 32, "adam"),
    "topk-64k": ("topk", 768, 65_536, 512, 32, "adam"),
    "topk-lazy": ("topk", 768, 16_384, 1024, 32, "lazy"),
    "topk-64k-lazy": ("topk", 768, 65_536, 512, 32, "lazy"),
    "relu": ("relu", 768, 16_384, 1024, 0, "adam"),
    "jumprelu": ("jumprelu", 768, 16_384, 1024, 0, "adam"),
}
PEERS = {  # variants
    "eai-sparsify": ("shipped", "fused", "compiled"),
    "sae-lens": ("shipped", "fused", "compiled"),
    "dictionary-learning": ("shipped", "fused"),
}
LIBRARIES = {"topk": PEERS, **dict.fromkeys(("relu", "jumprelu"), ("sae-lens", "dictionary-learning"))}
PAUSE = 0.5  # seconds between turns: threads that still spin for work come to rest
_STEPS = 1_000_000  # of the peers' schedules


def rows(batch: int, width: int):
    """float32 [batch, width]; the same on both sides."""
    import numpy as np

    return np.random.default_rng(0).standard_normal((max(4096, batch), width), np.float32)[:batch]


def ours(w: dict):
    """seconds(steps) of saejax, on the path that training takes by itself."""
    from saejax.base import sharding
    from saejax.bench.options import BenchOptions
    from saejax.bench.training import Training

    options = BenchOptions(d_in=w["d_in"], d_sae=w["d_sae"], batch=w["batch"], k=w["k"] or 32)
    training = Training(w["kind"], options, sharding.single_device_mesh(),
                        **{"train.clip": 1.0, "train.beta2": 0.999, "train.optimizer": w["optimizer"]})
    return lambda steps: training.seconds("auto", steps)


def timed(step, wait=lambda: None):
    """seconds(steps) of a peer, whose step is called with its number; wait: for the device (a CPU does not run ahead)."""
    done = 0

    def seconds(steps: int) -> float:
        nonlocal done
        start = time.perf_counter()
        for _ in range(steps):
            step(done)
            done += 1
        wait()
        return time.perf_counter() - start

    return seconds


def set_up(optimizer, w: dict) -> None:
    """Betas and variant of a peer's Adam."""
    for group in optimizer.param_groups:
        group["betas"] = (0.0 if w.get("optimizer") == "lazy" else 0.9, 0.999)
        if w["variant"] != "shipped":
            group["fused"], group["foreach"] = True, False


def sparsify(w: dict, x):
    """seconds(steps) on the device of x."""
    import torch

    step = sparsify_step(w, x)
    return timed(lambda number: step(x), torch.cuda.synchronize if x.is_cuda else lambda: None)


def sparsify_step(w: dict, x):
    """step(rows) -> FVU before it. x: rows whose mean b_dec starts from. w may say `lr`, else the library's own, and `dead`: the
    share of the features that are held dead, so that its AuxK (1/32) has work.
    """
    import torch
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(w["d_in"], SparseCoderConfig(num_latents=w["d_sae"], k=w["k"]), device=x.device)
    sae.b_dec.data = x.mean(0)
    optimizer = torch.optim.Adam(sae.parameters(), lr=w.get("lr") or 2e-4 / (w["d_sae"] / 2**14) ** 0.5)
    since, dead = torch.zeros(w["d_sae"], dtype=torch.long, device=x.device), None
    if w.get("dead"):
        dead = torch.arange(w["d_sae"], device=x.device) < w["dead"] * w["d_sae"]
        sae.encoder.bias.data[dead] -= 1.5 * sae.encoder(x[:64] - sae.b_dec).std().detach()
    forward = torch.compile(sae) if w["variant"] == "compiled" else sae
    set_up(optimizer, w)

    def step(x) -> float:
        sae.set_decoder_norm_to_unit_norm()
        did_fire = torch.zeros_like(since, dtype=torch.bool)
        out = forward(x=x, y=x, dead_mask=dead, total_variance=(x - x.mean(0)).pow(2).sum())
        did_fire[out.latent_indices.flatten()] = True
        fvu = float(out.fvu.detach())
        (out.fvu + out.multi_topk_fvu / 8 + out.auxk_loss / 32).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        since.add_(len(x))
        since[did_fire] = 0
        return fvu

    return step


def sae_lens(w: dict, x):
    import torch
    from sae_lens import saes
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    name = {"topk": "TopK", "relu": "Standard", "jumprelu": "JumpReLU"}[w["kind"]]
    own = {"k": w["k"]} if w["kind"] == "topk" else {}
    config = getattr(saes, f"{name}TrainingSAEConfig")(d_in=w["d_in"], d_sae=w["d_sae"], device="cpu", dtype="float32", **own)
    sae = getattr(saes, f"{name}TrainingSAE")(config)
    options = SAETrainerConfig(total_training_samples=_STEPS * w["batch"], train_batch_size_samples=w["batch"], lr_end=3e-5)
    trainer = SAETrainer(options, sae, iter(()))
    set_up(trainer.optimizer, w)
    if w["variant"] == "compiled":  # what its option compile_sae does
        sae.training_forward_pass = torch.compile(sae.training_forward_pass)

    def step(number: int) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return timed(step)


def dictionary_learning(w: dict, x):
    from importlib import import_module

    module, name, own = {"topk": ("top_k", "TopKTrainer", {"k": w["k"]}), "relu": ("standard", "StandardTrainerAprilUpdate", {}),
                         "jumprelu": ("jumprelu", "JumpReluTrainer", {})}[w["kind"]]
    make = getattr(import_module(f"dictionary_learning.trainers.{module}"), name)
    trainer = make(steps=_STEPS, activation_dim=w["d_in"], dict_size=w["d_sae"], layer=0, lm_name="none", device="cpu", **own)
    set_up(trainer.optimizer, w)
    return timed(lambda number: trainer.update(number, x))


def worker(w: dict) -> None:
    """Measures when a number of steps comes in on stdin; an empty line ends it. Everything it says but figures goes to stderr."""
    out, sys.stdout = sys.stdout, sys.stderr
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, w["processors"])
    if w["side"] == "saejax":
        seconds = ours(w)
    else:
        import torch

        torch.set_num_threads(len(w["processors"]))
        make = {"eai-sparsify": sparsify, "sae-lens": sae_lens, "dictionary-learning": dictionary_learning}[w["side"]]
        seconds = make(w, torch.from_numpy(rows(w["batch"], w["d_in"])))
    print(json.dumps(seconds(1)), file=out, flush=True)
    for line in sys.stdin:
        if not line.strip():
            break
        print(json.dumps(seconds(int(line))), file=out, flush=True)
    import resource
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024), file=out, flush=True)


class Side:
    """A process of one side. `first`: seconds of its first step, compilation included."""

    def __init__(self, python: str, path: list[str], w: dict):
        threads = str(len(w["processors"]))
        env = os.environ | {"PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": threads,
                            "MKL_NUM_THREADS": threads, "SPARSIFY_DISABLE_TRITON": "1"}
        self._said = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen([python, __file__, "--worker", json.dumps(w)], env=env, stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, stderr=self._said, text=True)
        self.first = self._answer()

    def _answer(self) -> float:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._said.seek(0)
            said = self._said.read().strip().splitlines()
            raise RuntimeError(said[-1][:200] if said else f"exit code {self._process.returncode}")
        return json.loads(line)

    def seconds(self, steps: int) -> float:
        """Of `steps` steps."""
        print(steps, file=self._process.stdin, flush=True)
        return self._answer()

    def end(self) -> int:
        """Ends the process; its peak memory in bytes."""
        print("", file=self._process.stdin, flush=True)
        peak = int(self._answer())
        self._process.wait()
        return peak

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def pair(args, w: dict, peer: str, variant: str) -> dict:
    """Both sides' rows per second, round by round, or why there are none."""
    sides = []
    try:
        sides.append(Side(sys.executable, [str(ROOT)], w | {"side": "saejax"}))
        sides.append(Side(args.peer_python, args.peer_path, w | {"side": peer, "variant": variant}))
        rates = ([], [])
        for number in range(args.rounds + 1):
            for side, values in zip(sides, rates, strict=True):
                time.sleep(PAUSE)
                rate = args.steps * w["batch"] / side.seconds(args.steps)
                if number:  # the first round is the warm-up
                    values.append(rate)
        first, peaks = [side.first for side in sides], [side.end() for side in sides]
    except RuntimeError as error:
        return {"workload": w, "peer": peer, "variant": variant, "failed": str(error)}
    finally:
        for side in sides:
            side.stop()
    return {"workload": w, "peer": peer, "variant": variant, "rows_per_s": dict(zip(("saejax", "peer"), rates, strict=True)),
            "first_step_s": first, "peak_bytes": peaks}


def shown(result: dict) -> str:
    w = result["workload"]
    kind = w["kind"] + (", lazy rows" if w["optimizer"] == "lazy" else "")
    head = f"| {kind}, {w['d_in']:,} to {w['d_sae']:,}, batch {w['batch']:,} | {result['peer']}, {result['variant']} | "
    if "failed" in result:
        return head + f"failed: {result['failed'].replace('|', '/')} | | | |"
    medians, cells = [], []
    for values in result["rows_per_s"].values():
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        medians.append(middle)
        cells.append(f"{middle:,.0f} ({low:,.0f} to {high:,.0f})")
    peaks = " / ".join(f"{peak / 2**30:.2f}" for peak in result["peak_bytes"])
    return head + f"{cells[0]} | {cells[1]} | {medians[0] / medians[1]:.2f} | {peaks} |"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--peer-path", nargs="*", default=[])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--variants", nargs="+", choices=("shipped", "fused", "compiled"),
                        default=["shipped", "fused", "compiled"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of a measurement")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write all rounds to this file")
    for name in ("d_in", "d_sae", "batch", "k"):
        parser.add_argument(f"--{name}", type=int, help="instead of the workload's own")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.worker:
        worker(json.loads(args.worker))
        return
    processors = sorted(os.sched_getaffinity(0))[:args.threads]
    print(f"{len(processors)} threads, {args.rounds} rounds of {args.steps} steps\n\n| workload | peer | saejax, rows/s | peer, "
          "rows/s | ratio | peak GiB, saejax / peer |\n|---|---|---|---|---|---|")
    results = []
    for name in args.workloads:
        w = dict(zip(("kind", "d_in", "d_sae", "batch", "k", "optimizer"), WORKLOADS[name], strict=True))
        w |= {key: getattr(args, key) for key in ("d_in", "d_sae", "batch", "k") if getattr(args, key) and w[key]}
        w["processors"] = processors
        for peer in (peer for peer in LIBRARIES[w["kind"]] if peer in args.peers):
            for variant in (variant for variant in PEERS[peer] if variant in args.variants):
                results.append(pair(args, w, peer, variant))
                print(shown(results[-1]), flush=True)
                if args.json:
                    args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
