"""Published recipes, as differences from the defaults of `saejax.config`: what `default_config(name)` starts from."""

from typing import NamedTuple

KINDS = ("relu", "topk", "gated", "jumprelu", "batchtopk")
WITH_K = ("topk", "batchtopk")      # kinds that keep a given number of features
# Kinds that AuxK can help: their dead features have positive pre-activations, only too small ones. Those of relu and gated
# have none, and what passes no ReLU gets no gradient from AuxK either: resampling is for them.
WITH_AUX = ("topk", "batchtopk", "jumprelu")
# Penalties, and the kinds that have them.
PENALTIES = {"l1": ("relu", "gated"), "tanh": ("relu", "jumprelu"), "log": ("relu",), "l0": ("jumprelu",),
             "target_l0": ("jumprelu",)}


class Init(NamedTuple):
    """A value of `sae.init`. Decoder rows are random directions.

    decoder_norm: of the decoder rows. b_dec: "zeros", or "geometric_median" of a sample of rows. matched: encoder rows are the
    multiple of the decoder rows at which reconstructions are as large as inputs; else they are equal to the decoder rows
    (directions of their own in a transcoder). scale: of the encoder, times that; none: d_in / d_sae. fired: features per token
    that fire at the start, by encoder biases taken from a sample of rows; none: biases are 0.
    """

    meaning: str
    decoder_norm: float
    b_dec: str
    matched: bool
    scale: float | None
    fired: float | None


INITS = {
    "input_scale": Init("decoder rows of norm 1; encoder rows are the multiple of them at which reconstructions are as large as "
                        "inputs; b_dec is the geometric median (Gao et al. 2024)", 1.0, "geometric_median", True, 1.0, None),
    "small_encoder": Init("as `input_scale` with an encoder of 0.3 times the size, whose rows turn faster at the same learning "
                          "rate: for short runs", 1.0, "geometric_median", True, 0.3, None),
    "few_active": Init("as `input_scale`, with encoder biases with which 200 features fire on a token: for short runs of kinds "
                       "without k", 1.0, "geometric_median", True, 1.0, 200.0),
    "tied": Init("decoder rows of norm 0.1, encoder rows equal to them, b_dec 0 (Transformer Circuits, April 2024)",
                 0.1, "zeros", False, 1.0, None),
    "tied_scaled": Init("decoder rows of norm 0.577, encoder rows d_in / d_sae times them, encoder biases with which 10,000 "
                        "features fire on a token, b_dec 0 (Transformer Circuits, January 2025)",
                        0.577, "zeros", False, None, 10_000.0),
}

# Transformer Circuits update April 2024 (learning rate for ~200k steps; short runs need a larger one, see
# configs/demo_relu.py).
_RELU = {
    "sae.kind": "relu", "sae.unit_decoder": False, "sae.pre_bias": False, "sae.init": "tied", "sae.aux_k": 0,
    "sae.normalize": "mean_sq_norm_D", "sae.penalty_coef": 5.0, "train.lr": 5e-5, "train.beta2": 0.999, "train.eps": 1e-8,
    "train.clip": 1.0, "train.penalty_warmup": 0.05, "train.lr_decay": 0.2,
}

# Gao et al. 2024, official training code.
_TOPK = {"sae.kind": "topk", "sae.normalize": "mean_sq_norm_1"}

# Rajamanoharan et al. 2024 (Gated SAEs): unit decoder rows, pre-encoder bias, beta1 = 0. Learning rate, decay and lambda (the
# middle of its grid .012-.06) from the SAEBench suite (Karvonen et al. 2025), which normalises to unit mean squared norm.
_GATED = {
    "sae.kind": "gated", "sae.aux_k": 0, "sae.normalize": "mean_sq_norm_1", "sae.penalty_coef": 0.03,
    "train.lr": 5e-5, "train.optimizer": "second", "train.beta2": 0.999, "train.eps": 1e-8, "train.lr_decay": 0.2,
}

# Gemma Scope (Lieberum et al. 2024): optimiser, unit mean squared norm, unit decoder, pre-encoder bias. Its bandwidth and first
# threshold (recipe `gemma_scope`) are made for 10^9 tokens and more: in some thousand steps no threshold arrives anywhere. Its
# lambda is not published: the penalty (L0 / 80 - 1)^2 with weight 1 is that of the SAEBench suite. Short warm-ups are shares of
# the run here (1,000 steps of cosine from 0.1 of the rate, and 10,000 steps of lambda there).
_JUMPRELU = {
    "sae.kind": "jumprelu", "sae.aux_k": 0, "sae.normalize": "mean_sq_norm_1", "sae.penalty": "target_l0",
    "sae.penalty_coef": 1.0, "sae.k": 80, "train.lr": 7e-5, "train.optimizer": "second", "train.beta2": 0.999, "train.eps": 1e-8,
    "train.penalty_warmup": 0.1, "train.lr_warmup": 0.01, "train.lr_shape": "cosine", "train.lr_decay": 0.0,
}
_GEMMA_SCOPE = _JUMPRELU | {"sae.bandwidth": 0.001, "sae.threshold_init": 0.001}

# Transformer Circuits update January 2025; decoder rows start at the norm that U(-1/sqrt(n), 1/sqrt(n)) gives, 1/sqrt(3), encoder
# rows at n/m of them. Lambda rises over the whole run. Encoder biases start where each feature fires 10,000/m of the time.
_JUMPRELU_TANH = {
    "sae.kind": "jumprelu", "sae.aux_k": 0, "sae.normalize": "mean_norm_sqrt_D", "sae.penalty": "tanh", "sae.penalty_coef": 10.0,
    "sae.bandwidth": 2.0, "sae.threshold_init": 0.1, "sae.unit_decoder": False, "sae.init": "tied_scaled",
    "sae.pre_bias": False, "train.lr": 2e-4, "train.batch": 32_768, "train.eps": 1e-8, "train.lr_decay": 0.2,
    "train.penalty_warmup": 1.0, "train.clip": 1.0,
}

# Bussmann et al. 2024 (BatchTopK), official implementation as SAEBench trains it: AuxK 1/32.
_BATCHTOPK = {"sae.kind": "batchtopk", "sae.normalize": "mean_sq_norm_1"}

# Bussmann et al. 2025 (Matryoshka SAEs) as SAEBench trains them: five groups, batch 2048, learning rate 3e-4. On jumprelu: the
# nesting of Gemma Scope 2, whose widths are not published, with the same groups.
_GROUPS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2 + 1 / 32)
_MATRYOSHKA = _BATCHTOPK | {"sae.groups": _GROUPS, "train.lr": 3e-4, "train.batch": 2048}
_MATRYOSHKA_JUMPRELU = _JUMPRELU | {"sae.groups": _GROUPS}

RECIPES = {"relu": _RELU, "topk": _TOPK, "gated": _GATED, "jumprelu": _JUMPRELU, "gemma_scope": _GEMMA_SCOPE,
           "jumprelu_tanh": _JUMPRELU_TANH, "batchtopk": _BATCHTOPK, "matryoshka": _MATRYOSHKA,
           "matryoshka_jumprelu": _MATRYOSHKA_JUMPRELU}
