"""Scaling study: TopK SAEs of 5 sizes x 6 lengths on the middle of SmolLM2-135M-Instruct in 4 bits; learning rates; k.

Hardware: 2 CPU cores, 4 GB of memory, 8 GB of disk. Measured with other work on both cores: harvest 10 minutes, the grid 45,
          learning rates and k 35, in pieces of at most 15; then the four larger runs 80, of which the largest alone 32.
Command:  saejax scaling --config=configs/scaling_smollm2.py --limit=15      # and again, until all points are there
          docs/tutorials/scaling_study.md goes through it and its figures

The recipe is the demo's, with one learning rate for the grid. A feature counts as dead after half of the shortest run, so that
AuxK is at work in every run. The store is longer than the longest run: no row is seen twice.
"""

from saejax.config import default_config

FEATURES = (512, 1024, 2048, 4096, 8192)
TOKENS = (65_536, 131_072, 262_144, 524_288, 1_048_576, 2_097_152)


def get_config():
    c = default_config("topk")
    c.name = "scaling_smollm2"
    c.harvest.tokens = 2_200_000
    c.lm.batch_contexts = 8
    c.train.batch = 1024
    c.train.lr = 2e-3
    c.train.lr_warmup = 0.02
    c.sae.k = 32
    c.sae.init = "small_encoder"
    c.sae.dead_tokens = 32_768
    c.checkpoint.every_tokens = 524_288
    c.log.tensorboard = False
    c.eval.contexts = 64
    grid = [f"sae.d_sae={features} train.tokens={tokens}" for features in FEATURES for tokens in TOKENS]
    rates = [f"sae.d_sae={features} train.tokens={tokens} train.lr={lr}"
             for features, tokens in zip(FEATURES[1:4], TOKENS[1:4], strict=True) for lr in (5e-4, 1e-3, 4e-3, 8e-3, 1.6e-2)]
    ks = [f"sae.d_sae={features} train.tokens=524288 sae.k={k}" for features in FEATURES[:4] for k in (16, 64)]
    larger = [f"sae.d_sae={features} train.tokens={tokens}" for features in (16_384, 32_768) for tokens in TOKENS[4:]]
    c.sweep.variations = (*grid, *rates, *ks, *larger)
    return c
