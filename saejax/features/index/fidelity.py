"""Whether an index tells the truth: examples run again through language model and SAE, against what is stored."""

from dataclasses import asdict, dataclass

import numpy as np

from saejax.base import sharding
from saejax.base.logs import Progress
from saejax.features.index import corpus
from saejax.features.index.reader import EXAMPLES, FeatureIndex, check_belongs
from saejax.lm import LM
from saejax.sae.inference import SAE

TOLERANCE = 0.01  # of the feature's maximum: rows are bfloat16, and another batch rounds some of them the other way


@dataclass(frozen=True)
class Fidelity:
    """Over `examples` stored examples in `contexts` contexts. difference = |again - stored| / max of the feature.

    lost: examples whose feature does not fire again: of topk, where two features were as good as equal in last place.
    """

    examples: int
    contexts: int
    within_tolerance: float
    mean_difference: float
    worst_difference: float
    lost: int

    def to_json(self) -> dict:
        return asdict(self)


def check(index: FeatureIndex, sae: SAE, lm_: LM, examples: int = 1000, *, batch: int = 4,
          progress: bool = True) -> Fidelity:
    """Runs the contexts of about `examples` examples again, spread evenly over the index.

    Raises `FeatureIndexError` when the index was built for another checkpoint or model.
    """
    check_belongs(index.path, index.manifest, sae, lm_)
    feature, value, context, position = _spread(index, examples)
    top = index.column("max")
    again = np.zeros(len(feature))
    wanted = np.unique(context)
    forward = corpus.forward_of(sae.cfg.hookpoints)
    with Progress("verify", len(wanted), unit="context", enabled=progress) as bar:
        for start in range(0, len(wanted), batch):
            part = wanted[start:start + batch]
            tokens_BT = np.zeros((batch, index.tokens_NT.shape[1]), np.int32)
            tokens_BT[:len(part)] = index.tokens_NT[part]
            x_BTD = np.asarray(forward(lm_.model, tokens_BT))
            here = np.flatnonzero(np.isin(context, part))
            rows, which = np.unique(np.stack([np.searchsorted(part, context[here]), position[here]]), axis=1, return_inverse=True)
            again[here] = _encoded(sae, x_BTD[rows[0], rows[1]], which, feature[here])
            bar.advance(len(part))
    difference = np.abs(again - value) / top[feature]
    return Fidelity(len(feature), len(wanted), float((difference <= TOLERANCE).mean()), float(difference.mean()),
                    float(difference.max()), int((again == 0).sum()))


def _encoded(sae: SAE, x_RD: np.ndarray, row_E: np.ndarray, feature_E: np.ndarray, piece: int = 128) -> np.ndarray:
    """Activations of these features in these rows; pieces of one shape bound the memory, and compile once."""
    out_E = np.zeros(len(row_E))
    for start in range(0, len(x_RD), piece):
        part = np.pad(x_RD[start:start + piece], ((0, max(0, start + piece - len(x_RD))), (0, 0)))
        acts_RF = sharding.to_host(sae.encode(part))
        here = (row_E >= start) & (row_E < start + piece)
        out_E[here] = acts_RF[row_E[here] - start, feature_E[here]]
    return out_E


def _spread(index: FeatureIndex, n: int) -> tuple[np.ndarray, ...]:
    """(feature, value, context, position) of every so many-th example."""
    total = index.manifest["totals"]["examples"]
    step, seen, parts = max(1, total // max(1, n)), 0, []
    for first in range(0, index.features, 4096):
        table = index.table(EXAMPLES, first, min(first + 4096, index.features))
        take = np.arange(-seen % step, len(table), step)
        seen += len(table)
        parts.append([table[name].to_numpy()[take] for name in ("feature", "value", "context", "position")])
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))
