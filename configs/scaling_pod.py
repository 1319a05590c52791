"""Scaling study: TopK SAEs of 65,536 to 1,048,576 features on SmolLM2-1.7B, layer 12, for a pod or a multi-GPU cluster.

Hardware: a mesh of 4 x 16 devices, as configs/smollm2_pod.py, and 4.5 TB for the store. The SAEs of one length train side by
          side: the states of all five sizes are 100 GB over the devices. Not yet run, so no time and no metrics are given.
Needs:    the Hugging Face hub (model and text), a run directory on storage that every host sees.
Command:  saejax scaling --distributed --config=configs/scaling_pod.py --config.run_dir=/shared/runs/scaling_pod --limit=5
          in every process (docs/how-to/launch.md: `COMMAND=scaling` before a script): trains the five sizes of the shortest
          length and stops; again, and it goes on with the next length
"""

from saejax.config import default_config


def get_config():
    c = default_config("topk")
    c.name = "scaling_pod"
    c.lm.model = "HuggingFaceTB/SmolLM2-1.7B"
    c.lm.dtype = "bfloat16"
    c.text.source = ("HuggingFaceFW/fineweb-edu",)
    c.text.streaming = True
    c.text.context = 1024
    c.harvest.hookpoints = ("blocks.12.hook_resid_post",)
    c.harvest.tokens = 1_080_000_000
    c.harvest.shard_bytes = 2**30
    c.lm.batch_contexts = 64
    c.sae.hookpoint = "blocks.12.hook_resid_post"
    c.sae.d_in = 2048
    c.sae.k = 64
    c.mesh.data, c.mesh.dict = 4, 16
    c.stream.window_rows = 2**22  # a batch is drawn from 4,096 contexts
    c.train.batch = 65_536
    c.train.lr = 3e-5
    c.train.compute_dtype = "bfloat16"
    c.checkpoint.every_tokens = 100_000_000
    c.log.tensorboard = False
    c.eval.contexts = 512
    c.sweep.product = ("sae.d_sae=65536,131072,262144,524288,1048576",
                       "train.tokens=67108864,134217728,268435456,536870912,1073741824")
    return c
