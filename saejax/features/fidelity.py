"""Whether an index tells the truth: examples run again through language model and SAE, against what is stored."""

from dataclasses import asdict, dataclass

import jax.numpy as jnp
import numpy as np

from saejax import lm
from saejax.features.index import EXAMPLES, FeatureIndex, check_belongs
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


def check(index: FeatureIndex, sae: SAE, lm_: LM, examples: int = 1000, *, batch: int = 4) -> Fidelity:
    """Runs the contexts of about `examples` examples again, spread evenly over the index.

    Raises `FeatureIndexError` when the index was built for another checkpoint or model.
    """
    check_belongs(index.path, index.manifest, sae, lm_)
    feature, value, context, position = _spread(index, examples)
    top = index.column("max")
    again = np.zeros(len(feature))
    wanted = np.unique(context)
    names = list(sae.cfg.hookpoints)
    for start in range(0, len(wanted), batch):
        part = wanted[start:start + batch]
        tokens_BT = np.zeros((batch, index.tokens_NT.shape[1]), np.int32)
        tokens_BT[:len(part)] = index.tokens_NT[part]
        found = lm.capture(lm_.model, tokens_BT, names)
        x_BTD = np.concatenate([np.asarray(found[name].astype(jnp.bfloat16)) for name in names], axis=-1)
        here = np.flatnonzero(np.isin(context, part))
        rows, which = np.unique(np.stack([np.searchsorted(part, context[here]), position[here]]), axis=1, return_inverse=True)
        acts_RF = np.asarray(sae.encode(x_BTD[rows[0], rows[1]]))
        again[here] = acts_RF[which, feature[here]]
    difference = np.abs(again - value) / top[feature]
    return Fidelity(len(feature), len(wanted), float((difference <= TOLERANCE).mean()), float(difference.mean()),
                    float(difference.max()), int((again == 0).sum()))


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
