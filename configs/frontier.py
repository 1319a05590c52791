"""All kinds at three L0s on the store of the demo: 21 SAEs of 2304 features over one stream.

Hardware: made for 2 CPU cores and the demo's store; it has not been run whole yet, so time and figures are open.
Command:  saejax run --config=configs/frontier.py, then python benchmarks/frontier.py runs/frontier

Learning rates and the size of the first encoder are those of short runs (docs/quality.md); every kind aims at the same L0s
(`train.target_l0`).
"""

from saejax.config import default_config


def get_config():
    c = default_config("topk")
    c.name = "frontier"
    c.harvest.store = "runs/demo/store"
    c.harvest.tokens = 393_216
    c.harvest.batch_contexts = 8
    c.train.tokens = 393_216
    c.train.batch = 1024
    c.train.lr_warmup = 0.02
    c.sae.d_sae = 2304
    c.sae.dead_tokens = 200_000
    c.checkpoint.every_tokens = 131_072
    c.eval.contexts = 16
    c.eval.batch_contexts = 8
    c.sweep.product = ("train.target_l0=16,32,64",)
    c.sweep.variations = tuple(f"recipe={recipe} train.lr={lr} {more}".strip() for recipe, lr, more in (
        ("relu", 1e-3, ""),
        ("gated", 1e-3, ""),
        ("topk", 2e-3, "sae.encoder_init_scale=0.3"),
        ("batchtopk", 2e-3, "sae.encoder_init_scale=0.3"),
        ("matryoshka", 2e-3, "sae.encoder_init_scale=0.3"),
        ("jumprelu", 1e-3, "train.lr_decay=0.2"),
        ("jumprelu_tanh", 1e-3, "")))
    return c
