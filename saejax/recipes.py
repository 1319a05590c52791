"""Published recipes, as differences from the defaults of `saejax.config`: what `default_config(name)` starts from."""

KINDS = ("relu", "topk", "gated")
WITH_K = ("topk",)      # kinds that keep a given number of features
WITH_AUX = ("topk",)    # kinds that AuxK belongs to

# Transformer Circuits update April 2024 (learning rate for ~200k steps; short runs need a larger one, see
# configs/demo_relu.py).
_RELU = {
    "sae.kind": "relu", "sae.unit_decoder": False, "sae.pre_bias": False, "sae.b_dec_init": "zeros",
    "sae.decoder_init_norm": 0.1, "sae.aux_k": 0, "sae.normalize": "mean_sq_norm_D",
    "train.lr": 5e-5, "train.beta1": 0.9, "train.beta2": 0.999, "train.eps": 1e-8, "train.clip": 1.0,
    "train.l1_warmup": 0.05, "train.lr_decay": 0.2,
}

# Gao et al. 2024, official training code.
_TOPK = {"sae.kind": "topk", "sae.normalize": "mean_sq_norm_1"}

# Rajamanoharan et al. 2024 (Gated SAEs): unit decoder rows, pre-encoder bias, beta1 = 0. Learning rate, decay and lambda (the
# middle of its grid .012-.06) from the SAEBench suite (Karvonen et al. 2025), which normalises to unit mean squared norm.
_GATED = {
    "sae.kind": "gated", "sae.aux_k": 0, "sae.normalize": "mean_sq_norm_1", "sae.l1": 0.03,
    "train.lr": 5e-5, "train.beta1": 0.0, "train.beta2": 0.999, "train.eps": 1e-8, "train.lr_decay": 0.2,
}

RECIPES = {"relu": _RELU, "topk": _TOPK, "gated": _GATED}
