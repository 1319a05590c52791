import numpy as np
import pytest

from saejax.base.errors import LMError
from saejax.lm import arch, gguf_config, hf_config
from saejax.lm.rope import frequencies
from tests.lm import tiny_llama

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.04,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "transformers_version": "4.42.3",
    "vocab_size": 49152,
}


def test_hugging_face_and_gguf_agree(smollm2):
    from_hf = hf_config.from_hf(SMOLLM2)
    assert smollm2.cfg.norm_eps == pytest.approx(from_hf.norm_eps, rel=1e-7)
    assert smollm2.cfg == arch.LMConfig(**(vars(from_hf) | {"norm_eps": smollm2.cfg.norm_eps}))


def test_defaults_are_those_of_transformers():
    cfg = hf_config.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 10,
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 6,
        }
    )
    assert (cfg.n_kv_heads, cfg.head_dim, cfg.norm_eps, cfg.ropes[0].theta, cfg.max_context) == (2, 4, 1e-6, 1e4, 2048)
    assert not (cfg.tied_embeddings or cfg.qkv_bias or cfg.attn_out_bias or cfg.mlp_bias)


def test_every_problem_is_in_one_error():
    bad = tiny_llama.CONFIG | {
        "hidden_act": "mish",
        "sliding_window": 128,
        "num_key_value_heads": "two",
        "mlp_bias": "yes",
        "rms_norm_eps": "small",
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": "a"},
        "rope_theta": 1e4,
    }
    del bad["hidden_size"]
    with pytest.raises(LMError) as caught:
        hf_config.from_hf(bad)
    message = str(caught.value)
    for part in (
        "hidden_size is missing",
        "hidden_act='mish'",
        "sliding_window=128",
        "num_key_value_heads='two'",
        "mlp_bias='yes'",
        "rms_norm_eps='small'",
        "rope_parameters.factor='a' (not a number)",
        "rope_parameters.low_freq_factor is missing",
        "rope_theta is given as 10000.0 and 500000.0",
    ):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "change, part",
    [
        ({"model_type": "mamba"}, "supported are gemma2, gemma3, gemma3_text, gpt2"),
        ({"model_type": None}, "phi3, qwen2, qwen3, smollm3"),
        ({"model_type": ["llama"]}, "supported are"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic' (computed are default, linear"),
        ({"rope_parameters": {"rope_type": "yarn", "slope": 3}}, "rope_parameters.slope=3 (unknown key"),
        ({"rope_parameters": {"rope_type": "yarn", "truncate": 1}}, "rope_parameters.truncate=1 (not true or false)"),
        ({"rope_parameters": {"rope_type": "yarn", "beta_slow": 40}}, "beta_fast=32.0 is less than beta_slow=40.0"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1}}, "needs more than 1"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, "rope_parameters.beta_fast"),
        ({"rope_parameters": {"rope_type": "linear", "factor": -2.0}}, "rope factor=-2.0"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 3.0}}}, "one rope for all layers"),
        ({"rope_parameters": {"rope_theta": 700.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": [1]}, "rope_parameters=[1] (not an object)"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_attention_heads": 5}, "not a multiple"),
        ({"head_dim": 7}, "odd"),
        ({"rms_norm_eps": 0}, "norm_eps=0.0"),
        ({"vocab_size": 1 << 40}, "vocab_size=1099511627776"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta=nan"),
        ({"model_type": "gemma3_text", "_sliding_window_pattern": "six"}, "_sliding_window_pattern='six' (not a whole num"),
    ],
)
def test_refused_by_name(change, part):
    with pytest.raises(LMError) as caught:
        hf_config.from_hf(tiny_llama.CONFIG | change)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    "block, attention",
    [
        ({"factor": 4.0}, 1 + 0.1 * np.log(4)),
        ({}, 1 + 0.1 * np.log(2048 / 256)),
        ({"factor": None}, 1 + 0.1 * np.log(2048 / 256)),
        ({"factor": 0.5}, 1.0),
        ({"factor": 4.0, "attention_factor": 1.5, "mscale": 2.0, "mscale_all_dim": 1.0}, 1.5),
        ({"factor": 4.0, "mscale": 2.0, "mscale_all_dim": 1.0}, (1 + 0.2 * np.log(4)) / (1 + 0.1 * np.log(4))),
        ({"factor": 4.0, "mscale": 2.0}, 1 + 0.1 * np.log(4)),
        ({"factor": 4.0, "beta_fast": 0, "beta_slow": None, "finetuned": True}, 1 + 0.1 * np.log(4)),
    ],
)
def test_yarn_defaults_are_those_of_transformers(block, attention):
    """`_compute_yarn_parameters` of transformers 5.24: null and, for the betas, 0 stand for the default."""
    old = {key: value for key, value in tiny_llama.CONFIG.items() if key != "rope_parameters"}
    rope = {"type": "yarn", "original_max_position_embeddings": 256} | block
    found = hf_config.from_hf(old | {"max_position_embeddings": 2048, "rope_scaling": rope}).ropes[0]
    assert found.attention_factor == pytest.approx(attention, rel=1e-12)
    assert (found.scaling, found.original_context, found.truncate) == ("yarn", 256, True)
    assert (found.beta_fast, found.beta_slow, found.theta) == (32.0, 1.0, 1e4)


