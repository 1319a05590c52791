"""TopK SAE with 1,048,576 features on SmolLM2-1.7B, layer 12: an example for a pod or a multi-GPU cluster.

Hardware: a mesh of 4 x 16 devices. `saejax plan --config=configs/smollm2_pod.py --topology=v5p:4x4x4` puts it at 7.7 GB on each
          chip; the TPU compiler reserves 3.2 GB for the state and 7.0 GB beside it (--compile). Without --topology it lists what
          it fits. Other device counts: --config.mesh.data=... --config.mesh.dict=..., or -1 for both.
          Not yet run at this size, so no time and no metrics are given.
Needs:    the Hugging Face hub (model and text), a run directory on storage that every host sees.
Command:  saejax run --distributed --config=configs/smollm2_pod.py --config.run_dir=/shared/runs/smollm2_pod
          (launch/ has the scripts)
"""

from saejax.config import default_config


def get_config():
    c = default_config("topk")
    c.name = "smollm2_pod"
    c.lm.model = "HuggingFaceTB/SmolLM2-1.7B"
    c.lm.dtype = "bfloat16"
    c.text.source = ("HuggingFaceFW/fineweb-edu",)
    c.text.streaming = True
    c.text.context = 1024
    c.harvest.hookpoints = ("blocks.12.hook_resid_post",)
    c.harvest.tokens = 1_000_000_000
    c.harvest.shard_bytes = 2**30
    c.lm.batch_contexts = 64
    c.sae.hookpoint = "blocks.12.hook_resid_post"
    c.sae.d_in = 2048
    c.sae.d_sae = 2**20
    c.sae.k = 64
    c.mesh.data, c.mesh.dict = 4, 16
    c.stream.window_rows = 2**22  # a batch is drawn from 4,096 contexts
    c.train.tokens = 4_000_000_000
    c.train.batch = 65_536
    c.train.lr = 3e-5
    c.train.compute_dtype = "bfloat16"
    c.checkpoint.every_tokens = 100_000_000
    return c
