"""What a training step costs on one chip: FLOPs, collectives, seconds; and which mesh shape is the cheapest.

Seconds are a sum of terms, nothing of it overlapped, each of bytes or FLOPs over what a platform reaches. The formulas stand in
docs/explanation/plan_model.md, what they were measured against in docs/measurements/plan.md. They describe the step of
`saejax.train.step` as it is while nothing is dead; what AuxK adds is told apart (`aux_seconds`), resampling is not counted.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from saejax.base import sharding
from saejax.base.errors import ConfigError
from saejax.base.hardware import Chip, Topology, present
from saejax.base.records import MeshOptions
from saejax.config import Config
from saejax.sae import SAESpec, select_batch
from saejax.sae.select import GROUPS, sent
from saejax.train.step_work import USABLE, Work, bytes_per_parameter, state_bytes, working

__all__ = ["USABLE", "Collective", "Reached", "Work", "aux_seconds", "best_mesh", "bytes_per_parameter", "collectives", "fits",
           "flops", "mesh_options", "seconds", "shapes", "state_bytes", "state_size", "with_path", "working"]


@dataclass(frozen=True)
class Reached:
    """Shares of a chip's peak and bandwidth that the pieces of a step reach. product: large matrix products. streamed: passes
    over what is there, filled: zeros in new memory. maxima: of groups. decoded, gathered: rows of pairs for a product, added: to
    gradients. sort: bytes that an entry that is sorted counts for.
    """

    product: float = 1.0
    streamed: float = 1.0
    filled: float = 1.0
    maxima: float = 1.0
    decoded: float = 1.0
    gathered: float = 1.0
    added: float = 1.0
    sort: float = 12.0


# GPU: measured on an H200, CPU: on two cores of a server (docs/measurements/plan.md). TPU: not measured.
REACHED = {"gpu": Reached(0.69, 0.9, 0.9, 0.63, 0.3, 0.3, 0.4, 270.0), "tpu": Reached(0.65, 0.8, 0.8, 0.8, 0.2, 0.2, 0.2, 12.0),
           "cpu": Reached(0.75, 0.64, 0.14, 0.18, 1.36, 1.4, 0.5, 620.0)}


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
    if w.pairs:
        return w.local * (2 * _encoders(w) * w.d_in * w.features + 2 * (w.d_in + 3 * w.d_out) * w.k / w.dict)
    encodes = 2 if w.tiled else 1
    return w.local * w.features * (2 * (encodes + 1) * w.d_in + 6 * w.d_out + 4 * w.d_out * (w.decodes - 1))


def collectives(w: Work, platform: str) -> list[Collective]:
    """What moves in a step: along `dict` rows, reconstructions and candidates, along `data` the gradients of a chip's features.
    """
    out = []

    def add(what: str, kind: str, axis: str, size: float) -> None:
        out.append(Collective(what, kind, axis, round(size * (2 if kind == "all-reduce" else 1))))

    if w.dict > 1:
        bytes_ = 4 if platform == "cpu" else w.compute_bytes  # CPU collectives promote bfloat16
        # On the sparse path in parts rows and errors are gathered for the pairs, and again whenever gradients are made of them.
        times = 1 + w.made if w.pairs and w.accumulate > 1 else 1
        add("rows", "all-gather", "dict", bytes_ * w.local * w.d_in * times)
        for what, kind, n in (("reconstruction", "reduce-scatter", 1), ("error", "all-gather", times)):
            add(what, kind, "dict", bytes_ * w.groups * w.decodes * w.local * w.d_out * n)
        if w.kind == "topk":
            numbers = (w.k, 4 * w.k) if w.decodes > 1 else (w.k,)
            add("candidate values", "all-to-all", "dict", 4 * w.local * sum(
                sent(k, w.rows // w.accumulate, w.dict, w.features) for k in numbers))
            add("thresholds", "all-gather", "dict", 4 * w.local * len(numbers))
            add("ties", "all-to-all", "dict", 4 * w.local * len(numbers))
    if w.data > 1:
        # Once for all parts of a step on the sparse path, on the dense path after each part.
        add("gradients", "all-reduce", "data", 4 * (w.made if w.pairs else w.accumulate) * (w.gradients + w.room))
        if w.pairs:
            add("which fired", "all-reduce", "data", 4 * w.accumulate * w.features)
    return out


def seconds(w: Work, topology: Topology, *, at_peak: bool = False) -> dict[str, float]:
    """Seconds of a step by what takes them, one after the other. at_peak: if products and memory ran at what the vendor states,
    which is what a compiler's estimate supposes.
    """
    groups = {"dict": (w.dict, 1), "data": (w.data, w.dict)}
    moved = sum(c.bytes / topology.ring(*groups[c.axis]) for c in collectives(w, topology.chip.platform))
    return _Terms(w, topology.chip, at_peak).all() | {"collectives": moved}


def aux_seconds(w: Work, topology: Topology) -> dict[int, float]:
    """What AuxK adds to a step by how many features of a shard are dead at most; the last one: any number."""
    if not w.aux_k:
        return {}
    out = {room: _Terms(w.of_dead(room), topology.chip).forward_and_back()
           + 12 * room * (w.d_in + w.d_out) / (REACHED[topology.chip.platform].streamed * topology.chip.bandwidth)
           for room in w.rooms_of_dead}
    many = w.of_many_dead() if w.pairs else w.of_dead(w.features)
    return out | {w.features: _Terms(many, topology.chip).forward_and_back()}


@dataclass(frozen=True)
class _Terms:
    """The terms of a step but for its collectives, in seconds."""

    w: Work
    chip: Chip
    at_peak: bool = False

    def all(self) -> dict[str, float]:
        return self.pieces() | {"optimizer": self.optimizer(), "input": self.input()}

    def forward_and_back(self) -> float:
        return sum(self.pieces().values())

    def pieces(self) -> dict[str, float]:
        w, out = self.w, {"product": self.product(), "selection": self.selection() if self.w.k else 0.0}
        if not w.pairs:
            return out | {"activations": self.activations()}
        return out | {"decode": self.decode(), "value gradients": self.value_gradients(),
                      "two weight gradients": self.weight_gradients(), "tile re-reads": self.tile_rereads()}

    @property
    def reached(self) -> Reached:
        return Reached(sort=REACHED[self.chip.platform].sort) if self.at_peak else REACHED[self.chip.platform]

    def moved(self, size: float, share: float) -> float:
        return size / (share * self.chip.bandwidth)

    def product(self) -> float:
        """Of the encoder; on the dense path of all products."""
        w = self.w
        of_encoder = 2 * w.local * w.d_in * w.features * _encoders(w)
        peak = self.chip.flops * (self.chip.float32 if w.compute_bytes == 4 else 1.0)
        return (of_encoder if w.pairs else flops(w)) / (self.reached.product * peak)

    def selection(self) -> float:
        """Maxima of groups read all pre-activations; what they leave is gathered and sorted."""
        w, reached = self.w, self.reached
        sizes = GROUPS.get({"gpu": "cuda"}.get(self.chip.platform, self.chip.platform), ())
        read = ordered = 0.0
        for share, n in _looked_for(w):
            found = by_levels(w.features, min(n, w.features), sizes)
            read, ordered = read + share * found[0], ordered + share * found[1]
        return w.local * (self.moved(4 * read, reached.maxima) + self.moved(reached.sort * ordered, 1.0))

    def activations(self) -> float:
        """Dense path: activations and their gradients, unfused; in tiles of features some of it twice."""
        s = self.w.compute_bytes
        passes = 8.0 + 6.0 * s + (4.0 + s if self.w.tiled else 0.0)
        return self.moved(passes * self.w.local * self.w.features, self.reached.streamed)

    def decode(self) -> float:
        """Rows of W_dec gathered (written and read again but on CPUs), and on a mesh a row added for each line."""
        w = self.w
        lines = w.slots / w.line if w.dict > 1 else 0.0
        passes = 1 if self.chip.platform == "cpu" else 3
        return (self.moved(passes * w.local * w.slots * w.d_out * self._row_bytes(), self.reached.decoded)
                + self.moved(8 * w.local * lines * w.groups * w.d_out, self.reached.added))

    def value_gradients(self) -> float:
        """The same rows once more, for a product with the gradient of the reconstruction."""
        w = self.w
        return self.moved(3 * w.local * w.slots * w.d_out * self._row_bytes(), self.reached.gathered)

    def _row_bytes(self) -> int:
        return 2 if self.w.decoder_copied else 4

    def weight_gradients(self) -> float:
        """Zeros, and a float32 row read and written for each slot, of both matrices."""
        w = self.w
        added = 8 * w.local * w.slots * (w.d_in + w.d_out)
        return w.made * (self.moved(4 * w.gradients, self.reached.filled) + self.moved(added, self.reached.added))

    def tile_rereads(self) -> float:
        """W_enc for every tile of rows but the first."""
        w = self.w
        return self.moved((w.row_tiles - 1) * w.compute_bytes * w.features * w.d_in, self.reached.streamed)

    def optimizer(self) -> float:
        """State read and written, gradients read; before that gradients and what they are projected on for the norm. Off CPUs,
        which work in the cache, decoder rows are read twice more for inner products and norms.
        """
        w = self.w
        each = 2 * w.state_bytes + 4 + 4 + 2 * w.unit_decoder + 2 * (w.pairs and w.pre_bias)
        if w.unit_decoder and not w.lazy and self.chip.platform != "cpu":
            each += (8 + w.state_bytes + 4) / 2
        rows = w.fired if w.lazy else w.features
        return self.moved(each * rows * (w.d_in + w.d_out), self.reached.streamed)

    def input(self) -> float:
        """Rows, reconstructions and errors in float32, two passes; matrices rounded to `train.compute_dtype`."""
        w = self.w
        rows = 8 * w.rows / w.chips * (w.d_in + w.d_out)
        of_encoder, of_decoder = (w.accumulate, w.accumulate * w.decoder_copied) if w.pairs else (1, 1)
        copied = w.features * (w.d_in * of_encoder + w.d_out * of_decoder)
        return self.moved(rows + (6 * copied if w.compute_bytes == 2 else 0), self.reached.streamed)


def _encoders(w: Work) -> float:
    """Encoder products; `batchtopk` makes one more of its widest rows."""
    return 1 + select_batch.WIDE_SHARE if w.pairs and w.kind == "batchtopk" else 1


def _looked_for(w: Work) -> list[tuple[float, int]]:
    """(share of the rows, how many of their largest values are looked for)."""
    if w.kind == "batchtopk":
        rows = w.rows // w.accumulate
        return [(1.0, sent(select_batch.ROOM * w.k, rows, w.dict, w.features)),
                (select_batch.WIDE_SHARE, sent(select_batch.WIDE * w.k, rows, w.dict, w.features))]
    return [(1.0, w.k), (1.0, 4 * w.k)] if w.decodes > 1 else [(1.0, w.k)]


def by_levels(width: int, k: int, sizes: tuple[int, ...]) -> tuple[int, int]:
    """(values read, values sorted) of a row in `select.largest`."""
    for size in sizes:
        n = -(-width // size)
        if 2 * (n + k * size) <= width:
            groups, members = by_levels(n, k, sizes), by_levels(k * size, k, sizes)
            return width + 2 * k * size + groups[0] + members[0], groups[1] + members[1]
    return 0, width


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
        near = sharding.nearest_multiples(config.train.batch, topology.size)
        raise ConfigError(f"config.train.batch: {config.train.batch} rows cannot rest on {topology.size} devices; the nearest "
                          f"valid value is {near}")

    def order(w: Work):
        small = fits(w, topology.chip)
        return (not small, sum(seconds(w, topology).values()) if small else state_size(w), -w.dict)

    best = min((Work.of(config, spec, data, dict_, topology.chip) for data, dict_ in possible), key=order)
    return best.data, best.dict


def mesh_options(config: Config, devices, width_of: Callable[[str], int] | None = None, *,
                 going_on: bool = False) -> MeshOptions:
    """`config.mesh`, and where it leaves both sizes open (-1) the ones that `best_mesh` chooses for these devices.

    width_of: of a hookpoint; where that is not known yet, a middling width is taken: it only decides what fits. going_on: the
    run has checkpoints. Where `config.mesh` is not for as many devices as there are now, it goes on with what `best_mesh` says.
    Raises `ConfigError` where then nothing fits.
    """
    given, topology = config.mesh, present(devices)
    chosen = (given.data, given.dict) == (-1, -1)
    if not chosen:
        try:
            sharding.mesh_sizes(given, len(devices))
            return given
        except ConfigError:
            if not going_on:
                return given  # making it says what is wrong
    widths = {name: width_of(name) if width_of else config.sae.d_in or 2048 for name in config.sae.hookpoints}
    spec = SAESpec.from_options(config.sae, widths, config.train.compute_dtype)
    best = best_mesh(config, spec, topology)
    if not chosen and not fits(Work.of(config, spec, *best, topology.chip), topology.chip):
        raise ConfigError(f"config.mesh: {given.data} x {given.dict} does not use the {len(devices)} devices here, and the run "
                          "does not fit them in any shape; start it again with more")
    return MeshOptions(*best)


def with_path(config: Config, pairs: bool) -> Config:
    """The config with one path, so that it is the same wherever the step is compiled."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, path="sparse" if pairs else "dense"))
