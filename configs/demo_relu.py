"""ReLU SAE with the decoder-norm-weighted L1 (April 2024 recipe) on the middle of SmolLM2-135M.

Hardware: 2 CPU cores, 6 GB of memory.
Command:  saejax run --config=configs/demo_relu.py

The recipe's learning rate (5e-5) is for some 200,000 steps; this run has a thousand, hence the larger one. It reads the
same activation store as configs/demo.py where that has been made.
"""

from saejax.config import default_config


def get_config():
    c = default_config("relu")
    c.name = "demo_relu"
    c.harvest.tokens = 262_144
    c.harvest.store = "runs/demo/store"
    c.train.tokens = 2_000_000
    c.train.batch = 2048
    c.train.lr = 1e-3
    c.sae.d_sae = 4608
    c.sae.dead_tokens = 500_000
    c.train.resample.every_tokens = 500_000
    c.train.resample.until_tokens = 1_500_000
    c.train.resample.sample_rows = 65_536
    c.checkpoint.every_tokens = 500_000
    c.eval.contexts = 64
    return c
