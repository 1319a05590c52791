"""What questions are made of: windows of text in which a feature is active, at every level, and windows in which it is silent."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from saejax.base import sharding
from saejax.base.errors import JudgeError
from saejax.base.logs import Progress
from saejax.features.index import bits
from saejax.features.index.corpus import Corpus
from saejax.features.index.examples import BEFORE, INTERVALS
from saejax.features.index.reader import FeatureIndex
from saejax.sae.inference import SAE

BLOCKS, BLOCK = 32, 8  # silent windows are looked for in so many blocks of so many contexts, spread over the corpus


@dataclass(frozen=True)
class Window:
    """Tokens of a context from `start` on, and a feature's activation at each; `position` (counted in the context) is the one
    that it was chosen for, of activation `value`. top: the feature's maximum in the whole corpus.
    """

    feature: int
    context: int
    position: int
    start: int
    value: float
    top: float
    tokens: tuple[str, ...]
    acts: tuple[float, ...]

    @property
    def level(self) -> float:
        """value / top."""
        return min(1.0, self.value / self.top) if self.top > 0 else 0.0

    @property
    def interval(self) -> int:
        """i of (i - 1) / 10 < level <= i / 10; 0 where it is silent."""
        return 0 if self.value <= 0 else max(1, min(INTERVALS, int(np.ceil(INTERVALS * self.level - 1e-6))))

    def overlaps(self, other: "Window") -> bool:
        return self.context == other.context and abs(self.start - other.start) < len(self.tokens)


@dataclass(frozen=True)
class Material:
    """Of one feature. explain: what an explanation is made from. held: active windows apart from these, by interval, in random
    order. silent: windows without activity. drawn: activations drawn uniformly from all of the corpus.
    """

    feature: int
    explain: list[Window]
    held: dict[int, list[Window]]
    silent: list[Window]
    drawn: list[Window] = field(default_factory=list)


def chosen(index: FeatureIndex, features: Sequence[int] | None, sample: int | None, seed: int = 0) -> list[int]:
    """The features to judge: those given, or `sample` of the living ones, uniformly. Raises `JudgeError` for a dead one and
    `FeatureIndexError` for one that does not exist.
    """
    alive = np.flatnonzero(index.column("fired") > 0)
    if features is None:
        rng = np.random.default_rng(seed)
        return sorted(rng.choice(alive, min(sample, len(alive)), replace=False).tolist())
    dead = [f for f in features if not np.isin(index.check_feature(f), alive)]
    if dead:
        raise JudgeError(f"feature {', '.join(map(str, dead))}: fires on nothing in the indexed text: there is nothing to judge")
    return list(dict.fromkeys(features))


def gather(index: FeatureIndex, sae: SAE, corpus: Corpus, features: Sequence[int], *, draw: int = 0,
           progress: bool = True) -> dict[int, Material]:
    """{feature: material}: examples of the index, and windows from another pass over a part of its corpus, all of it with `draw`.

    draw: activations drawn of each feature, uniformly without replacement from all rows on which it is active. Raises
    `JudgeError` when the corpus is not that of the index.
    """
    if corpus.kind == "store" and corpus.digest != index.manifest["corpus"]["digest"]:
        raise JudgeError(f"{index.path}: was built over another store than the run has now; build it again (saejax features)")
    passed = _Pass(index, features, draw)
    contexts = len(index.tokens_NT)
    if draw:
        starts = range(0, contexts, BLOCK)
    else:
        last = max(0, contexts - BLOCK)
        starts = sorted({round(i * last / (BLOCKS - 1)) // BLOCK * BLOCK for i in range(BLOCKS)})
    sae = sae if sae.mesh is not None else SAE(sae.params, sae.cfg, sharding.single_device_mesh())
    with Progress("material", len(starts) * BLOCK * corpus.context, enabled=progress) as bar, jax.set_mesh(sae.mesh):
        for start in starts:
            stop = min(start + BLOCK, contexts)
            passed.add(start, _activations(sae, corpus, index, start, stop, passed.features))
            bar.advance((stop - start) * corpus.context)
    out = {}
    for number, feature in enumerate(passed.features.tolist()):
        out[feature] = _material(index, feature, passed.silent(number), passed.drawn(number))
    return out


def _activations(sae: SAE, corpus: Corpus, index: FeatureIndex, start: int, stop: int, features: np.ndarray) -> np.ndarray:
    """[contexts, T, f] of the chosen features, 0 at masked tokens. Communication: one all-gather of [B, f] along `dict`."""
    T = corpus.context
    x_BD = corpus.activations(start * T, stop * T, np.asarray(index.tokens_NT[start:stop]))
    room = (BLOCK - (stop - start)) * T  # one shape, one compilation
    acts_BF = sae.encode(np.pad(x_BD, ((0, room), (0, 0))))
    acts = sharding.to_host(_columns(acts_BF, features))[:len(x_BD)].reshape(stop - start, T, -1)
    return np.where(np.asarray(index.keep_NT[start:stop])[..., None], acts, 0)


@jax.jit
def _columns(acts_BF, features):
    return acts_BF.at[:, features].get(out_sharding=jax.P())


class _Pass:
    """What is kept of the contexts seen: by hash of (feature, row), so that it does not depend on their grouping."""

    def __init__(self, index: FeatureIndex, features: Sequence[int], draw: int):
        self.features, self._index, self._draw = np.asarray(features, np.int64), index, draw
        self._top = index.column("max")
        self._drawn = [[] for _ in features]   # (key, context, position, start, acts)
        self._silent = [[] for _ in features]  # (peak, key, context, start, acts)

    def add(self, first: int, acts_CTf: np.ndarray) -> None:
        """The contexts from `first` on."""
        C, T, _ = acts_CTf.shape
        W = self._index.window
        rows = (np.arange(first * T, (first + C) * T)).astype(np.uint32)
        for number, feature in enumerate(self.features):
            keys = np.asarray(bits.pair_key(np.array([feature]), rows)).reshape(C, T)
            acts_CT = acts_CTf[..., number]
            for c in range(C):
                start = int(keys[c, 0]) % (T - W + 1)
                acts = acts_CT[c, start:start + W]
                peak = float(acts.max())
                if peak <= self._top[feature] / INTERVALS and self._index.keep_NT[first + c, start:start + W].any():
                    self._silent[number].append((peak, int(keys[c, 0]), first + c, start, acts.copy()))
            if self._draw:
                self._draw_from(number, first, keys, acts_CT)

    def _draw_from(self, number: int, first: int, keys: np.ndarray, acts_CT: np.ndarray) -> None:
        W, T, kept = self._index.window, acts_CT.shape[1], self._drawn[number]
        bound = kept[-1][0] if len(kept) >= self._draw else bits.EMPTY
        for c, t in np.argwhere((acts_CT > 0) & (keys < bound)):
            start = int(np.clip(t - BEFORE, 0, T - W))
            kept.append((int(keys[c, t]), first + int(c), int(t), start, acts_CT[c, start:start + W].copy()))
        kept.sort(key=lambda entry: entry[0])
        del kept[self._draw:]

    def drawn(self, number: int) -> list[Window]:
        return [self._window(number, *entry[1:]) for entry in self._drawn[number]]

    def silent(self, number: int) -> list[Window]:
        """Those without any activity; behind them, of features that are hardly ever silent, those that stay in the lowest
        interval, the quietest first.
        """
        order = sorted(self._silent[number], key=lambda entry: entry[:2])
        return [self._window(number, context, start, start, acts, silent=True) for _, _, context, start, acts in order]

    def _window(self, number: int, context: int, position: int, start: int, acts: np.ndarray, silent: bool = False) -> Window:
        feature = int(self.features[number])
        value = 0.0 if silent else float(acts[position - start])
        return _window(self._index, feature, context, position, start, value, float(self._top[feature]), acts.tolist())


def _window(index: FeatureIndex, feature: int, context: int, position: int, start: int, value: float, top: float, acts) -> Window:
    tokens, acts, shown_by = index.shown(context, start, acts)
    position = start + shown_by[position - start]
    return Window(feature, context, position, start, value, top, tuple(tokens), tuple(acts))


def _material(index: FeatureIndex, feature: int, silent: list[Window], drawn: list[Window]) -> Material:
    """10 top contexts, 2 of each interval and 5 silent windows explain; what overlaps none of them is held out."""
    top = index.rows(feature, feature + 1)[0]["max"]
    of: dict[int, list[Window]] = {i: [] for i in range(INTERVALS + 1)}
    for e in index.examples(feature):
        of[e["interval"]].append(_window(index, feature, e["context"], e["position"], e["start"], e["value"], top, e["acts"]))
    explain = of[0][:10] + [window for i in range(INTERVALS, 0, -1) for window in of[i][:2]]

    def apart(windows: list[Window]) -> list[Window]:
        return [w for w in windows if not any(w.overlaps(other) for other in explain)]

    return Material(feature, explain, {i: apart(of[i][2:]) for i in range(1, INTERVALS + 1)}, silent, apart(drawn))
