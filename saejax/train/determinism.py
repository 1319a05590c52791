"""Where a run that is stopped and resumed ends in the same bits, and what `train.deterministic` asks of the compiler for it.

XLA's programs for CPUs and TPUs are deterministic by themselves. On a GPU two things are not: floats that are added at the same
place by atomics come in no fixed order, and the compiler takes kernels by timing them, anew in every process. Both are options
of a single program, so nothing has to be set before jax starts, and other programs keep their speed.
"""

import functools
import re
from collections.abc import Callable, Mapping

import jax
import jaxlib

from saejax.config import TrainOptions

# By name as `jax.jit(compiler_options=)` takes them. The first implies the second as a flag of the process only.
OPTIONS = {
    "xla_gpu_deterministic_ops": True,             # no atomics in cuBLAS and reductions; other scatters one update at a time
    "xla_gpu_exclude_nondeterministic_ops": True,  # the same for what was moved to this option; no timing of fusions
    "xla_gpu_autotune_level": 0,                   # the first kernel that fits, not the fastest of a measurement
}
NATIVE_SCATTERS = (0, 11, 1)  # jaxlib that compiles float scatter-adds to the GPU's own atomics again


def is_gpu(platform: str | None = None) -> bool:
    """Whether a platform, or the one that is here, is a GPU."""
    return (platform or jax.default_backend()) in ("gpu", "cuda", "rocm")


def compiler_options(train: TrainOptions, platform: str | None = None) -> dict[str, bool | int] | None:
    """For `jax.jit`: `OPTIONS` on a GPU with `train.deterministic`, else none."""
    return dict(OPTIONS) if train.deterministic and is_gpu(platform) else None


def jit(function: Callable, train: TrainOptions, **options):
    """`jax.jit` of a function of a module with a run's `compiler_options`; the same object for equal arguments."""
    return _jitted(function, train.deterministic and is_gpu(), tuple(sorted(options.items())))


@functools.cache
def _jitted(function: Callable, pinned: bool, options: tuple):
    return jax.jit(function, compiler_options=dict(OPTIONS) if pinned else None, **dict(options))


def machine() -> dict[str, str]:
    """What else the bits depend on, as checkpoints record it: jaxlib, platform, kind of device, version of its runtime."""
    device = jax.devices()[0]
    return {"jaxlib": jaxlib.__version__, "platform": device.platform, "device": device.device_kind,
            "runtime": " ".join(device.client.platform_version.split())}


def promise(deterministic: bool, machine: Mapping[str, str]) -> str:
    """A sentence on what resuming a run gives, by its `train.deterministic` and the machine of its checkpoint; empty: unknown."""
    if not machine:
        return ""
    same = "with the same mesh, process count, libraries and kind of device"
    if not is_gpu(machine["platform"]):
        return f"Stopped and resumed {same}, it ends in the same bits."
    if deterministic:
        return f"Stopped and resumed {same}, it ends in the same bits (train.deterministic)."
    return ("Stopped and resumed, it does not end in the same bits: on a GPU without train.deterministic floats are added in no "
            "fixed order, and every process takes its kernels by timing them.")


def moved(deterministic: bool, before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The line to say where a run goes on elsewhere than it was saved and would else end in the same bits; empty: none."""
    changed = [f"{key} {before[key]} -> {now[key]}" for key in now if key in before and before[key] != now[key]]
    if not changed or (is_gpu(now["platform"]) and not deterministic):
        return ""
    return f"resumed on other software or hardware ({'; '.join(changed)}): what follows agrees to rounding, not in every bit"


def slow_scatters(platform: str, version: str) -> str:
    """The line to say where jaxlib makes float scatter-adds slow on a GPU (0.10.2 and 0.11.0); empty: it does not."""
    numbers = tuple(map(int, re.findall(r"\d+", version)[:3]))
    if not is_gpu(platform) or numbers >= NATIVE_SCATTERS:
        return ""
    return (f"jaxlib {version} compiles float scatter-adds on GPUs to compare-and-swap loops, which are many times slower where "
            "features repeat (the sparse path): use Python 3.12 or newer and jax 0.11.1 or newer "
            "(pip install 'saejax[cuda]' there takes it)")


def looped_scatters(train: TrainOptions, platform: str) -> str:
    """The line to say where `train.deterministic` has scatter-adds to order; empty: there are none, or nothing orders them."""
    if not compiler_options(train, platform) or not (train.lazy or train.path == "sparse"):
        return ""
    key = f"train.optimizer = {train.optimizer!r}" if train.lazy else "train.path = 'sparse'"
    return (f"config.train.deterministic with {key}: on a GPU each scatter-add becomes a loop of one update at a time, which is "
            "slow; without it the dense path adds in matrix products")


def notes(train: TrainOptions) -> list[str]:
    """Lines to say once as training starts."""
    platform = jax.default_backend()
    lines = [looped_scatters(train, platform) or slow_scatters(platform, jaxlib.__version__)]
    return [line for line in lines if line]
