"""All kinds at three L0s on the store of the demo: 21 SAEs of 2304 features over one stream.

Hardware: 2 CPU cores, 3 GB of memory, and the demo's store. Time: 45 minutes.
Expect:   docs/measurements/quality.md, "L0 against error".
Command:  saejax run --config=configs/frontier.py, then python benchmarks/frontier.py runs/frontier

Small batches, learning rates and the size of the first encoder are those of short runs (docs/measurements/quality.md):
in 384 steps of 1,024 the penalties of relu and jumprelu do not arrive. Every kind aims at the same L0s (`train.target_l0`).
"""

from saejax.config import default_config


def get_config():
    c = default_config("topk")
    c.name = "frontier"
    c.harvest.store = "runs/demo/store"
    c.harvest.tokens = 393_216
    c.harvest.batch_contexts = 8
    c.train.tokens = 393_216
    c.train.batch = 256
    c.train.lr_warmup = 0.02
    c.sae.d_sae = 2304
    c.sae.dead_tokens = 200_000
    c.checkpoint.every_tokens = 131_072
    c.eval.contexts = 16
    c.eval.batch_contexts = 8
    c.sweep.product = ("train.target_l0=16,32,64",)
    fewer = "sae.init_l0=128 sae.encoder_init=input_scale sae.encoder_init_scale=1 sae.decoder_init_norm=1 train.lr_warmup=0.1"
    c.sweep.variations = tuple(f"recipe={recipe} train.lr=1e-3 {more}" for recipe, more in (
        ("relu", f"{fewer} sae.center=True"),
        ("gated", fewer),
        ("topk", "sae.encoder_init_scale=0.3"),
        ("batchtopk", "sae.encoder_init_scale=0.3"),
        ("matryoshka", "sae.encoder_init_scale=0.3"),
        ("jumprelu", f"{fewer} train.lr_decay=0.2"),
        ("jumprelu_tanh", f"{fewer} sae.center=True")))
    return c
