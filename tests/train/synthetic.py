"""A small activation store made of superposed sparse features: written by the real writer, read by the real stream."""

from pathlib import Path

import numpy as np
import pytest

from saejax.config import Config, default_config, resolve
from saejax.config.recipes import WITH_K
from saejax.data.arrays import write_rows
from saejax.data.store import Store

KINDS = ("relu", "topk", "gated", "jumprelu", "jumprelu_tanh", "batchtopk", "matryoshka", "matryoshka_jumprelu")  # recipes
HOOKPOINT, D_IN, CONTEXT, SHARD_CONTEXTS = "blocks.0.hook_resid_post", 16, 8, 16
TARGET = "blocks.1.hook_mlp_out"
WIDTHS = {HOOKPOINT: D_IN, TARGET: 12}
SHAPES = {  # more names for `make_config`: a recipe, and what is changed in it
    "transcoder": ("topk", {"sae__target": TARGET, "sae__pre_bias": False}),
    "skip_transcoder": ("jumprelu", {"sae__target": TARGET, "sae__pre_bias": False, "sae__skip": True}),
    "crosscoder": ("relu", {"sae__crosscoder": (HOOKPOINT, TARGET), "sae__center": True}),
}
VARIANTS = SHAPES | {
    "steered": ("relu", {"train__target_l0": 6.0}),
    "options": ("batchtopk", {"train__ema": 0.9, "train__accumulate": 2, "sae__k_start": 16, "train__k_anneal": 0.3,
                              "train__lr_shape": "cosine", "train__lr_warmup": 0.2}),
    "pairs": ("topk", {"train__path": "sparse", "train__accumulate": 2}),
    "pairs_of_batch": ("matryoshka", {"train__path": "sparse"}),
}


def make_store(path: Path, contexts: int = 48, seed: int = 0) -> Store:
    """`contexts` x 8 rows at two hookpoints that share their features, the first row of each context masked."""
    rng, rows = np.random.default_rng(seed), contexts * CONTEXT
    directions = rng.standard_normal((48, sum(WIDTHS.values())))
    codes = (rng.random((rows, 48)) < 0.08) * rng.random((rows, 48))
    return write_rows(path, [codes @ directions + 0.3], rows, WIDTHS, model="synthetic", context=CONTEXT,
                      shard_contexts=SHARD_CONTEXTS, chunk_rows=32, mask_first=True)


def kinds(*core: str) -> list:
    """All recipes as test parameters; those not named here run in the slow tier."""
    return [kind if kind in core else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


class OnDemand(dict):
    """A dict whose missing values are made when they are asked for, once."""

    def __init__(self, make):
        super().__init__()
        self._make = make

    def __missing__(self, key):
        self[key] = self._make(key)
        return self[key]


def make_config(kind: str, run_dir: Path, **overrides) -> Config:
    """A config for the store above; overrides are {"section.key": value} with dots as double underscores."""
    kind, shape = VARIANTS.get(kind, (kind, {}))
    c = default_config(kind)
    c.lm.model = "synthetic"
    c.run_dir, c.harvest.hookpoints, c.sae.hookpoint = str(run_dir), tuple(WIDTHS), HOOKPOINT
    c.text.context = CONTEXT
    c.stream.block_contexts, c.stream.window_rows = 2, 64
    c.sae.d_sae, c.sae.k, c.sae.dead_tokens = 64, 4, 160
    if c.sae.kind in WITH_K:
        c.sae.aux_k = 16
    else:
        c.sae.penalty_coef = 0.1
    if c.sae.kind == "jumprelu":  # windows and targets for a problem of this size
        c.sae.bandwidth, c.sae.threshold_init, c.sae.k = 0.1, 0.05, 8
    c.train.batch, c.train.tokens, c.train.lr = 32, 32 * 50, 3e-3
    c.log.progress, c.log.tensorboard, c.log.every_steps = False, False, 5
    c.checkpoint.every_tokens = 32 * 10
    for key, value in (shape | overrides).items():
        node, *rest = key.split("__")
        target = c
        for part in rest:
            target, node = target[node], part
        target[node] = value
    return resolve(c)
