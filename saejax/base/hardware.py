"""Chips and how they are connected: the constants behind predictions, and names of topologies such as `v5p:4x8x8`."""

import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from saejax.base.errors import ConfigError


@dataclass(frozen=True)
class Chip:
    """What one chip can do, as its vendor states it.

    flops: dense bfloat16 FLOP/s; float32: what part of it float32 products reach, which are six of bfloat16 on a TPU
    and take no tensor core on a GPU. bandwidth: of its memory, B/s; memory: bytes. link: B/s to its neighbours, of a TPU along
    one axis of the torus in both directions, of a GPU inside its node; across: B/s of a GPU to other nodes. host: B/s from the
    host. Source: TPU figures from "How to Scale Your Model" (Austin et al. 2025), GPU figures from their data sheets; `cpu` is
    two cores of a server, as products and gathers of rows that fit its caches reach them.
    """

    name: str
    platform: str
    flops: float
    float32: float
    bandwidth: float
    memory: float
    link: float
    across: float
    host: float


CHIPS = {chip.name: chip for chip in (
    Chip("v5e", "tpu", 1.97e14, 1 / 6, 8.1e11, 16e9, 9e10, 9e10, 1.5e10),
    Chip("v5p", "tpu", 4.59e14, 1 / 6, 2.8e12, 96e9, 1.8e11, 1.8e11, 1.5e10),
    Chip("v6e", "tpu", 9.2e14, 1 / 6, 1.6e12, 32e9, 1.8e11, 1.8e11, 3.2e10),
    Chip("h100", "gpu", 9.89e14, 0.068, 3.35e12, 80e9, 4.5e11, 5e10, 6.4e10),
    Chip("h200", "gpu", 9.89e14, 0.068, 4.8e12, 141e9, 4.5e11, 5e10, 6.4e10),
    Chip("cpu", "cpu", 2.5e11, 1.0, 2.5e10, 4e9, 1e10, 1e10, 1e10),
)}
NODE = 8  # GPUs that share a node's fast links, at most

_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "v5e": _FLAT, "v6e": _FLAT,
    "v5p": ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16), (8, 16, 16),
            (16, 16, 16)),
}

_KINDS = {"v5 lite": "v5e", "v5e": "v5e", "v5p": "v5p", "v5": "v5p", "v6 lite": "v6e", "v6e": "v6e", "h200": "h200",
          "h100": "h100"}
_UNKNOWN = {"tpu": "v5e", "gpu": "h100", "cuda": "h100", "rocm": "h100", "cpu": "cpu"}  # a chip that is not in the table


