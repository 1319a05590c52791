"""The nouns that rooms hand to each other, and the layout of a run directory."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

UNKNOWN = "unknown"  # a model, hookpoint or digest that the source does not name
MADE_ELSEWHERE = "made_elsewhere"  # a key of what is recorded of a run: its activations are of another pipeline
OUTLIER_FACTOR = 10.0  # outlier token: norm > 10 x the median norm


@dataclass(frozen=True)
class MeshOptions:
    """The device mesh ("data", "dict"): batch rows are split over `data`, dictionary features over `dict`."""

    data: int = field(default=-1, metadata={"ge": -1, "doc": "devices along the batch axis; -1 takes what `dict` leaves; both "
                                            "-1: the fastest shape by prediction (docs/how-to/plan.md)"})
    dict: int = field(default=-1, metadata={"ge": -1, "doc": "devices along the dictionary axis; -1 takes what `data` leaves"})


@dataclass(frozen=True)
class TokenBatch:
    """Rows of tokens. `context_ids_B` is the row's number in the whole text, the same for every process count."""

    tokens_BT: np.ndarray       # int32
    keep_BT: np.ndarray         # bool, False at what is masked, as BOS, EOS and pad
    context_ids_B: np.ndarray   # int64
    lengths_B: np.ndarray       # int: the tokens of each row that are text; the others fill it up


@dataclass(frozen=True)
class StreamState:
    """Where a stream stands: of every lane the epoch, the window, and how many rows of it were handed out (`data.order`)."""

    seed: int
    lanes: tuple[tuple[int, int, int], ...]

    @property
    def epochs(self) -> tuple[int, int]:
        """The least and the most epochs that a lane has behind it."""
        epochs = [epoch for epoch, _, _ in self.lanes]
        return min(epochs), max(epochs)


@dataclass(frozen=True)
class ActivationStats:
    """Statistics of the unmasked rows of a store, in raw units (float64 on the host)."""

    rows: int
    mean_D: np.ndarray          # mean activation
    mean_norm: float            # E||x||
    mean_sq_norm: float         # E||x||^2
    median_norm: float          # of ||x||, sets the outlier bound


@dataclass(frozen=True)
class Occurrences:
    """Where words (concepts, C of them) stand in a sample of n of a text's contexts.

    weight_n: for how many contexts of the text each stands, so that weighted sums over the sample estimate sums over the text.
    Span s is of concept `concept_S[s]`, at tokens first_S .. stop_S - 1 of context `row_S[s]` of the sample. found_C: occurrences
    in the whole text, which has `contexts` contexts.
    """

    names: tuple[str, ...]
    contexts: int
    found_C: np.ndarray
    numbers_n: np.ndarray       # int64, of the contexts in the text, in order
    weight_n: np.ndarray        # float64
    tokens_nT: np.ndarray       # int32
    keep_nT: np.ndarray         # bool, False at what is masked
    row_S: np.ndarray           # int64, in order
    concept_S: np.ndarray
    first_S: np.ndarray
    stop_S: np.ndarray


@dataclass(frozen=True)
class Dedicated:
    """Of every concept the feature with the highest f1, among those that meet the criterion where some do; -1 and NaN where no
    feature fires on it. sampled_C: occurrences that were looked at. A concept with none is neither present nor absent.
    """

    names: tuple[str, ...]
    sampled_C: np.ndarray
    feature_C: np.ndarray
    precision_C: np.ndarray
    recall_C: np.ndarray
    f1_C: np.ndarray
    present_C: np.ndarray


@dataclass(frozen=True)
class RunPaths:
    """Files of a run directory."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def profile(self) -> Path:
        return self.root / "profile"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def statistics(self) -> Path:
        return self.root / "statistics.json"

    @property
    def evaluation(self) -> Path:
        return self.root / "eval.json"

    @property
    def release(self) -> Path:
        return self.root / "release"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def dashboard(self) -> Path:
        return self.root / "dashboard"
