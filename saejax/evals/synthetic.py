"""Ground truth: a world of superposed sparse features whose activations are known, and how much of it an SAE recovers.

The world is the one of SynthSAEBench (Chanin & Garriga-Alonso 2026, arXiv 2602.14687); `WorldOptions()` describes its
16k model, version 2. Scores follow the definitions of its authors' evaluation.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from scipy.optimize import linear_sum_assignment
from scipy.special import ndtri

from saejax.base.errors import SaejaxError
from saejax.data.arrays import write_rows
from saejax.data.store import Store
from saejax.evals.reconstruction import Reconstruction
from saejax.sae.inference import SAE

HOOKPOINT = "synthetic"
_BLOCK = 256        # rows drawn at once, whatever is asked for: a row's values depend on its number only
_LEAST_OWN = 0.01   # least share of a feature's latent variance that is not shared with other features
_COS_ROWS = 1024


@dataclass(frozen=True)
class WorldOptions:
    """What a world is made of. Features 0, 1, ... are ordered from frequent to rare.

    Firing: rate p_i = min_rate + (max_rate - min_rate) (r_i - r_F) / (r_1 - r_F), r_i = i^-zipf for i = 1..features.
    Tree: the first `roots` features are roots, each node has `branching` children down to `depth` levels below the
    roots, numbered level by level; what is left stands alone. A child fires only with its parent; of the children of
    a parent at most one fires if `exclusive`; `scale_by_parent` multiplies a child's activation by (parent's
    activation) / (parent's mean). Correlation: firing follows a Gaussian copula with `rank` shared factors of
    loadings correlation x N(0, 1). Magnitude of a firing feature: max(N(mu_i, s_i^2), 0), mu_i from `first_magnitude`
    to `last_magnitude` linearly in i, s_i = |N(spread_mean, spread_std^2)|, drawn once per feature. Directions:
    random unit vectors after `orthogonal_steps` Adam steps against their overlaps; a bias of norm `bias_norm`.
    """

    features: int = 16_384
    d_in: int = 768
    zipf: float = 0.5
    max_rate: float = 0.4
    min_rate: float = 5e-4
    roots: int = 128
    branching: int = 4
    depth: int = 3
    exclusive: bool = True
    scale_by_parent: bool = True
    rank: int = 25
    correlation: float = 0.1
    first_magnitude: float = 5.0
    last_magnitude: float = 4.0
    spread_mean: float = 0.5
    spread_std: float = 0.5
    orthogonal_steps: int = 100
    orthogonal_lr: float = 3e-4
    bias_norm: float = 0.5

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.min_rate < self.max_rate <= 1:
            problems.append(f"rates {self.min_rate} .. {self.max_rate} are not 0 < min_rate < max_rate <= 1")
        if self.tree_nodes > self.features:
            problems.append(f"a tree of {self.tree_nodes} nodes (roots {self.roots}, branching {self.branching}, depth "
                            f"{self.depth}) in {self.features} features; lower one of them")
        if min(self.features, self.d_in, self.rank, self.branching) < 1:
            problems.append("features, d_in, rank and branching must be at least 1")
        if min(self.roots, self.depth, self.correlation) < 0:
            problems.append("roots, depth and correlation must be at least 0")
        if min(self.first_magnitude, self.last_magnitude) <= 0:
            problems.append(f"magnitudes {self.first_magnitude} .. {self.last_magnitude} must be positive")
        if problems:
            raise SaejaxError(f"WorldOptions: {'; '.join(problems)}")

    @property
    def levels(self) -> tuple[int, ...]:
        """Features of each level of the tree, roots first."""
        return tuple(self.roots * self.branching**level for level in range(self.depth + 1))

    @property
    def tree_nodes(self) -> int:
        return sum(self.levels)


def firing_rates(options: WorldOptions) -> np.ndarray:
    """p_i [features], downwards: the rate at which each feature is meant to fire."""
    r = np.arange(1, options.features + 1, dtype=np.float64) ** -options.zipf
    span = r[0] - r[-1] if options.features > 1 else 1.0
    return options.min_rate + (options.max_rate - options.min_rate) * (r - min(r[-1], r[0] - span)) / span


def drawn_rates(options: WorldOptions) -> np.ndarray:
    """q_i [features]: the rate at which features are drawn before the tree forbids some.

    Child i of parent j with rivals (its siblings, if exclusive): q_i = min(1, p_i / p_j (1 + sum of rivals' p /
    p_j)), which makes up for what the tree takes away, to first order; other features q_i = p_i.
    """
    p = firing_rates(options)
    q, start = p.copy(), 0
    for parents, children in zip(options.levels[:-1], options.levels[1:], strict=True):
        first = start + parents
        of_parent = p[start:first, None]
        family = p[first:first + children].reshape(parents, options.branching)
        rivals = family.sum(1, keepdims=True) - family if options.exclusive else 0.0
        q[first:first + children] = np.minimum(family / of_parent * (1 + rivals / of_parent), 1.0).ravel()
        start = first
    return q


@struct.dataclass
class World:
    """A drawn world: unit directions_FD, bias_D and the laws of its F features' activations. Make it with
    `World.make`."""

    options: WorldOptions = struct.field(pytree_node=False)
    seed: int = struct.field(pytree_node=False)
    directions_FD: jax.Array
    bias_D: jax.Array
    threshold_F: jax.Array   # a feature is drawn where its standard normal latent exceeds this
    loading_FR: jax.Array    # of the shared factors on the latents
    own_F: jax.Array         # standard deviation of the latents' own part: latents have variance 1
    mean_F: jax.Array
    spread_F: jax.Array

    @classmethod
    def make(cls, options: WorldOptions, seed: int) -> "World":
        """The world of a seed, float32."""
        o, shape = options, (options.features, options.d_in)
        keys = jax.random.split(jax.random.key(seed), 4)
        loading = np.asarray(jax.random.normal(keys[2], (o.features, o.rank)), np.float64) * o.correlation
        shared = np.square(loading).sum(1, keepdims=True)
        loading *= np.sqrt(np.minimum(1.0, (1 - _LEAST_OWN) / np.maximum(shared, 1e-30)))
        bias_D = jax.random.normal(keys[1], (o.d_in,))
        spread_F = jnp.abs(o.spread_mean + o.spread_std * jax.random.normal(keys[3], (o.features,)))
        return cls(options=o, seed=seed, bias_D=bias_D * (o.bias_norm / jnp.linalg.norm(bias_D)), spread_F=spread_F,
                   directions_FD=_orthogonalised(jax.random.normal(keys[0], shape), o.orthogonal_steps,
                                                 o.orthogonal_lr),
                   threshold_F=jnp.asarray(-ndtri(drawn_rates(o)), jnp.float32),
                   loading_FR=jnp.asarray(loading, jnp.float32),
                   own_F=jnp.asarray(np.sqrt(1 - np.square(loading).sum(1)), jnp.float32),
                   mean_F=jnp.linspace(o.first_magnitude, o.last_magnitude, o.features, dtype=jnp.float32))

    def sample(self, key: jax.Array, n: int, start: int = 0) -> tuple[jax.Array, jax.Array]:
        """(x [n, D], acts [n, F]), float32: rows start .. start + n - 1 of the endless sequence that belongs to the
        key.

        x = acts directions + bias. A row is the same in every call that covers it. Memory: 4 n (F + D) bytes and a
        block of 256 rows.
        """
        first, last = start // _BLOCK, -(-(start + n) // _BLOCK)
        blocks = [_block(self, jax.random.fold_in(key, b)) for b in range(first, last)]
        x_ND, acts_NF = (jnp.concatenate(parts) for parts in zip(*blocks, strict=True))
        rows = slice(start - first * _BLOCK, start - first * _BLOCK + n)
        return x_ND[rows], acts_NF[rows]

    def draw(self, key: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
        """(x [n, D], acts [n, F]), float32: n rows of the key in one go, also inside compiled functions.

        They depend on n and are not the rows that `sample` draws for the same key. Memory: some 20 n F bytes.
        """
        return _block(self, key, n)

    def batches(self, key: jax.Array, n: int, batch: int = 4 * _BLOCK) -> Iterator[tuple[jax.Array, jax.Array]]:
        """The first n rows of the key's sequence, `batch` at a time."""
        for start in range(0, n, batch):
            yield self.sample(key, min(batch, n - start), start)


def _orthogonalised(v_FD: jax.Array, steps: int, lr: float) -> jax.Array:
    """Unit rows after Adam on sum_{i != j} (v_i . v_j)^2 + F sum_i (|v_i|^2 - 1)^2.

    The first sum is |V^T V|^2 - sum_i |v_i|^4 (Frobenius): a [D, D] product, no [F, F] one.
    """
    def unit(v_FD):
        return v_FD / jnp.linalg.norm(v_FD, axis=1, keepdims=True)

    def gradient(v_FD):
        sq_F1 = jnp.square(v_FD).sum(1, keepdims=True)
        gram_DD = jnp.matmul(v_FD.T, v_FD, precision="highest")
        return 4 * (jnp.matmul(v_FD, gram_DD, precision="highest") - sq_F1 * v_FD) + 4 * len(v_FD) * (sq_F1 - 1) * v_FD

    def step(_, carry):
        v_FD, state = carry
        updates, state = adam.update(gradient(v_FD), state)
        return optax.apply_updates(v_FD, updates), state

    adam = optax.adam(lr)
    start = unit(v_FD)
    return unit(jax.jit(lambda v: jax.lax.fori_loop(0, steps, step, (v, adam.init(v)))[0])(start))


@functools.partial(jax.jit, static_argnums=2)
def _block(world: World, key: jax.Array, rows: int = _BLOCK) -> tuple[jax.Array, jax.Array]:
    o = world.options
    key_shared, key_own, key_size, key_tree = jax.random.split(key, 4)
    shared_NR = jax.random.normal(key_shared, (rows, o.rank))
    own_NF = jax.random.normal(key_own, (rows, o.features))
    latent_NF = jnp.matmul(shared_NR, world.loading_FR.T, precision="highest") + own_NF * world.own_F
    size_NF = world.mean_F + world.spread_F * jax.random.normal(key_size, (rows, o.features))
    acts_NF = jnp.where(latent_NF > world.threshold_F, jax.nn.relu(size_NF), 0.0)
    acts_NF = _in_tree(o, acts_NF, world.mean_F, key_tree)
    return jnp.matmul(acts_NF, world.directions_FD, precision="highest") + world.bias_D, acts_NF


def _in_tree(o: WorldOptions, acts_NF: jax.Array, mean_F: jax.Array, key: jax.Array) -> jax.Array:
    """Activations that the tree allows: level by level, children of silent parents go, then all but one of exclusive
    siblings.

    The one that stays is uniform among those that were drawn.
    """
    rows, out, start = len(acts_NF), [acts_NF[:, :o.levels[0]]], 0
    for level, (parents, children) in enumerate(zip(o.levels[:-1], o.levels[1:], strict=True)):
        first = start + parents
        parent_NP = out[-1]
        scale_NP = parent_NP / mean_F[start:first] if o.scale_by_parent else (parent_NP > 0).astype(parent_NP.dtype)
        child_NPC = acts_NF[:, first:first + children].reshape(rows, parents, o.branching) * scale_NP[..., None]
        if o.exclusive:
            active_NPC = child_NPC > 0
            draw_NP = jax.random.uniform(jax.random.fold_in(key, level), (rows, parents))
            chosen_NP = jnp.floor(draw_NP * active_NPC.sum(-1)).astype(jnp.int32)
            place_NPC = jnp.cumsum(active_NPC, axis=-1) - 1
            child_NPC = jnp.where(place_NPC == chosen_NP[..., None], child_NPC, 0.0)
        out.append(child_NPC.reshape(rows, children))
        start = first
    return jnp.concatenate([*out, acts_NF[:, o.tree_nodes:]], axis=1)


def write_store(path: str | Path, world: World, key: jax.Array, rows: int, *, hookpoint: str = HOOKPOINT,
                **layout) -> Store:
    """The first `rows` rows of a key's sequence as an activation store, which `train` and the stream read like any
    other.

    Its model is called "synthetic". layout: `context`, `shard_contexts`, `chunk_rows` of `data.arrays.write_rows`,
    whose errors it raises.
    """
    source = {"world": dataclasses.asdict(world.options), "seed": world.seed, "key": jax.random.key_data(key).tolist()}
    batches = (np.asarray(x_ND) for x_ND, _ in world.batches(key, rows))
    return write_rows(path, batches, rows, {hookpoint: world.options.d_in}, model="synthetic", source=source, **layout)


def _cosines(W_dec_FD: np.ndarray, directions_GD: np.ndarray) -> Iterator[np.ndarray]:
    """|cos| between rows, in pieces [<= 1024, G]; a row of zeros has cosine 0 with everything."""
    def unit(rows):
        rows = np.asarray(rows, np.float32)
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)

    features, truth = unit(W_dec_FD), unit(directions_GD)
    for start in range(0, len(features), _COS_ROWS):
        yield np.abs(features[start:start + _COS_ROWS] @ truth.T)


