"""What benchmarks/gpu.py measures, shared by the process that reports and those that measure."""

import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace

BFLOAT16 = {"train.compute_dtype": "bfloat16"}
_LAZY = {"train.optimizer": "lazy"}


@dataclass(frozen=True)
class Case:
    """Whole training steps. paths: of `saejax.bench.training.PATHS`. changes: keys of the config. dead: share of the features
    that are held dead. seconds: what a section is expected to take on a GPU, of saejax and of the peers (0: no peers).
    """

    kind: str
    d_in: int
    d_sae: int
    batch: int
    k: int = 0
    paths: tuple[str, ...] = ("dense",)
    changes: dict = field(default_factory=dict)
    dead: float = 0.0
    seconds: int = 20
    peer_seconds: int = 0

    @property
    def shape(self) -> str:
        k = f", k {self.k}" if self.k else ""
        return f"{self.d_in:,} to {self.d_sae:,}, B {self.batch:,}{k}"

    def tiny(self) -> "Case":
        """The same at a size for any machine."""
        return replace(self, d_in=64, d_sae=max(1024, self.d_sae >> 8), batch=128, k=8 if self.k else 0, seconds=1,
                       peer_seconds=min(self.peer_seconds, 1))


CASES = {
    "topk-131k": Case("topk", 2304, 131_072, 4096, 64, ("sparse", "dense"), seconds=35, peer_seconds=15),
    "topk-32k": Case("topk", 768, 32_768, 8192, 32, ("sparse", "dense"), seconds=25, peer_seconds=12),
    "batchtopk-131k": Case("batchtopk", 2304, 131_072, 4096, 64, ("sparse",)),
    "matryoshka-131k": Case("matryoshka", 2304, 131_072, 4096, 64, ("sparse",)),
    "relu-32k": Case("relu", 2304, 32_768, 8192, seconds=15),
    "jumprelu-32k": Case("jumprelu", 2304, 32_768, 8192, seconds=15),
    "topk-1m-lazy": Case("topk", 2304, 1_048_576, 4096, 64, ("sparse",), _LAZY, seconds=30, peer_seconds=20),
    "topk-4k": Case("topk", 768, 4096, 1024, 32, ("sparse", "dense"), seconds=15, peer_seconds=8),
    "topk-131k-dead": Case("topk", 2304, 131_072, 4096, 64, ("sparse",), dead=0.1, peer_seconds=12),
}

# Compiler flags that may bring JAX's matrix product closer to torch's; each needs a process of its own.
TRIALS = {
    "no-triton-gemm": "--xla_gpu_enable_triton_gemm=false",
    "autotune-0": "--xla_gpu_autotune_level=0",
    "cublaslt": "--xla_gpu_enable_triton_gemm=false --xla_gpu_enable_cublaslt=true",
    "autotune-5": "--xla_gpu_autotune_level=5",
    "exhaustive": "--xla_gpu_exhaustive_tiling_search=true",
}


@dataclass(frozen=True)
class Section:
    """A process. what: "products", "selection", "steps" or "peers"; script: the program that measures it."""

    what: str
    script: str
    seconds: int
    case: str = ""
    flags: str = ""


def sections(tiny: bool) -> dict[str, Section]:
    """By name, most important first."""
    out = {"products": Section("products", "gpu_jax.py", 15), "torch-products": Section("products", "gpu_torch.py", 10)}
    cases = {name: case.tiny() if tiny else case for name, case in CASES.items()}
    late = {}
    for number, (name, case) in enumerate(cases.items()):
        if number == 2:
            out["selection"] = Section("selection", "gpu_jax.py", 25)
            out |= {f"trial-{name}": Section("products", "gpu_jax.py", 10, flags=flags)
                    for name, flags in list(TRIALS.items())[:3]}
        if case.peer_seconds:
            last = late if number > 2 else out
            last[f"{name}:peers"] = Section("peers", "gpu_torch.py", case.peer_seconds, name)
        out[name] = Section("steps", "gpu_jax.py", case.seconds, name)
    late |= {f"trial-{name}": Section("products", "gpu_jax.py", 12, flags=flags) for name, flags in list(TRIALS.items())[3:]}
    return {name: replace(section, seconds=1) if tiny else section for name, section in (out | late).items()}


def measured(seconds: Callable[[int], float], repeats: int = 5, target: float = 0.4) -> dict:
    """Milliseconds of one of the steps that `seconds(n)` times n of: median and quartiles of repeats that take about `target`
    seconds each, and the seconds of the very first step. The second call is the warm-up.
    """
    first, each = seconds(1), seconds(2) / 2
    n = max(1, min(50, round(target / each)))
    values = [1e3 * seconds(n) / n for _ in range(repeats if each < target else 3)]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"ms": middle, "low": low, "high": high, "steps": n, "repeats": len(values), "first_s": first}


def emitter() -> Callable[..., None]:
    """`emit(**row)`: a line of JSON for the process that reports. Whatever else is printed goes to stderr from now on."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr

    def emit(**row) -> None:
        print(json.dumps(row), file=out, flush=True)

    return emit


def attempt(emit: Callable[..., None], what: str, make: Callable[[], dict], **row) -> None:
    """A row with what `make` measures, or with the reason why there is none: the ones after it are still measured."""
    try:
        emit(what=what, **row, **make())
    except Exception as error:  # out of memory, a missing function, a shape that a kernel does not take
        emit(what=what, **row, failed=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error) else ''}")
