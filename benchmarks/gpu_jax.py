"""The sections of benchmarks/gpu.py that JAX measures, each in a process of its own; `gpu.py` starts it."""

import argparse
import collections
import gzip
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
from gpu_cases import BFLOAT16, CASES, Case, attempt, emitter, measured
from jax import lax

from saejax.base import sharding

LAYOUTS = {"NN": "ij,jk->ik", "NT": "ij,kj->ik", "TN": "ji,jk->ik"}  # which operand is transposed
_DEAD_BELOW = 1.5  # standard deviations of the pre-activations by which those of dead features lie lower


def times(function: Callable, *args) -> Callable[[int], float]:
    """seconds(n) of n calls that are queued one after the other; waits at the end only."""
    compiled = jax.jit(function)

    def seconds(n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            out = compiled(*args)
        jax.block_until_ready(out)
        return time.perf_counter() - start

    return seconds


def product(n: int, layout: str, dtype=jnp.bfloat16, out=None, precision=None) -> dict:
    """A product of two random n x n matrices."""
    a, b = (jax.random.normal(jax.random.key(seed), (n, n), dtype) for seed in range(2))
    row = measured(times(lambda a, b: jnp.einsum(LAYOUTS[layout], a, b, precision=precision, preferred_element_type=out), a, b))
    return row | {"tflops": 2 * n**3 / row["ms"] / 1e9}


def copied(megabytes: int) -> dict:
    """A pass over float32, bytes read plus bytes written."""
    x = jnp.ones((megabytes * 2**18,), jnp.float32)
    row = measured(times(lambda x: x + 1, x))
    return row | {"tb_s": 2 * x.nbytes / row["ms"] / 1e9}


def products(emit, case: Case, tiny: bool, flags: str) -> None:
    n, trial = 256 if tiny else 8192, {"flags": flags} if flags else {}
    for layout in LAYOUTS:
        attempt(emit, f"jax product, bfloat16, {layout}", lambda layout=layout: product(n, layout), **trial)
    attempt(emit, "jax product, bfloat16, NT, float32 out", lambda: product(n, "NT", out=jnp.float32), **trial)
    if not flags:
        for precision in ("default", "highest"):
            attempt(emit, f"jax product, float32, {precision} precision",
                    lambda precision=precision: product(n, "NN", jnp.float32, precision=precision))
        attempt(emit, "jax copy", lambda: copied(4 if tiny else 4096))


def selectors() -> dict[str, Callable]:
    """(values, indices) of the k largest of each row, by name."""
    out = {"lax.top_k": lax.top_k}
    try:
        from saejax.sae.select import largest
    except ImportError:
        return out
    return out | {"saejax": largest}


def selection(emit, case: Case, tiny: bool, flags: str) -> None:
    """lax.top_k beside saejax's own selection, alone and behind the encoder's product in one program."""
    for case in (CASES[name] for name in ("topk-131k", "topk-32k", "topk-1m-lazy")):
        case = case.tiny() if tiny else case
        selecting(emit, case)
        jax.clear_caches()


def selecting(emit, case: Case) -> None:
    x, W = (jax.random.normal(jax.random.key(seed), (n, case.d_in), jnp.bfloat16)
            for seed, n in enumerate((case.batch, case.d_sae)))

    def encoded(x, W):
        return jnp.einsum("bd,fd->bf", x, W, preferred_element_type=jnp.float32)

    pre_BF, known = jax.jit(encoded)(x, W), selectors()
    row = {"shape": case.shape, "rows": case.batch}
    for name, select in known.items():
        attempt(emit, f"selection, {name}", lambda of=select: measured(times(lambda pre_BF: of(pre_BF, case.k), pre_BF)), **row)
    if "saejax" in known:
        attempt(emit, "selection, saejax: equal to lax.top_k", lambda: {"equal": equal(known, pre_BF[:64], case.k)}, **row)
        attempt(emit, "selection, saejax, behind the product",
                lambda: measured(times(lambda x, W: known["saejax"](encoded(x, W), case.k), x, W)), **row)


def equal(known: dict[str, Callable], pre_BF: jax.Array, k: int) -> bool:
    """Whether both name the same values."""
    values = [jnp.asarray(jax.jit(lambda pre_BF, of=of: of(pre_BF, k))(pre_BF)[0]) for of in known.values()]
    return bool((jnp.sort(values[0]) == jnp.sort(values[1])).all())


def killed(training, share: float) -> None:
    """Makes the first `share` of the features dead: counters above `sae.dead_tokens`, and biases with which their best
    pre-activations stay below what the k best of a row have, while the best of them are positive, so that AuxK has values and
    gradients to work on.
    """
    from saejax.sae import pre_activations
    from saejax.train.step import SATURATED

    state = training.state
    dead_F = jnp.arange(training.spec.d_sae) < share * training.spec.d_sae
    with jax.set_mesh(training.mesh):
        dead_F = jax.sharding.reshard(dead_F, sharding.spec("features"))
        pre_BF = pre_activations(training.spec, state.params, sharding.gathered(state.normalization.apply(training.rows)))
        b_enc = jnp.where(dead_F, -_DEAD_BELOW * (pre_BF - state.params.b_enc).std(), state.params.b_enc)
        since_F = jnp.where(dead_F, jnp.uint32(SATURATED), state.tokens_since_fired_F)
    training.state = state.replace(params=state.params.replace(b_enc=b_enc), tokens_since_fired_F=since_F)


def steps(emit, case: Case, tiny: bool, flags: str) -> None:
    """Whole training steps of each path."""
    from saejax.bench.options import BenchOptions
    from saejax.bench.training import Training

    options = BenchOptions(d_in=case.d_in, d_sae=case.d_sae, batch=case.batch, k=case.k or 32)
    training = Training(case.kind, options, sharding.single_device_mesh(), **(BFLOAT16 | case.changes))
    for path in case.paths:
        row = dict(path=path, kind=case.kind, shape=case.shape, rows=case.batch, dtype=training.spec.compute_dtype)
        attempt(emit, "saejax", lambda path=path: timed(training, path, case), **row)
        if not case.dead:
            attempt(emit, "kernels", lambda path=path: {"kernels": kernels(lambda n: training.seconds(path, n))}, **row)


def timed(training, path: str, case: Case) -> dict:
    def seconds(n: int) -> float:
        if case.dead:  # afresh: some come back to life
            killed(training, case.dead)
        return training.seconds(path, n)

    row = measured(seconds)
    more = {"dead": float((training.state.tokens_since_fired_F > 10**9).mean())} if case.dead else {}
    flops = (10 if path == "dense" else 2) * case.batch * case.d_in * case.d_sae
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return row | more | {"tflops": flops / row["ms"] / 1e9, "peak_gb": peak / 1e9 if peak else None}


def kernels(seconds: Callable[[int], float], n: int = 3) -> list[tuple[str, float, float]]:
    """(name, ms, calls) of one step by the device's own clock, the longest first, from a trace of n steps."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = options.host_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            seconds(n)
        (file,) = Path(folder).glob("plugins/profile/*/*.trace.json.gz")
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event.get("name") == "process_name"}
    streams = {(event["pid"], event["tid"]) for event in events
               if event.get("name") == "thread_name" and event["args"]["name"].startswith("Stream")}
    total, calls = collections.Counter(), collections.Counter()
    for event in events:
        if event.get("ph") == "X" and "GPU" in names[event["pid"]] and (event["pid"], event["tid"]) in streams:
            total[event["name"]] += event["dur"] / 1e3 / n
            calls[event["name"]] += 1 / n
    return [(name, ms, calls[name]) for name, ms in total.most_common(20)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("products", "selection", "steps"))
    parser.add_argument("--case", default="topk-131k")
    parser.add_argument("--flags", default="", help="what XLA_FLAGS holds, for the rows")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    emit = emitter()
    emit(machine={"card": jax.devices()[0].device_kind, "jax": jax.__version__, "jaxlib": jaxlib.__version__})
    case = CASES[args.case].tiny() if args.tiny else CASES[args.case]
    {"products": products, "selection": selection, "steps": steps}[args.what](emit, case, args.tiny, args.flags)


if __name__ == "__main__":
    main()