def mcc(W_dec_FD: np.ndarray, directions_GD: np.ndarray) -> float:
    """Mean correlation coefficient: the mean of |cos(W_dec,i, direction_m(i))| under the one-to-one matching m that
    maximises it.

    min(F, G) pairs count. Hungarian algorithm on float64 [F, G] (512 MB and some 10 s for 4,096 x 16,384). Source:
    Song et al. 2025, arXiv 2505.20254.
    """
    cosines_FG = np.concatenate(list(_cosines(W_dec_FD, directions_GD)))
    return float(cosines_FG[linear_sum_assignment(cosines_FG, maximize=True)].mean())


def best_matches(W_dec_FD: np.ndarray, directions_GD: np.ndarray) -> np.ndarray:
    """For each feature [F] the true feature with the largest |cos|; several features may name the same one."""
    return np.concatenate([piece.argmax(1) for piece in _cosines(W_dec_FD, directions_GD)])


def uniqueness(W_dec_FD: np.ndarray, directions_GD: np.ndarray) -> float:
    """How many different true features `best_matches` names, divided by F: 1 where no two features track the same
    one."""
    return len(np.unique(best_matches(W_dec_FD, directions_GD))) / len(W_dec_FD)


@jax.jit
def _counts(acts_NF, true_NG, match_F):
    fires_NF, truth_NF = acts_NF > 0, true_NG[:, match_F] > 0
    counts = ((fires_NF & truth_NF), fires_NF, truth_NF)
    return *(count.sum(0, dtype=jnp.int32) for count in counts), (true_NG > 0).sum(dtype=jnp.int32)