@dataclass(frozen=True)
class Topology:
    """Chips of one sort: a TPU slice (`shape`: of its torus), GPUs (per node, nodes), or simulated CPU devices (one number)."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of chips, each of them one device of jax."""
        return math.prod(self.shape)

    @property
    def hosts(self) -> int:
        """Machines that feed the chips: nodes of GPUs, TPU hosts of 4 chips."""
        per_host = {"gpu": self.shape[0], "tpu": 4}.get(self.chip.platform, self.size)
        return -(-self.size // per_host)

    @property
    def name(self) -> str:
        """As `parse` takes it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def ring(self, group: int, stride: int = 1) -> float:
        """B/s at which a chip takes part in a collective over `group` chips that stand `stride` apart in the order of devices.

        TPU: all axes of the torus that the group reaches over work at once, each as a ring. GPU: the links inside the node, or
        the network as soon as the group leaves it.
        """
        if self.chip.platform == "gpu":
            return self.chip.link if group * stride <= self.shape[0] else self.chip.across
        axes, below = 0, 1
        for length in reversed(self.shape):
            if length > 1 and below * length > stride and below < group * stride:
                axes += 1
            below *= length
        return self.chip.link * max(axes, 1)


def parse(text: str) -> Topology:
    """`v5e:8x8`, `v5p:4x8x8`, `v6e:16x16`, `h100:8x4` (GPUs per node x nodes), `h200:8`, `cpu:8`. Raises `ConfigError`."""
    name, _, shape = text.strip().lower().partition(":")
    if name not in CHIPS:
        near = difflib.get_close_matches(name, CHIPS, n=1, cutoff=0.7)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(CHIPS)}"
        raise ConfigError(f"topology={text}: unknown chip {name!r}; {hint}")
    example = "x".join(map(str, SHAPES[name][-3])) if name in SHAPES else "8" if name == "cpu" else "8x4"
    if not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})*", shape):
        raise ConfigError(f"topology={text}: the shape is missing or no product of sizes; write for example {name}:{example}")
    sizes = tuple(map(int, shape.split("x")))
    if name in SHAPES:
        return Topology(CHIPS[name], _slice(text, name, sizes))
    if len(sizes) > (1 if name == "cpu" else 2) or (name != "cpu" and sizes[0] > NODE):
        what = "a number of devices" if name == "cpu" else f"GPUs per node (at most {NODE}) x nodes"
        raise ConfigError(f"topology={text}: the shape of {name} is {what}; write for example {name}:{example}")
    return Topology(CHIPS[name], sizes)


def _slice(text: str, name: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
    if tuple(sorted(sizes)) in map(tuple, map(sorted, SHAPES[name])):
        return sizes
    if len(sizes) == 1 and (same := [shape for shape in SHAPES[name] if math.prod(shape) == sizes[0]]):
        return same[0]
    nearest = sorted(SHAPES[name], key=lambda shape: abs(math.log(math.prod(shape) / math.prod(sizes))))[:3]
    offered = ", ".join(f"{name}:{'x'.join(map(str, shape))}" for shape in nearest)
    raise ConfigError(f"topology={text}: {name} has no slice of that shape; nearest are {offered}")


def every() -> Iterator[Topology]:
    """The topologies that can be bought or granted, by chip, the smallest first."""
    for name, shapes in SHAPES.items():
        yield from (Topology(CHIPS[name], shape) for shape in shapes)
    for name in ("h100", "h200"):
        yield from (Topology(CHIPS[name], (n,)) for n in (1, 2, 4, NODE))
        yield from (Topology(CHIPS[name], (NODE, nodes)) for nodes in (2, 4, 8, 16, 32))


def compute_dtype(wanted: str, platform: str, capability: str | None = None) -> str:
    """What `train.compute_dtype` means on a platform: auto is bfloat16 where products of it are in hardware, else float32.

    capability: of a GPU by NVIDIA ("9.0"), None: not known, or no such GPU. Raises `ConfigError` for bfloat16 on a GPU that has
    none (before 8.0, Ampere).
    """
    has = platform != "cpu" and not (capability and re.fullmatch(r"[0-7](\.\d+)?", capability))
    if wanted == "auto":
        return "bfloat16" if has else "float32"
    if wanted == "bfloat16" and platform != "cpu" and not has:
        raise ConfigError(f"config.train.compute_dtype: this GPU (compute capability {capability}) has no bfloat16 products; set "
                          "float32, or auto")
    return wanted


def compute_dtype_here(wanted: str) -> str:
    """`compute_dtype` on the devices of this job."""
    import jax
    device = jax.local_devices()[0]
    capability = getattr(device, "compute_capability", None)
    return compute_dtype(wanted, device.platform, capability if isinstance(capability, str) else None)


def chip_of(device) -> Chip:
    """The chip that a device (or an abstract one) is; one that is not in the table counts as the nearest of its platform."""
    kind = device.device_kind.lower()
    return CHIPS[next((name for word, name in _KINDS.items() if word in kind), _UNKNOWN.get(device.platform, "cpu"))]


def peak(device) -> float | None:
    """Dense bfloat16 FLOP/s of a device, as its vendor states them; None where the table does not know: CPUs, other chips, and
    cards of a name in it that are slower than the one it means (PCIe, NVL) or a part of one (MIG).
    """
    kind = device.device_kind.lower()
    if device.platform == "cpu" or re.search(r"pcie|nvl|mig", kind):
        return None
    return next((CHIPS[name].flops for word, name in _KINDS.items() if word in kind), None)


def present(devices) -> Topology:
    """The topology of the devices of this job; a chip that is not in the table counts as the nearest of its platform."""
    devices = list(devices)
    chip, n = chip_of(devices[0]), len(devices)
    coords = [getattr(device, "coords", None) for device in devices]
    if chip.platform == "tpu" and all(coords):
        shape = tuple(len(set(axis)) for axis in zip(*coords, strict=True))
        if math.prod(shape) == n:
            return Topology(chip, shape)
    if chip.platform == "gpu":
        per_node = sum(device.process_index == devices[0].process_index for device in devices)
        # A process per GPU says nothing about nodes: then they are taken to be full ones.
        per_node = per_node if per_node > 1 else min(NODE, n)
        return Topology(chip, (per_node, n // per_node) if n % per_node == 0 else (n,))
    return Topology(chip, (n,))
