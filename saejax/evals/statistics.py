"""Statistics of a language model's activations where no store holds them."""

import numpy as np

from saejax.base.records import ActivationStats
from saejax.data.text import Text
from saejax.data.tokens import token_batches
from saejax.evals import splice
from saejax.lm import LM

TOKENS = 65_536
_CONTEXTS = 8  # of a batch


def measured(lm_: LM, text: Text, hookpoints: tuple[str, ...], tokens: int = TOKENS) -> dict[str, ActivationStats]:
    """{hookpoint: statistics} over the first `tokens` tokens of the text's training part, masked ones left out, in raw units."""
    norms = {name: [] for name in hookpoints}
    sums = {name: 0.0 for name in hookpoints}
    for batch in token_batches(text.options, lm_.tokenizer, _CONTEXTS, seed=text.seed,
                               max_contexts=max(1, tokens // text.options.context)):
        room = ((0, _CONTEXTS - len(batch.tokens_BT)), (0, 0))  # one shape: compiled once
        keep_N = np.pad(batch.keep_BT, room).reshape(-1)
        clean = splice.prefix(lm_.model, np.pad(batch.tokens_BT, room), hookpoints=hookpoints)
        for name in hookpoints:
            x_ND = np.asarray(clean[name], np.float32).reshape(len(keep_N), -1)[keep_N]
            norms[name].append(np.linalg.norm(x_ND.astype(np.float64), axis=1))
            sums[name] = sums[name] + x_ND.sum(0, dtype=np.float64)
    return {name: _of(np.concatenate(norms[name]), sums[name]) for name in hookpoints}


def _of(norms_N: np.ndarray, sum_D: np.ndarray) -> ActivationStats:
    return ActivationStats(len(norms_N), sum_D / len(norms_N), float(norms_N.mean()), float(np.square(norms_N).mean()),
                           float(np.median(norms_N)))
