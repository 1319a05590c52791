"""Scaling study: TopK SAEs of 5 sizes x 5 lengths on SmolLM2-135M, for one GPU.

Hardware: one GPU with 24 GB or more, 80 GB of disk for the store. Not yet run, so no time and no metrics are given. By the terms
          of `saejax plan` the steps of all 25 runs take five minutes of an H200; harvest, AuxK and evaluation come to that.
Needs:    the Hugging Face hub (model and text).
Command:  saejax scaling --config=configs/scaling_gpu.py
"""

from saejax.config import default_config


def get_config():
    c = default_config("topk")
    c.name = "scaling_gpu"
    c.lm.model = "HuggingFaceTB/SmolLM2-135M"
    c.lm.dtype = "bfloat16"
    c.lm.batch_contexts = 64
    c.text.source = ("HuggingFaceFW/fineweb-edu",)
    c.text.streaming = True
    c.text.context = 512
    c.harvest.tokens = 68_000_000
    c.harvest.shard_bytes = 2**29
    c.stream.window_rows = 2**19
    c.train.batch = 4096
    c.train.lr = 3e-4
    c.train.lr_warmup = 0.02
    c.sae.k = 32
    c.sae.d_in = 576
    c.sae.dead_tokens = 1_000_000
    c.checkpoint.every_tokens = 33_554_432
    c.log.tensorboard = False
    c.eval.contexts = 256
    c.sweep.product = ("sae.d_sae=4096,8192,16384,32768,65536",
                       "train.tokens=4194304,8388608,16777216,33554432,67108864")
    return c
