"""The sections of benchmarks/gpu.py that torch measures, each in a process of its own; `gpu.py` starts it."""

import argparse
import os
from collections.abc import Callable

import peers
import torch
from gpu_cases import CASES, Case, attempt, emitter, measured

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def times(call: Callable) -> Callable[[int], float]:
    return peers.timed(lambda number: call(), wait)


def product(n: int, transposed: bool) -> dict:
    """A bfloat16 product of two random n x n matrices."""
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    row = measured(times(lambda: a @ (b.t() if transposed else b)))
    return row | {"tflops": 2 * n**3 / row["ms"] / 1e9}


def products(emit, case: Case, tiny: bool) -> None:
    for layout in ("NN", "NT"):
        attempt(emit, f"torch product, bfloat16, {layout}", lambda layout=layout: product(256 if tiny else 8192, layout == "NT"))


def dense(case: Case) -> Callable[[int], float]:
    """seconds(n) of topk steps as dictionary_learning and SAELens compute them, in plain torch: all activations in a dense
    matrix, three more products in the backward pass; bfloat16 autocast, clipping, fused Adam, unit decoder rows.
    """
    W = torch.randn(case.d_sae, case.d_in, device=DEVICE) / case.d_in**0.5
    W_enc, W_dec = torch.nn.Parameter(W), torch.nn.Parameter(W.t().contiguous())
    b_enc, b_dec = (torch.nn.Parameter(torch.zeros(n, device=DEVICE)) for n in (case.d_sae, case.d_in))
    parameters = [W_enc, W_dec, b_enc, b_dec]
    optimizer = torch.optim.Adam(parameters, lr=1e-4, fused=True)
    x = rows(case)

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            pre = torch.relu((x - b_dec) @ W_enc.t() + b_enc)
            values, indices = pre.topk(case.k, sorted=False)
            acts = torch.zeros_like(pre).scatter_(-1, indices, values)
            loss = (acts @ W_dec.t() + b_dec - x).float().pow(2).sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            W_dec.div_(W_dec.norm(dim=0, keepdim=True))

    return times(step)


def sparsify(case: Case) -> Callable[[int], float]:
    """seconds(n) of eai-sparsify's steps: its Triton kernels and its own bfloat16 autocast where there is a GPU, fused Adam,
    clipping.
    """
    if DEVICE == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    with torch.device(DEVICE):
        return peers.sparsify(dict(d_in=case.d_in, d_sae=case.d_sae, batch=case.batch, k=case.k, variant="fused", dead=case.dead),
                              rows(case))


def rows(case: Case) -> torch.Tensor:
    return torch.from_numpy(peers.rows(case.batch, case.d_in)).to(DEVICE)


def steps(emit, case: Case, tiny: bool) -> None:
    sides = {"eai-sparsify": sparsify} | ({} if case.dead or case.changes else {"torch, dense topk": dense})
    for name, make in sides.items():
        attempt(emit, name, lambda make=make: timed(make(case), case), path="peer", kind="topk", shape=case.shape,
                rows=case.batch, dtype="bfloat16 autocast")
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def timed(seconds: Callable[[int], float], case: Case) -> dict:
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    row = measured(seconds)
    return row | {"peak_gb": torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("products", "peers"))
    parser.add_argument("--case", default="topk-131k")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    emit = emitter()
    machine = {"card": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu", "torch": torch.__version__}
    try:
        import triton
        machine["triton"] = triton.__version__
    except ImportError:
        machine["triton"] = "none"
    emit(machine=machine)
    case = CASES[args.case].tiny() if args.tiny else CASES[args.case]
    {"products": products, "peers": steps}[args.what](emit, case, args.tiny)


if __name__ == "__main__":
    main()
