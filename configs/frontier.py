"""All kinds at three L0s on the store of the demo: 21 SAEs of 2304 features over one stream.

Hardware: 2 CPU cores, 3 GB of memory, and the demo's store. Time: 45 minutes.
Expect:   docs/measurements/quality.md, "L0 against error".
Command:  saejax run --config=configs/frontier.py, then python benchmarks/frontier.py runs/frontier

Small batches, learning rates and the size of the first encoder are those of short runs (docs/measurements/quality.md):
in 384 steps of 1,024 the penalties of relu and jumprelu do not arrive. Every kind aims at the same L0s: kinds with k and
jumprelu by `sae.k`, the others by `train.target_l0`.
"""

from saejax.config import default_config


def get_config():
    c = default_config("topk")
    c.name = "frontier"
    c.harvest.store = "runs/demo/store"
    c.harvest.tokens = 393_216
    c.lm.batch_contexts = 8
    c.train.tokens = 393_216
    c.train.batch = 256
    c.train.lr_warmup = 0.02
    c.sae.d_sae = 2304
    c.sae.dead_tokens = 200_000
    c.checkpoint.every_tokens = 131_072
    c.eval.contexts = 16
    fewer = "sae.init=few_active train.lr_warmup=0.1"
    c.sweep.variations = tuple(f"recipe={recipe} {key}={l0} train.lr=1e-3 {more}" for recipe, key, more in (
        ("relu", "train.target_l0", f"{fewer} sae.center=True"),
        ("gated", "train.target_l0", fewer),
        ("topk", "sae.k", "sae.init=small_encoder"),
        ("batchtopk", "sae.k", "sae.init=small_encoder"),
        ("matryoshka", "sae.k", "sae.init=small_encoder"),
        ("jumprelu", "sae.k", f"{fewer} train.lr_decay=0.2"),
        ("jumprelu_tanh", "train.target_l0", f"{fewer} sae.center=True")) for l0 in (16, 32, 64))
    return c