GEMMA3_TEXT = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
               "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
GEMMA3 = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": GEMMA3_TEXT,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "vision_use_head": False},
}


def test_multimodal_gemma3_is_its_text_config():
    """Keys that the hub's config of Gemma 3 4B leaves out have the defaults of transformers' `Gemma3TextConfig`."""
    cfg = hf_config.from_hf(GEMMA3)
    assert vars(cfg) == vars(hf_config.from_hf(GEMMA3_TEXT)) | {"family": "gemma3"}
    assert (cfg.vocab_size, cfg.n_heads, cfg.n_kv_heads, cfg.head_dim, cfg.max_context) == (262208, 8, 4, 256, 131072)
    assert (cfg.d_model, cfg.n_layers, cfg.tied_embeddings) == (2560, 34, True)
    assert [(rope.theta, rope.factor) for rope in cfg.ropes] == [(1e6, 8.0), (1e4, 1.0)]
    assert cfg.windows[:6] == (1024,) * 5 + (0,)
    whole = hf_config.from_hf({"model_type": "gemma3"})
    assert (whole.d_model, whole.d_mlp, whole.n_layers) == (2304, 9216, 26)
    assert not hf_config.from_hf(GEMMA3 | {"tie_word_embeddings": False}).tied_embeddings


@pytest.mark.parametrize(
    "change, part",
    [
        ({"text_config": [1]}, "text_config=[1] (not an object)"),
        ({"text_config": GEMMA3_TEXT | {"model_type": "gemma2"}}, "text_config.model_type='gemma2'"),
        ({"text_config": GEMMA3_TEXT | {"num_experts": 8}}, "text_config.num_experts=8 (unknown key"),
        ({"text_config": GEMMA3_TEXT | {"use_bidirectional_attention": True}}, "text_config.use_bidirectional_attention=True"),
        ({"audio_config": {"hidden_size": 8}}, "audio_config={'hidden_size': 8} (unknown key"),
    ],
)
def test_multimodal_gemma3_refuses_by_name(change, part):
    with pytest.raises(LMError) as caught:
        hf_config.from_hf(GEMMA3 | change)
    assert part in str(caught.value) and "'gemma3'" in str(caught.value)


