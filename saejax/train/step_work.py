"""The sizes of a training step on one chip: rows, features, pairs, tiles, bytes of state and of what lies beside it."""

import functools
import math
from collections import Counter
from dataclasses import dataclass, replace

import jax
from jax.sharding import AbstractMesh, AxisType

from saejax.base.hardware import Chip, compute_dtype
from saejax.config import Config
from saejax.config.recipes import WITH_K
from saejax.sae import SAESpec, losses, pairs, row_gradients, select_batch, sparse, tiles
from saejax.train.state import TrainState, abstract_state
from saejax.train.step import takes_pairs

USABLE = 0.92      # share of the memory that arrays can have: the rest is the program's, and what falls between arrays
# float32 arrays of [rows, features of a shard] alive at once on the dense path, by what the compilers reserved
DENSE = {"cpu": {"relu": 3.4, "jumprelu": 4.5, "gated": 4.5, "topk": 4.7, "batchtopk": 4.7},
         "else": {"relu": 1.3, "jumprelu": 1.8, "gated": 1.8, "topk": 1.3, "batchtopk": 1.3}}
TANH = {"cpu": 1.9, "else": 1.0}  # times so many with jumprelu's penalty tanh
# What casts, clipping and the update hold beside the gradients, in multiples of these: dense path, sparse path, lazy rows
UPDATE = {"cpu": (3.0, 0.0, 0.0), "else": (0.3, 0.8, 0.4)}


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
    unit_decoder: bool
    pre_bias: bool
    tanh: bool
    aux_k: int
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
            state_bytes=bytes_per_parameter(config, spec), lazy=train.lazy, unit_decoder=sae.unit_decoder,
            pre_bias=spec.pre_bias, tanh=sae.kind == "jumprelu" and sae.penalty == "tanh", aux_k=min(sae.aux_k, sae.d_sae),
            chip=chip)

    @property
    def chips(self) -> int:
        return self.data * self.dict

    @property
    def features(self) -> int:
        """Of a shard."""
        return self.d_sae // self.dict

    @property
    def local(self) -> int:
        """Rows that a chip sees in a step."""
        return self.rows // self.data

    @property
    def part(self) -> int:
        """Rows that a chip works on at once."""
        return self.local // self.accumulate

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
    def row_tiles(self) -> int:
        """Tiles of rows in a step on the sparse path: so often W_enc is read."""
        rows = max(1, min(self.part, sparse.tile_size(self.features, self.chip.platform) // self.features))
        return self.accumulate * -(-self.part // rows) if self.pairs else 1

    @property
    def line(self) -> int:
        """Slots of a line of pairs."""
        return self.k if self.dict == 1 and self.kind != "batchtopk" else pairs.slots(self.k, self.dict)

    @property
    def slots(self) -> float:
        """Of a row on a shard: its pairs, and of its last line on average half of the others."""
        return self.k / self.dict + (0 if self.line == self.k and self.dict == 1 else (self.line - 1) / 2)

    @property
    def decoder_copied(self) -> bool:
        """Whether W_dec is rounded as a whole, and not row by row after it is gathered (`pairs.COPIED`)."""
        turns = 1 if self.dict == 1 and self.kind != "batchtopk" else 2
        return self.compute_bytes < 4 and turns * self.part * self.line > pairs.COPIED * self.features

    @property
    def room(self) -> int:
        """Rows of a shard that gradients have room for."""
        if not self.pairs:
            return self.features
        return row_gradients.rows_with_room(self.rows * self.k, self.features, self.dict, self.lazy)

    @property
    def fired(self) -> float:
        """Rows of a shard with a gradient, were all equally likely to fire: more than do."""
        return self.features * -math.expm1(-self.rows * self.k / self.d_sae)

    @property
    def made(self) -> int:
        """How often gradients of weights are made: of rows that take turns twice, but for those of the last turn."""
        return 2 * max(1, math.ceil(self.fired / self.room)) - 1 if self.pairs and self.lazy else 1

    @property
    def gradients(self) -> int:
        """Entries of the gradients of a chip's two matrices."""
        return self.room * (self.d_in + self.d_out)

    @property
    def rooms_of_dead(self) -> tuple[int, ...]:
        """Features of a shard that AuxK takes for an SAE of their own (`losses.rooms_of_dead`)."""
        return losses.rooms_of_dead(self.part, self.features, self.chip.memory)

    def of_dead(self, room: int) -> "Work":
        """That SAE's: dense products of so many features of a shard."""
        return replace(self, kind="topk", d_sae=room * self.dict, k=min(self.aux_k, room), pairs=False, groups=1, decodes=1)

    def of_many_dead(self) -> "Work":
        """What AuxK does where more are dead: one more encoder product, and pairs of its own."""
        return replace(self, kind="topk", k=self.aux_k, groups=1, decodes=1)


def working(w: Work, platform: str) -> dict[str, float]:
    """Bytes on one chip besides the state: gradients, copies while updating, rows and reconstructions, pairs, and the
    pre-activations (of one tile, where there are several). An estimate: compilers decide what lives at the same time.
    """
    sort = platform if platform == "cpu" else "else"
    gradients = 4.0 * w.gradients
    listed = 0.0
    if w.pairs:
        width = (select_batch.ROOM if w.kind == "batchtopk" else 1) * w.k
        listed = 4.0 * w.part * (6 * width + (w.k if w.kind == "topk" and w.dict > 1 else 0)) + _of_parts(w)
    # Rows, and of reconstructions what a shard adds (float32, then rounded) and the error that comes back.
    gathered = w.part * (w.compute_bytes * w.d_in + (4.0 + 2 * w.compute_bytes) * w.d_out * w.groups)
    update = gradients * UPDATE[sort][2 if w.lazy else w.pairs]
    if w.lazy:
        update += 32.0 * min(row_gradients.CHUNK, w.gradients / 2)
    # Of parts on the dense path a sum and what is added to it.
    return {"gradients": gradients * (2 if w.accumulate > 1 and not w.pairs else 1), "update": update,
            "AuxK": _of_aux(w, sort),
            "rows and reconstructions": gathered + 4.0 * w.rows / w.chips * (w.row_width + w.d_out * (2 + w.groups)),
            "pairs": listed, "pre-activations": _pre_activations(w, sort)}


def _pre_activations(w: Work, sort: str) -> float:
    if not w.pairs:
        return _dense_arrays(w, sort) * 4.0 * w.part * w.tile
    whole = 4.0 * w.part * w.features
    return (2.0 if sort == "cpu" else 1.5) * min(4.0 * sparse.tile_size(w.features, w.chip.platform), whole)


def _of_parts(w: Work) -> float:
    """What is kept of parts until gradients are made of all: pairs, slopes, rows and errors at rest."""
    if w.accumulate == 1:
        return 0.0
    at_rest = w.rows / w.chips * (w.compute_bytes * (w.d_in + w.groups * w.d_out) + 4.0 * w.d_out)
    return 12.0 * w.local * w.slots + at_rest


def _of_aux(w: Work, sort: str) -> float:
    """The largest of AuxK's branches, which have their memory whether a feature is dead or not: gradients, two reconstructions,
    pre-activations, and of a room a copy of its rows.
    """
    if not w.aux_k:
        return 0.0
    some, many = w.of_dead(w.rooms_of_dead[-1]), w.of_many_dead()
    in_room = 3 * 4.0 * some.gradients + _dense_arrays(some, sort) * 4.0 * some.part * some.features
    any_ = 4.0 * many.gradients + 24.0 * many.part * many.slots * w.pairs + _pre_activations(many, sort)
    return max(in_room, any_) + 8.0 * w.part * w.d_out


def _dense_arrays(w: Work, sort: str) -> float:
    return DENSE[sort][w.kind] * (TANH[sort] if w.tanh else 1.0)


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


