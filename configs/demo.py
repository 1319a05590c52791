"""TopK SAE (k = 32, 4608 features) on the middle of SmolLM2-135M-Instruct in 4 bits, from text to release.

Hardware: 2 CPU cores, 2 GB of memory. Time: 8 minutes.
Expect:   held-out explained variance 0.85, CE recovered 0.98, under 1 % dead features (docs/measurements/benchmarks.md).
Command:  saejax run --config=configs/demo.py      (or `make demo`, which also installs)

The learning rate is twenty times that of the published recipe, which is meant for runs a thousand times as long, and the encoder
starts smaller: both shorten the way from random rows to features (docs/measurements/quality.md, "Short runs").
"""

from saejax.config import default_config


def get_config():
    c = default_config("topk")
    c.name = "demo"
    c.harvest.store = "runs/demo/store"  # of every run_dir: harvested once
    c.harvest.tokens = 393_216
    c.lm.batch_contexts = 8
    c.train.tokens = 655_360
    c.train.batch = 1024
    c.train.lr = 2e-3
    c.train.lr_warmup = 0.02
    c.sae.d_sae = 4608
    c.sae.init = "small_encoder"
    c.sae.dead_tokens = 200_000
    c.checkpoint.every_tokens = 131_072
    c.eval.contexts = 64
    return c