GGUF = {
    "general.architecture": "llama",
    "llama.embedding_length": 8,
    "llama.block_count": 1,
    "llama.context_length": 16,
    "llama.attention.head_count": 2,
    "llama.feed_forward_length": 6,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
GGUF_SHAPES = {"token_embd.weight": (10, 8), "output.weight": (10, 8)}


@pytest.mark.parametrize(
    "scaling, factor",
    [
        ({}, 1.0),
        ({"type": "none"}, 1.0),
        ({"type": "linear"}, 1.0),
        ({"factor": 0.0}, 1.0),
        ({"factor": 4.0}, 4.0),
        ({"type": "linear", "factor": 4.0}, 4.0),
    ],
)
@pytest.mark.parametrize("divisors", [None, (1.0, 8.0)])
def test_gguf_rope_scaling_is_that_of_llama_cpp(scaling, factor, divisors):
    """A factor without a type is linear, and it comes on top of `rope_freqs.weight`."""
    fields = GGUF | {f"llama.rope.scaling.{key}": value for key, value in scaling.items()}
    extra = {"rope_freqs.weight": (2,)} if divisors else {}
    cfg = gguf_config.from_gguf(fields, GGUF_SHAPES | extra, lambda name: np.asarray(divisors, np.float32))
    plain = 1e4 ** -(np.arange(0, 4, 2) / 4)
    np.testing.assert_allclose(frequencies(cfg.ropes[0], 16), plain / factor / (divisors or 1.0), rtol=1e-6)


def test_gguf_fields_that_are_not_computed_are_refused():
    fields, shapes = GGUF, GGUF_SHAPES

    def read(name):
        return np.ones(3, np.float32)

    assert not gguf_config.from_gguf(fields, shapes, read).tied_embeddings
    with pytest.raises(LMError, match=r"'llama' .*expert_count=8 \(unknown key"):
        gguf_config.from_gguf(fields | {"llama.expert_count": 8}, shapes, read)
    with pytest.raises(LMError, match="rope short_factors has 3 numbers, not 2"):
        gguf_config.from_gguf(fields, shapes | {"rope_freqs.weight": (3,)}, read)
    with pytest.raises(LMError, match=r"head_count=\[2, 1\] \(not a whole number from 1 to 2147483647\); block_count is missing"):
        gguf_config.from_gguf(
            {k: v for k, v in fields.items() if "block" not in k} | {"llama.attention.head_count": [2, 1]}, shapes, read
        )
    with pytest.raises(LMError, match="rope.dimension_count=2 differs from head_dim=4"):
        gguf_config.from_gguf(fields | {"llama.rope.dimension_count": 2}, shapes, read)
    with pytest.raises(LMError, match="rope.scaling.type='none' with rope.scaling.factor=4.0"):
        gguf_config.from_gguf(fields | {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, shapes, read)
    yarn = fields | {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    assert gguf_config.from_gguf(yarn, shapes, read).ropes[0].original_context == 16
    with pytest.raises(LMError, match="rope.scaling.type='yarn' with a tensor rope_freqs.weight"):
        gguf_config.from_gguf(yarn, shapes | {"rope_freqs.weight": (3,)}, read)
    with pytest.raises(LMError, match="rope.scaling.yarn_log_multiplier=0.1"):
        gguf_config.from_gguf(yarn | {"llama.rope.scaling.yarn_log_multiplier": 0.1}, shapes, read)
    with pytest.raises(LMError, match=r"yarn_beta_fast=16.0 \(unknown key"):
        gguf_config.from_gguf(fields | {"llama.rope.scaling.yarn_beta_fast": 16.0}, shapes, read)
    with pytest.raises(LMError, match="rope.scaling.type='longrope'"):
        gguf_config.from_gguf(fields | {"llama.rope.scaling.type": "longrope"}, shapes, read)
    with pytest.raises(LMError, match="general.architecture='rwkv'"):
        gguf_config.from_gguf({"general.architecture": "rwkv"}, {}, read)


@pytest.mark.parametrize("extra", [
    {}, {"n_special": 0, "predict_special_tokens": True}, {"_num_labels": 1}, {"output_past": True},
    {"task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}},
    {"max_length": 4096, "temperature": 0.6, "top_p": 0.9, "do_sample": True}])
def test_keys_that_change_no_result_are_no_obstacle(extra):
    """As gpt2-medium, gpt2-large, distilgpt2 and older Llama 2 have them."""
    gpt2 = {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 1024, "n_head": 16, "n_layer": 24, "n_positions": 1024}
    assert hf_config.from_hf(gpt2 | extra) == hf_config.from_hf(gpt2)