class Recovery:
    """Scores an SAE against the truth over batches; what is kept does not grow with the rows.

    W_dec_FD: its decoder. directions_GD: the true directions. mean_D: a point near the mean of the rows (rounding
    only).
    """

    def __init__(self, W_dec_FD: np.ndarray, directions_GD: np.ndarray, mean_D: np.ndarray):
        self._W_dec_FD, self._directions_GD = np.asarray(W_dec_FD), np.asarray(directions_GD)
        self._match_F = best_matches(W_dec_FD, directions_GD)
        self._reconstruction = Reconstruction(mean_D, math.inf)
        self._both_F, self._fires_F, self._truth_F = np.zeros((3, len(self._W_dec_FD)), np.int64)
        self._true_active = 0

    def add(self, x_ND, recon_ND, acts_NF, true_NG) -> None:
        """One batch: rows, reconstructions, the SAE's activations and the true ones."""
        both_F, fires_F, truth_F, active = jax.device_get(_counts(acts_NF, true_NG, self._match_F))
        self._reconstruction.add(x_ND, recon_ND, (acts_NF > 0).sum(1), fires_F, np.ones(len(x_ND), bool))
        self._both_F += both_F
        self._fires_F += fires_F
        self._truth_F += truth_F
        self._true_active += int(active)

    def f1(self) -> dict[str, float]:
        """Means over all features of precision, recall and F1 of "the feature fires" as a test for its best match
        firing.

        Per feature: precision = both / fires, recall = both / true, F1 = 2 precision recall / (precision + recall),
        each 0 where it is not defined, so that a dead feature scores 0.
        """
        def ratio(a, b):
            return np.divide(a, b, out=np.zeros(len(self._both_F)), where=np.asarray(b) > 0)

        precision, recall = ratio(self._both_F, self._fires_F), ratio(self._both_F, self._truth_F)
        f1 = ratio(2 * precision * recall, precision + recall)
        return {"f1": float(f1.mean()), "precision": float(precision.mean()), "recall": float(recall.mean())}

    def result(self) -> dict[str, float]:
        """mcc, f1, precision, recall, uniqueness, explained_variance (1 - FVU over the rows), l0, true_l0 and
        dead_features (fired on none of `rows`)."""
        rebuilt = self._reconstruction.result()
        rows = rebuilt["tokens"]
        return {"mcc": mcc(self._W_dec_FD, self._directions_GD), **self.f1(),
                "uniqueness": len(np.unique(self._match_F)) / len(self._match_F),
                "explained_variance": rebuilt["explained_variance"], "l0": rebuilt["l0_mean"],
                "true_l0": self._true_active / rows if rows else None,
                "dead_features": int((self._fires_F == 0).sum()), "rows": rows}


def score(sae: SAE, batches: Iterable[tuple[np.ndarray, np.ndarray]], directions_GD: np.ndarray) -> dict[str, float]:
    """`Recovery.result` of an SAE on raw rows: batches of (x [n, D], true activations [n, G])."""
    recovery = None
    for x_ND, true_NG in batches:
        recovery = recovery or Recovery(np.asarray(sae.W_dec), directions_GD, np.asarray(x_ND, np.float32).mean(0))
        recon_ND, acts_NF = sae.reconstruct(x_ND)
        recovery.add(jnp.asarray(x_ND), recon_ND, acts_NF, jnp.asarray(true_NG))
    if recovery is None:
        raise SaejaxError("score: no batches; pass at least one batch of rows")
    return recovery.result()
