"""ReLU SAE with the decoder-norm-weighted L1 penalty (recipe of April 2024, lambda = 5) on the demo's activations.

Hardware: 2 CPU cores, 2.2 GB of memory. Time: 8 minutes, and 3 more where the demo's store is not there yet.
Expect:   held-out explained variance 0.75 at a mean L0 of 16, CE recovered 0.94, no dead features
          (docs/measurements/benchmarks.md).
Command:  saejax run --config=configs/demo_relu.py      (uses the demo's store; harvests it when it is not there)

The published learning rate, 5e-5, is meant for about 200,000 steps. This run has about 2,000 and takes 20 times that.
"""

from saejax.config import default_config


def get_config():
    c = default_config("relu")
    c.name = "demo_relu"
    c.harvest.store = "runs/demo/store"
    c.harvest.tokens = 393_216
    c.lm.batch_contexts = 8
    c.train.tokens = 2_097_152
    c.train.batch = 1024
    c.train.lr = 1e-3
    c.sae.d_sae = 4608
    c.sae.dead_tokens = 200_000
    c.checkpoint.every_tokens = 262_144
    c.eval.contexts = 64
    return c
