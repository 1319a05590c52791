"""One kind at a published size: SmolLM2-135M-Instruct (Q4_1), layer 15, L0 = 50, 18,432 features (32 x the width of the model).

Hardware: 2 CPU cores, 6 GB of memory. Time: about 25 minutes for the store, then 15 minutes for each kind, twice that at 64 x.
Expect:   docs/measurements/quality.md, "Wide dictionaries".
Command:  saejax run --config=configs/quality.py:topk       (a recipe of default_config, or RECIPE,FACTOR: topk,64)

All kinds read one store, which the first run harvests. Learning rate and batch are those of a short run of a wide dictionary:
with a larger rate or smaller batches features die. Tokens with a norm 100 times that of the others, one in 3,000 here, stay out
of training: each of them moves every feature (docs/measurements/quality.md).
"""

from saejax.config import default_config
from saejax.config.recipes import WITH_K


def get_config(choice: str = "topk"):
    recipe, _, factor = choice.partition(",")
    c = default_config(recipe)
    c.name = f"quality_{recipe}_{factor or 32}x"
    c.harvest.store = "runs/quality/store"
    c.harvest.tokens = 1_310_720
    c.lm.batch_contexts = 8
    c.harvest.hookpoints = ("blocks.15.hook_resid_post",)
    c.sae.hookpoint = "blocks.15.hook_resid_post"
    c.sae.d_sae = 576 * int(factor or 32)
    c.sae.k = 50
    c.sae.dead_tokens = 131_072
    c.sae.aux_k = 32 if c.sae.aux_k else 0
    c.stream.mask_outliers = True
    c.train.tokens = 655_360
    c.train.batch = 2048
    c.train.lr, c.train.lr_warmup = 1.5e-3, 0.02
    if c.sae.kind not in WITH_K:
        # Kinds without k: hundreds of active features per token in the first steps add up to steps that are too large.
        c.train.lr, c.train.lr_warmup = 1e-3, 0.1
        c.sae.init = "few_active"
        c.sae.center = not c.sae.pre_bias
        if c.sae.penalty != "target_l0":
            c.train.target_l0 = 50.0
    c.checkpoint.every_tokens = 131_072
    c.eval.contexts = 64
    return c
