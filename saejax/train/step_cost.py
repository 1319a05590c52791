"""What a training step costs on one chip: FLOPs, collectives, seconds; and which mesh shape is the cheapest.

The model is a sum of rooflines, nothing of it overlapped; docs/plan.md has the formulas. It describes the step of
`saejax.train.step` as it is: AuxK and resampling, which run only while features are dead, are not counted.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax.sharding import AbstractMesh, AxisType

from saejax.config import Config, MeshOptions
from saejax.errors import ConfigError
from saejax.hardware import Chip, Topology, compute_dtype, present
from saejax.recipes import WITH_K
from saejax.sae import SAESpec, row_gradients, select_batch, sparse, tiles
from saejax.sae.select import sent
from saejax.train.state import TrainState, abstract_state
from saejax.train.step import takes_pairs

MATMUL = 0.65      # share of the peak that large matrix products reach
STREAMED = 0.8     # share of the bandwidth that passes over parameters reach
USABLE = 0.92      # share of the memory that arrays can have: the rest is the program's, and what falls between arrays
# float32 arrays of [rows, features of a shard] alive at once on the dense path, by what the compilers reserved
DENSE = {"cpu": {"relu": 3.4, "jumprelu": 4.5, "gated": 4.5, "topk": 4.7, "batchtopk": 4.7},
         "else": {"relu": 1.3, "jumprelu": 1.8, "gated": 1.8, "topk": 1.3, "batchtopk": 1.3}}
TANH = {"cpu": 1.9, "else": 1.0}  # times so many with jumprelu's objective tanh
# What casts, clipping and the update hold beside the gradients, in multiples of these: dense path, sparse path, lazy rows
UPDATE = {"cpu": (3.0, 3.5, 0.0), "else": (0.3, 0.8, 0.4)}


@dataclass(frozen=True)
class Work:
    """A step's sizes: batch rows, widths, features, the mesh, and the path (`pairs`: the sparse one)."""

    kind: str
    rows: int
    d_in: int
    d_out: int
    d_sae: int
    k: int
    data: int
    dict: int
    pairs: bool
    row_width: int      # columns of a row of the stream
    accumulate: int
    groups: int
    decodes: int        # reconstructions whose products are done: gated and multi_topk have two
    compute_bytes: int
    state_bytes: float  # parameters and optimiser state, per parameter
    lazy: bool
    clip: bool
    unit_decoder: bool
    tanh: bool
    aux: bool
    chip: Chip

    @classmethod
    def of(cls, config: Config, spec: SAESpec, data: int, dict_: int, chip: Chip) -> "Work":
        """The work of a config on a mesh data x dict."""
        sae, train, platform = config.sae, config.train, chip.platform
        return cls(
            kind=sae.kind, rows=train.batch, d_in=spec.d_in, d_out=spec.width_out, d_sae=sae.d_sae,
            k=sae.k if sae.kind in WITH_K else 0, data=data, dict=dict_, pairs=takes_pairs(config, sae, platform),
            row_width=spec.d_in + (spec.d_out or 0), accumulate=train.accumulate, groups=max(1, len(sae.groups)),
            decodes=2 if sae.kind == "gated" or sae.multi_topk else 1,
            compute_bytes=2 if compute_dtype(train.compute_dtype, platform) == "bfloat16" else 4,
            state_bytes=bytes_per_parameter(config, spec), lazy=train.lazy, clip=bool(train.clip),
            unit_decoder=sae.unit_decoder, tanh=sae.kind == "jumprelu" and sae.objective == "tanh",
            aux=bool(sae.aux_k), chip=chip)

    @property
    def chips(self) -> int:
        return self.data * self.dict

    @property
    def features(self) -> int:
        """Of a shard."""
        return self.d_sae // self.dict

    @property
    def part(self) -> int:
        """Rows that a chip works on at once."""
        return self.rows // self.data // self.accumulate

    @property
    def matrices(self) -> int:
        """Entries of a chip's two matrices."""
        return self.features * (self.d_in + self.d_out)

    @property
    def tile(self) -> int:
        """Features whose pre-activations are there at once, on the dense path. Fewer than `features`: they are made twice."""
        return self.features if self.k else tiles.tile_width(self.part, self.features, self.chip)

    @property
    def tiled(self) -> bool:
        return self.tile < self.features

    @property
    def room(self) -> int:
        """Rows of a shard that gradients have room for, see `row_gradients.room_for`."""
        if not self.pairs:
            return self.features
        few = self.lazy and 4 * self.rows * self.k <= self.d_sae
        return min(self.rows * self.k, -(-self.features // row_gradients.LAZY_SHARE) if few else self.features)

    @property
    def gradients(self) -> int:
        """Entries of the gradients of a chip's two matrices."""
        return self.room * (self.d_in + self.d_out)


@dataclass(frozen=True)
class Collective:
    """`bytes`: ring-equivalent, what a chip sends in a step: the array's size for a gather or scatter, twice it for an all-reduce
    (the factor (n - 1) / n is left out).
    """

    what: str
    kind: str
    axis: str
    bytes: int


def flops(w: Work) -> float:
    """Of a step, on one chip. Dense 2 x (2 D_in + 3 D_out) F per row, and 4 D_out F more for a second reconstruction; sparse
    2 D_in F + 2 (D_in + 3 D_out) k; in tiles of features 2 D_in F more than dense. Source: Gao et al. 2024, appendix D, without
    the gradient of the input.
    """
    rows = w.rows / w.data
    if w.pairs:
        again = 1 + select_batch.WIDE_SHARE if w.kind == "batchtopk" else 1
        return rows * (2 * again * w.d_in * w.features + 2 * (w.d_in + 3 * w.d_out) * w.k / w.dict)
    encodes = 2 if w.tiled else 1
    return rows * w.features * (2 * (encodes + 1) * w.d_in + 6 * w.d_out + 4 * w.d_out * (w.decodes - 1))


def collectives(w: Work, platform: str) -> list[Collective]:
    """What moves in a step: along `dict` rows, reconstructions and candidates, along `data` the gradients of a chip's features.
    """
    out = []

    def add(what: str, kind: str, axis: str, size: float) -> None:
        out.append(Collective(what, kind, axis, round(size * (2 if kind == "all-reduce" else 1))))

    local = w.rows // w.data
    if w.dict > 1:
        bytes_ = 4 if platform == "cpu" else w.compute_bytes  # CPU collectives promote bfloat16
        # In parts they are gathered once to select and once for the gradients.
        add("rows", "all-gather", "dict", bytes_ * local * w.d_in * (2 if w.pairs and w.accumulate > 1 else 1))
        for what, kind in (("reconstruction", "reduce-scatter"), ("error", "all-gather")):
            add(what, kind, "dict", bytes_ * w.groups * w.decodes * local * w.d_out)
        if w.kind == "topk":
            numbers = (w.k, 4 * w.k) if w.decodes > 1 else (w.k,)
            add("candidate values", "all-to-all", "dict", 4 * local * sum(
                sent(k, w.rows // w.accumulate, w.dict, w.features) for k in numbers))
            add("thresholds", "all-gather", "dict", 4 * local * len(numbers))
            add("ties", "all-to-all", "dict", 4 * local * len(numbers))
    if w.data > 1:
        add("gradients", "all-reduce", "data", 4 * (1 if w.pairs else w.accumulate) * (w.gradients + w.room))
        if w.pairs:
            add("which fired", "all-reduce", "data", 4 * w.accumulate * w.features)
    return out


def working(w: Work, platform: str) -> dict[str, float]:
    """Bytes on one chip besides the state: gradients, copies while updating, rows and reconstructions, pairs, and the
    pre-activations (of one tile, where there are several). An estimate: compilers decide what lives at the same time.
    """
    sort = platform if platform == "cpu" else "else"
    gradients = 4.0 * w.gradients
    tile = 4.0 * w.part * w.features
    if w.pairs:
        width = (select_batch.ROOM if w.kind == "batchtopk" else 1) * w.k
        pairs = 4.0 * w.part * (6 * width + (w.k if w.kind == "topk" and w.dict > 1 else 0))
        tile = (3.0 if platform == "cpu" else 1.5) * min(4.0 * sparse.tile_size(w.features, platform), tile)
    else:
        pairs, tile = 0.0, _dense_arrays(w, sort) * 4.0 * w.part * w.tile
    # Rows, and of reconstructions what a shard adds (float32, then rounded) and the error that comes back.
    gathered = w.part * (w.compute_bytes * w.d_in + (4.0 + 2 * w.compute_bytes) * w.d_out * w.groups)
    # AuxK's branch has its memory whether a feature is dead or not: gradients of its own, and two more reconstructions.
    of_dead = 4.0 * w.matrices if w.lazy else 2 * gradients
    aux = of_dead + 8.0 * w.part * w.d_out if w.aux else 0.0
    update = gradients * UPDATE[sort][2 if w.lazy else w.pairs]
    if w.lazy:
        update += 32.0 * min(row_gradients.CHUNK, w.gradients / 2)
    return {"gradients": gradients * (2 if w.accumulate > 1 else 1), "update": update, "AuxK": aux,
            "rows and reconstructions": gathered + 4.0 * w.rows / w.chips * (w.row_width + w.d_out * (2 + w.groups)),
            "pairs": pairs, "pre-activations": tile}


def _dense_arrays(w: Work, sort: str) -> float:
    return DENSE[sort][w.kind] * (TANH[sort] if w.tanh else 1.0)


def seconds(w: Work, topology: Topology, *, at_peak: bool = False) -> dict[str, float]:
    """Seconds of a step by what takes them, one after the other. at_peak: if products and memory ran at what the vendor states,
    which is what a compiler's estimate supposes.
    """
    chip = topology.chip
    matmul, streamed, gather = (1.0, 1.0, 1.0) if at_peak else (MATMUL, STREAMED, chip.gather)
    peak = chip.flops * (chip.float32 if w.compute_bytes == 4 else 1.0)
    local, s = w.rows / w.data, w.compute_bytes
    # Unfused: written, and read twice to select. Dense besides: activations and their gradients, for three products each.
    passes = 12.0 if w.pairs or w.k else 0.0
    passes += 0.0 if w.pairs else 8.0 + 6.0 * s + (4.0 + s if w.tiled else 0.0)
    # Sparse, for each pair: four rows gathered, three added to what is there (read and written), all float32.
    touched = local * w.k / w.dict * (4 * 4 + 3 * 8) * (w.d_in + w.d_out) / 2 if w.pairs else 0.0
    # State read and written, gradient written and read; once more read for the norm, and decoder rows for theirs.
    moved = (2 * w.state_bytes + 8 + 4 * w.clip + 10 * w.unit_decoder) * w.matrices
    if w.lazy:  # of the rows that fire, were all equally likely to: more than do; besides the gradients' first zeros
        fired = -math.expm1(-w.rows * w.k / w.d_sae)
        moved = (2 * w.state_bytes + 12) * fired * w.matrices + 4 * w.gradients
    groups = {"dict": (w.dict, 1), "data": (w.data, w.dict)}
    out = {"products": flops(w) / (matmul * peak), "selection": passes * local * w.features / chip.bandwidth,
           "gathers": touched / (gather * chip.bandwidth),
           "optimizer": moved / (streamed * chip.bandwidth)}
    return out | {"collectives": sum(c.bytes / topology.ring(*groups[c.axis]) for c in collectives(w, topology.chip.platform))}


def state_size(w: Work) -> float:
    """Bytes of parameters and optimiser state on one chip."""
    return w.state_bytes * w.matrices


def fits(w: Work, chip: Chip) -> bool:
    """Whether state and working memory fit one chip, by the estimate of `working`."""
    return state_size(w) + sum(working(w, chip.platform).values()) <= USABLE * chip.memory


def shapes(n: int, batch: int, d_sae: int) -> list[tuple[int, int]]:
    """The meshes data x dict of n devices over which batch and dictionary divide."""
    return [(n // f, f) for f in range(1, n + 1) if n % f == 0 and d_sae % f == 0] if batch % n == 0 else []


def best_mesh(config: Config, spec: SAESpec, topology: Topology) -> tuple[int, int]:
    """(data, dict) with the least predicted step time among those that fit; where none fits, the one that needs least.

    Along `dict` three arrays of [B, D] move, along `data` the gradients, 8 bytes a parameter: the dictionary is split over all
    chips unless so little is left on each that the rows cost more than the product that they feed. Raises `ConfigError` when
    batch or dictionary do not divide over the devices.
    """
    possible = shapes(topology.size, config.train.batch, config.sae.d_sae)
    if not possible:
        near = max(1, round(config.train.batch / topology.size)) * topology.size
        raise ConfigError(f"config.train.batch: {config.train.batch} rows cannot rest on {topology.size} devices; the nearest "
                          f"valid value is {near}")

    def order(w: Work):
        small = fits(w, topology.chip)
        return (not small, sum(seconds(w, topology).values()) if small else state_size(w), -w.dict)

    best = min((Work.of(config, spec, data, dict_, topology.chip) for data, dict_ in possible), key=order)
    return best.data, best.dict


def mesh_options(config: Config, devices, width_of: Callable[[str], int] | None = None) -> MeshOptions:
    """`config.mesh`, and where it leaves both sizes open (-1) the ones that `best_mesh` chooses for these devices.

    width_of: of a hookpoint; where that is not known yet, a middling width is taken: it only decides what fits.
    """
    if (config.mesh.data, config.mesh.dict) != (-1, -1):
        return config.mesh
    widths = {name: width_of(name) if width_of else config.sae.d_in or 2048 for name in config.sae.hookpoints}
    spec = SAESpec.from_options(config.sae, widths, config.train.compute_dtype)
    return MeshOptions(*best_mesh(config, spec, present(devices)))


def state_bytes(state: TrainState) -> dict[str, int]:
    """Bytes of the state on one chip by kind; optimiser moments by dtype. state: shapes with shardings (`abstract_state`)."""
    def size(leaf) -> int:
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    out: Counter = Counter()
    for leaf in jax.tree.leaves(state.params):
        out["parameters"] += size(leaf)
    for leaf in jax.tree.leaves(state.opt_state):
        out[f"optimizer {leaf.dtype}" if leaf.ndim else "counters and scalars"] += size(leaf)
    for leaf in jax.tree.leaves(state.ema):
        out["mean of the parameters"] += size(leaf)
    rest = state.replace(params=None, opt_state=None, ema=None)
    out["counters and scalars"] += sum(map(size, jax.tree.leaves(rest)))
    return dict(out)


@functools.lru_cache(maxsize=64)
def bytes_per_parameter(config: Config, spec: SAESpec) -> float:
    """Bytes of state for each parameter."""
    state = abstract_state(config, spec, AbstractMesh((1, 1), ("data", "dict"), axis_types=(AxisType.Explicit,) * 2))
    return sum(state_bytes(state).values()) / sum(leaf.size for leaf in jax.tree.leaves(state.params))


def with_path(config: Config, pairs: bool) -> Config:
    """The config with one path, so that it is the same wherever the step is compiled."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, path="sparse" if pairs else "dense"))
