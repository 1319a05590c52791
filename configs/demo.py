"""TopK SAE (k = 32, 4608 features) on the middle of SmolLM2-135M, from text to release.

Hardware: 2 CPU cores, 6 GB of memory.
Command:  saejax run --config=configs/demo.py      (or `make demo`, which also installs)
"""

from saejax.config import default_config


def get_config():
    c = default_config("topk")
    c.name = "demo"
    c.harvest.tokens = 262_144
    c.train.tokens = 2_000_000
    c.train.batch = 2048
    c.train.lr = 1e-3
    c.sae.d_sae = 4608
    c.sae.dead_tokens = 500_000
    c.checkpoint.every_tokens = 500_000
    c.eval.contexts = 64
    return c
