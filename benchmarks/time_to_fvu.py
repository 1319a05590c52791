"""Seconds of training until the FVU of fresh rows falls to a bar, beside eai-sparsify: the demo's SAE on the demo's store.

    python benchmarks/time_to_fvu.py STORE --peer-python=PYTHON [--bars 0.25 0.2] [--most-steps 384]

STORE: runs/demo/store of `make demo`. Both sides take the same rows in the same order, one pass, so that the FVU of a batch is
that of rows never seen; its mean over the last 16 steps counts. topk, 4,608 features, k = 32, batch 1,024, float32, the same
clipping, no decay of the rate. saejax trains with the demo's options; eai-sparsify with its own rate and with the demo's. The
clock runs during steps only: compilation and reading are left out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
WIDTH, FEATURES, K, BATCH, LR, OVER = 576, 4608, 32, 1024, 2e-3, 16


def write_rows(store: str, path: Path) -> None:
    """The store's rows shuffled, mean squared norm = width, float32."""
    import numpy as np

    from saejax.data.store import Store

    opened = Store.open(store)
    name, _ = opened.spec.hookpoints[0]
    x = np.asarray(opened.read(name, 0, opened.rows), np.float32)[opened.keep(0, opened.rows)]
    x = x[np.random.default_rng(0).permutation(len(x))]
    np.save(path, x * np.sqrt(x.shape[1] / np.square(x).sum(1).mean()))


def ours(path: str):
    """step(rows) -> FVU before it."""
    import jax
    import numpy as np

    from configs.demo import get_config
    from saejax.base import sharding
    from saejax.base.records import ActivationStats
    from saejax.config import resolve
    from saejax.sae import SAESpec
    from saejax.train.state import initial_state
    from saejax.train.step import make_step

    c = get_config()
    c.sae.normalize, c.train.tokens = "none", 10**9
    c.train.lr_warmup = 0.0
    config = resolve(c)
    x = np.load(path, mmap_mode="r")[:32_768]
    norms = np.linalg.norm(x, axis=1)
    stats = ActivationStats(len(x), x.mean(0).astype(np.float64), norms.mean(), np.square(norms).mean(), np.median(norms))
    spec, mesh = SAESpec.from_options(config.sae, {config.sae.hookpoint: WIDTH}), sharding.single_device_mesh()
    jax.set_mesh(mesh)
    train_step, state = make_step(config, spec, 10**6), [initial_state(config, spec, [stats], np.asarray(x), mesh)]

    def step(rows) -> float:
        state[0], metrics = train_step(state[0], sharding.place(rows, sharding.sharding(mesh, "rows_at_rest", None)))
        return float(metrics["fvu"])

    return step


def worker(w: dict) -> None:
    """Prints a JSON line for every step: seconds so far, mean FVU of the last steps."""
    import numpy as np

    x = np.load(w["rows"], mmap_mode="r")
    if w["side"] == "saejax":
        step, given = ours(w["rows"]), np.array
    else:
        import peers
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        given = lambda rows: torch.from_numpy(np.array(rows))  # noqa: E731
        step = peers.sparsify_step({"d_in": WIDTH, "d_sae": FEATURES, "k": K, "variant": "fused"} | w, given(x[:32_768]))
    spent, last = 0.0, deque(maxlen=OVER)
    for number in range(min(w["most"], len(x) // BATCH)):
        rows = given(x[number * BATCH:(number + 1) * BATCH])
        start = time.perf_counter()
        last.append(step(rows))
        spent += time.perf_counter() - start if number else 0.0  # the first step compiles
        print(json.dumps([spent, sum(last) / len(last)]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", nargs="?")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--bars", type=float, nargs="+", default=[0.3, 0.25, 0.2])
    parser.add_argument("--most-steps", type=int, default=384)
    args = parser.parse_args()
    if args.worker:
        worker(json.loads(args.worker))
        return
    print("| side | " + " | ".join(f"s to FVU {bar:g}" for bar in args.bars) + " | FVU at the end | s for all steps |")
    print("|---|" + "---|" * (len(args.bars) + 2))
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.npy"
        write_rows(args.store, rows)
        for title, python, own in (("saejax", sys.executable, {"side": "saejax"}),
                                   ("eai-sparsify, fused, its own rate", args.peer_python, {"side": "eai-sparsify"}),
                                   (f"eai-sparsify, fused, rate {LR:g}", args.peer_python, {"side": "eai-sparsify", "lr": LR})):
            w = own | {"rows": str(rows), "most": args.most_steps}
            env = os.environ | {"SPARSIFY_DISABLE_TRITON": "1"}
            said = subprocess.run([python, __file__, "--worker", json.dumps(w)], env=env, capture_output=True, text=True)
            lines = [json.loads(line) for line in said.stdout.splitlines() if line.startswith("[")]
            if said.returncode or not lines:
                print(f"| {title} | failed: {said.stderr.strip().splitlines()[-1][:200] if said.stderr else ''} |", flush=True)
                continue
            times = [next((f"{t:.0f}" for number, (t, fvu) in enumerate(lines) if fvu <= bar and number >= OVER), "not reached")
                     for bar in args.bars]
            print(f"| {title} | {' | '.join(times)} | {lines[-1][1]:.3f} | {lines[-1][0]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
