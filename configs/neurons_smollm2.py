"""Features against neurons: TopK SAEs of 4,096 features at layers 3, 9 and 21 of SmolLM2-135M-Instruct in 4 bits, three k at 9.

Hardware: 2 CPU cores, 4 GB of memory, 3 GB of disk.
Command:  saejax run --config=configs/neurons_smollm2.py, then `saejax features` and `saejax neurons` of each run:
          docs/tutorials/scaling_study.md, section 10
"""

from saejax.config import default_config

LAYERS = (3, 9, 21)


def get_config():
    c = default_config("topk")
    c.name = "neurons_smollm2"
    c.harvest.tokens = 540_000
    c.harvest.hookpoints = tuple(f"blocks.{layer}.hook_resid_post" for layer in LAYERS)
    c.lm.batch_contexts = 8
    c.train.batch = 1024
    c.train.lr = 2e-3
    c.train.lr_warmup = 0.02
    c.train.tokens = 524_288
    c.sae.d_sae = 4096
    c.sae.init = "small_encoder"
    c.sae.dead_tokens = 32_768
    c.checkpoint.every_tokens = 524_288
    c.log.tensorboard = False
    c.eval.contexts = 64
    layers = [f"sae.k=32 sae.hookpoint=blocks.{layer}.hook_resid_post" for layer in LAYERS]
    ks = [f"sae.k={k} sae.hookpoint=blocks.9.hook_resid_post" for k in (16, 64)]
    c.sweep.variations = (*layers, *ks)
    return c
