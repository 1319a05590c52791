"""Formats and variants without a file of the peer: files built from the description of the layout, formulas in float64."""

import math

import numpy as np
import pytest

import saejax
from saejax import sharding
from saejax.config import MeshOptions
from saejax.formats.loading import recognise
from tests.formats.building import (
    D,
    F,
    bf16,
    check,
    f32,
    inputs,
    jump,
    layer_norm,
    linear,
    pre,
    relu,
    topk,
    torch_save,
    weights,
    write_json,
    write_safetensors,
)

X = inputs()
NORMS = np.linalg.norm(weights()["W_dec"], axis=1)
S = 0.37  # factor on the inputs


def loaded(path, name, **options):
    assert recognise(path) == name
    return saejax.load(path, **options)


@pytest.mark.parametrize(
    "place, hookpoint",
    [
        ("gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82", "blocks.12.hook_resid_post"),
        ("gemma-scope-9b-it-att/layer_3/width_16k/average_l0_9", "blocks.3.attn.hook_z"),
    ],
)
def test_gemma_scope_1(tmp_path, place, hookpoint):
    w, path = weights(), tmp_path / place
    path.mkdir(parents=True)
    np.savez(path / "params.npz", **f32(w))
    sae = loaded(path, "gemma_scope")
    acts = jump(pre(w, X, False), w["threshold"])
    check(sae, X, acts, acts @ w["W_dec"] + w["b_dec"])
    assert sae.cfg.hookpoint == hookpoint
    assert sae.cfg.model == ("google/gemma-2-2b" if "2b" in place else "google/gemma-2-9b-it")
    check(saejax.load(path / "params.npz"), X, acts, acts @ w["W_dec"] + w["b_dec"])


def test_gemma_scope_1_embedding(tmp_path):
    w, path = weights(), tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k"
    path.mkdir(parents=True)
    np.savez(path / "params.npz", **f32(w))
    acts = jump(X @ (w["W_enc"] / math.sqrt(D)) + w["b_enc"], w["threshold"])
    check(loaded(path, "gemma_scope"), X, acts, acts @ (w["W_dec"] * math.sqrt(D)) + w["b_dec"])


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("transcoder", [True, False])
def test_gemma_scope_2(tmp_path, affine, transcoder):
    if affine and not transcoder:
        pytest.skip("an SAE has no skip connection")
    d_out = 10 if transcoder else D
    w = weights(d_out)
    skip = np.random.default_rng(5).standard_normal((D, d_out)).astype(np.float32)
    folder = "transcoder_all" if transcoder else "resid_post"
    path = tmp_path / "gemma-scope-2-1b-pt" / folder / f"layer_7_width_16k_l0_small{'_affine' if affine else ''}"
    write_safetensors(
        path / "params.safetensors",
        {**{n.replace("W_", "w_"): v for n, v in f32(w).items()}, **({"affine_skip_connection": skip} if affine else {})},
    )
    write_json(
        path / "config.json",
        {
            "architecture": "jump_relu",
            "model_name": "google/gemma-3-1b-pt",
            "width": F,
            "l0": 20,
            "affine_connection": affine,
            "hf_hook_point_in": "a",
            "hf_hook_point_out": "a",
        },
    )
    sae = loaded(path, "gemma_scope")
    acts = jump(pre(w, X, False), w["threshold"])
    check(sae, X, acts, acts @ w["W_dec"] + w["b_dec"] + (X @ skip if affine else 0))
    assert sae.cfg.target == ("blocks.7.hook_mlp_out" if transcoder else "")


@pytest.mark.parametrize("activation", ["ReLU", "TopK"])
def test_openai(tmp_path, activation):
    w = weights()
    extra = {"activation": activation}
    if activation == "TopK":
        extra["activation_state_dict"] = {"k": 5, "postact_fn": "ReLU"}
    statistics = {
        n: np.ones(F, np.float32) for n in ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
    }
    torch_save(
        tmp_path / "8.pt",
        {
            "pre_bias": f32(w)["b_dec"],
            "latent_bias": f32(w)["b_enc"],
            "encoder.weight": f32(w)["W_enc"].T,
            "decoder.weight": f32(w)["W_dec"].T,
            **statistics,
            **extra,
        },
    )
    z, std, mean = layer_norm(X) if activation == "TopK" else (X, 1, 0)
    acts = topk(pre(w, z, True), 5) if activation == "TopK" else relu(pre(w, z, True))
    check(loaded(tmp_path / "8.pt", "openai"), X, acts, (acts @ w["W_dec"] + w["b_dec"]) * std + mean)


def test_goodfire(tmp_path):
    w = weights()
    torch_save(
        tmp_path / "x-l19.pth", {name.replace(".", "_linear."): v for name, v in linear(w, **{"decoder.bias": "b_dec"}).items()}
    )
    acts = relu(pre(w, X, False))
    check(loaded(tmp_path, "goodfire"), X, acts, acts @ w["W_dec"] + w["b_dec"])


def moss_config(**changes):
    return {
        "sae_type": "sae",
        "d_model": D,
        "expansion_factor": F / D,
        "use_decoder_bias": True,
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
        "top_k": 5,
        "use_triton_kernel": False,
        "sparsity_threshold_for_triton_spmm_kernel": 0.99,
        "jumprelu_threshold_window": 2.0,
        "hook_point_in": "blocks.3.x",
        "hook_point_out": "blocks.3.x",
        "use_glu_encoder": False,
        "dtype": "torch.float32",
        "device": "cpu",
    } | changes


def moss(w, act_fn, include):
    """(features in raw units, reconstruction) of inputs times S, as trained."""
    z, by = pre(w, X * S, False), NORMS if include else np.ones(F)
    gate = {"jumprelu": lambda: jump(z * by, w["threshold"]) / by, "relu": lambda: relu(z), "topk": lambda: topk(z, 5, z * by)}
    acts = gate[act_fn]()
    return acts / S, (acts @ w["W_dec"] + w["b_dec"]) / S


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("act_fn", ["jumprelu", "relu", "topk"])
def test_openmoss(tmp_path, act_fn, include):
    w = weights()
    tensors = {
        "W_E": w["W_enc"],
        "b_E": w["b_enc"],
        "W_D": w["W_dec"],
        "b_D": w["b_dec"],
        "dataset_average_activation_norm.blocks.3.x": math.sqrt(D) / S,
    }
    if act_fn == "jumprelu":
        tensors["activation_function.log_jumprelu_threshold"] = np.log(w["threshold"])
    write_safetensors(tmp_path / "sae_weights.safetensors", f32(tensors))
    write_json(tmp_path / "config.json", moss_config(act_fn=act_fn, sparsity_include_decoder_norm=include))
    acts, recon = moss(w, act_fn, include)
    # topk by activation x norm: the norm is in the features, as the metadata says
    sae = loaded(tmp_path, "openmoss")
    in_features = act_fn == "topk" and include
    check(sae, X, acts * NORMS if in_features else acts, recon)
    assert ("times decoder norms" in sae.cfg.metadata["units"]) == in_features


def test_openmoss_token_wise_without_decoder_bias(tmp_path):
    w = weights()
    write_safetensors(tmp_path / "sae_weights.safetensors", f32({"W_E": w["W_enc"], "b_E": w["b_enc"], "W_D": w["W_dec"]}))
    write_json(tmp_path / "config.json", moss_config(act_fn="relu", norm_activation="token-wise", use_decoder_bias=False))
    by = math.sqrt(D) / np.linalg.norm(X, axis=1, keepdims=True)
    acts = relu(pre(w, X * by, False))
    check(loaded(tmp_path, "openmoss"), X, acts, acts @ w["W_dec"] / by)


def test_old_llama_scope(tmp_path):
    w = weights()
    write_safetensors(tmp_path / "checkpoints" / "final.safetensors", linear(w, **{"decoder.bias": "b_dec"}))
    write_json(
        tmp_path / "hyperparams.json",
        {
            "d_model": D,
            "d_sae": F,
            "hook_point_in": "blocks.3.x",
            "hook_point_out": "blocks.3.x",
            "act_fn": "jumprelu",
            "norm_activation": "dataset-wise",
            "use_decoder_bias": True,
            "apply_decoder_bias_to_pre_encoder": False,
            "jump_relu_threshold": 0.4,
            "dataset_average_activation_norm": {"in": math.sqrt(D) / S, "out": math.sqrt(D) / S},
        },
    )
    acts, recon = moss(w | {"threshold": np.full(F, 0.4 * S)}, "jumprelu", False)  # 0.4 in raw units
    check(loaded(tmp_path, "openmoss"), X, acts, recon)


def test_llama_scope_r1(tmp_path):
    w = weights()
    write_safetensors(
        tmp_path / "sae_weights.safetensors",
        linear(w, **{"decoder.bias": "b_dec"})
        | f32(
            {
                "log_jumprelu_threshold": np.log(w["threshold"]),
                "dataset_average_activation_norm.in": math.sqrt(D) / S,
                "dataset_average_activation_norm.out": math.sqrt(D) / S,
            }
        ),
    )
    config = moss_config(sparsity_include_decoder_norm=False)
    del config["sae_type"]
    write_json(tmp_path / "config.json", config)
    check(loaded(tmp_path, "openmoss"), X, *moss(w, "jumprelu", False))


def lens_config(**changes):
    return {
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "architecture": "standard",
        "metadata": {"sae_lens_version": "6.54.12", "hook_name": "h", "context_size": 128, "prepend_bos": True},
    } | changes


def write_lens(path, tensors, **changes):
    write_safetensors(path / "sae_weights.safetensors", f32(tensors))
    write_json(path / "cfg.json", lens_config(**changes))


def common(w, *names):
    return {name: w[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec", *names)}


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale", "none"])
def test_saelens_norms(tmp_path, norm, centred):
    w = weights()
    write_lens(
        tmp_path, common(w, "threshold"), architecture="jumprelu", normalize_activations=norm, apply_b_dec_to_input=centred
    )
    by = np.linalg.norm(X, axis=1, keepdims=True) / math.sqrt(D)
    z, std, mean = {
        "layer_norm": lambda: layer_norm(X),
        "constant_norm_rescale": lambda: (X / by, by, 0),
        "none": lambda: (X, 1, 0),
    }[norm]()
    acts = jump(pre(w, z, centred), w["threshold"])
    sae = loaded(tmp_path, "saelens")
    check(sae, X, acts, (acts @ w["W_dec"] + w["b_dec"]) * std + mean)
    assert sae.cfg.metadata["text"] == {"context": 128, "bos": "row"} and sae.cfg.hookpoint == "h"
    if norm == "layer_norm" and centred:
        check(
            saejax.load(tmp_path, mesh=sharding.make_mesh(MeshOptions(2, 4))),
            X,
            acts,
            (acts @ w["W_dec"] + w["b_dec"]) * std + mean,
        )


def test_saelens_layer_norm_in_a_transcoder_is_not_undone(tmp_path):
    w = weights(10)
    skip = np.random.default_rng(5).standard_normal((10, D)).astype(np.float32)
    write_lens(
        tmp_path,
        common(w) | {"W_skip": skip},
        architecture="skip_transcoder",
        normalize_activations="layer_norm",
        d_out=10,
        apply_b_dec_to_input=False,
    )
    acts = relu(pre(w, layer_norm(X)[0], False))
    check(loaded(tmp_path, "saelens"), X, acts, acts @ w["W_dec"] + w["b_dec"] + X @ skip.T)


def test_saelens_topk_selects_by_norm(tmp_path):
    w = weights()
    write_lens(tmp_path, common(w), architecture="topk", k=5, rescale_acts_by_decoder_norm=True)
    acts = topk(pre(w, X, True) * NORMS, 5)
    check(loaded(tmp_path, "saelens"), X, acts, (acts / NORMS) @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("rescaled", [True, False])
@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_saelens_training_checkpoint_with_scaler(tmp_path, architecture, rescaled):
    """What SAELens exports: inputs times s folded, then decoder norms; its threshold is one float64 number."""
    w, threshold = weights(), 1.1
    write_lens(
        tmp_path,
        common(w),
        architecture=architecture,
        k=5.5,
        rescale_acts_by_decoder_norm=rescaled,
        topk_threshold_lr=0.01,
        normalize_activations="expected_average_only_in",
        aux_loss_coefficient=1.0,
        decoder_init_norm=0.1,
    )
    write_safetensors(tmp_path / "sae_weights.safetensors", {**f32(common(w)), "topk_threshold": np.float64(threshold)})
    write_json(tmp_path / "activation_scaler.json", {"scaling_factor": S, "has_whitening": False})
    z = pre(w, X * S, True)
    by = NORMS / S if rescaled else np.ones(F)
    acts = jump(z * by, threshold / S if rescaled else threshold)
    check(loaded(tmp_path, "saelens"), X, acts, (acts / by) @ (w["W_dec"] / S) + w["b_dec"] / S)


def test_saelens_log_threshold_of_older_checkpoints(tmp_path):
    w = weights()
    write_lens(tmp_path, common(w) | {"log_threshold": np.log(w["threshold"])}, architecture="jumprelu", jumprelu_bandwidth=0.05)
    acts = jump(pre(w, X, True), w["threshold"])
    check(loaded(tmp_path, "saelens"), X, acts, acts @ w["W_dec"] + w["b_dec"])


def test_saelens_before_6(tmp_path):
    w = weights()
    write_safetensors(tmp_path / "sae_weights.safetensors", f32(common(w) | {"scaling_factor": np.ones(F)}))
    write_json(
        tmp_path / "cfg.json",
        {
            "d_in": D,
            "d_sae": F,
            "hook_point": "blocks.2.attn.hook_z",
            "activation_fn_str": "topk",
            "activation_fn_kwargs": {"k": 5},
            "model_name": "m",
            "context_size": 64,
            "dtype": "torch.float32",
        },
    )
    acts = topk(pre(w, X, True), 5)
    sae = loaded(tmp_path, "saelens")
    check(sae, X, acts, acts @ w["W_dec"] + w["b_dec"])
    assert (sae.cfg.hookpoint, sae.cfg.model, sae.cfg.metadata["reshape"]) == ("blocks.2.attn.hook_z", "m", "hook_z")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes_that_lose_nothing(tmp_path, dtype):
    rounded = {
        "bfloat16": lambda v: (bf16(v).astype(np.uint32) << 16).view(np.float32),
        "float16": lambda v: v.astype(np.float16),
        "float64": lambda v: v,
    }[dtype]
    w = {name: rounded(value).astype(np.float64) for name, value in weights().items()}
    stored = {"bfloat16": bf16, "float16": lambda v: v.astype(np.float16), "float64": lambda v: v}[dtype]
    write_lens(tmp_path, common(w), dtype=dtype)
    write_safetensors(tmp_path / "sae_weights.safetensors", {name: stored(value) for name, value in common(w).items()})
    sae = saejax.load(tmp_path)
    np.testing.assert_array_equal(sae.W_enc, w["W_enc"])
    np.testing.assert_array_equal(sae.W_dec, w["W_dec"])


@pytest.mark.parametrize("mesh", [None, (1, 8), (2, 4)])
@pytest.mark.parametrize("skip", [True, False])
def test_sparsify_groupmax_and_skip(tmp_path, skip, mesh):
    w, k = weights(), 4
    square = np.random.default_rng(5).standard_normal((D, D)).astype(np.float32)
    path = tmp_path / "layers.3.mlp"
    write_safetensors(
        path / "sae.safetensors",
        f32(
            {
                "encoder.weight": w["W_enc"].T,
                "encoder.bias": w["b_enc"],
                "W_dec": w["W_dec"],
                "b_dec": w["b_dec"],
                **({"W_skip": square} if skip else {}),
            }
        ),
    )
    write_json(
        path / "cfg.json",
        {
            "activation": "groupmax",
            "expansion_factor": 1,
            "normalize_decoder": True,
            "num_latents": F,
            "k": k,
            "multi_topk": False,
            "skip_connection": skip,
            "transcode": skip,
            "d_in": D,
        },
    )
    write_json(tmp_path / "config.json", {"model": "some/model", "ctx_len": 2048})
    grouped = relu(pre(w, X, not skip)).reshape(len(X), k, -1)
    acts = np.where(np.arange(F // k) == grouped.argmax(2)[..., None], grouped, 0).reshape(len(X), F)
    sae = loaded(path, "sparsify", mesh=sharding.make_mesh(MeshOptions(*mesh)) if mesh else None)
    check(sae, X, acts, acts @ w["W_dec"] + w["b_dec"] + (X @ square.T if skip else 0))
    assert (sae.cfg.model, sae.cfg.hookpoint, sae.cfg.metadata["text"]["context"]) == ("some/model", "layers.3.mlp", 2048)


def test_dictionary_learning_new_is_told_by_tensors(tmp_path):
    """The config says AutoEncoder for both classes; the encoder weight lies column by column in the file, as torch leaves it."""
    w = weights()
    torch_save(tmp_path / "ae.pt", linear(w, **{"decoder.bias": "b_dec"}))
    write_json(
        tmp_path / "config.json",
        {
            "trainer": {"dict_class": "AutoEncoder", "layer": 4, "submodule_name": "resid_post_layer_4", "lm_name": "m"},
            "buffer": {"ctx_len": 128},
        },
    )
    acts = relu(pre(w, X, False))
    sae = loaded(tmp_path, "dictionary_learning")
    check(sae, X, acts, acts @ w["W_dec"] + w["b_dec"])
    assert sae.cfg.hookpoint == "blocks.4.hook_resid_post" and sae.cfg.metadata["text"]["context"] == 128


def test_dictionary_learning_topk_before_it_kept_a_threshold(tmp_path):
    w = weights()
    torch_save(tmp_path / "ae.pt", linear(w, b_dec="b_dec") | {"k": np.array(5, np.int64)})
    acts = topk(pre(w, X, True), 5)
    check(loaded(tmp_path, "dictionary_learning"), X, acts, acts @ w["W_dec"] + w["b_dec"])


def test_dictionary_learning_backup_of_a_run(tmp_path):
    """It reads x / norm_factor; folded to raw units: biases and thresholds times norm_factor, weights as they are."""
    w = weights()
    own = f32({name: w[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")})
    torch_save(
        tmp_path / "ae.pt",
        {
            "step": 100,
            "ae": own,
            "optimizer": {
                "state": {0: {"step": np.ones((), np.float32), "exp_avg": own["b_enc"]}},
                "param_groups": [{"lr": 1e-3, "params": [0]}],
            },
            "config": {"k": None},
            "norm_factor": 1 / S,
        },
    )
    z = pre(w, X * S, False)
    acts = jump(z, w["threshold"]) / S
    check(loaded(tmp_path, "dictionary_learning"), X, acts, acts @ w["W_dec"] + w["b_dec"] / S)


def test_layer_norm_adds_its_eps_going_in_only(tmp_path):
    """Rows whose spread is near the eps: 0.7 % in the activations, nothing in the way back."""
    w, x = weights(), X * 1e-3
    write_lens(tmp_path, common(w), normalize_activations="layer_norm")
    z, std, mean = layer_norm(x.astype(np.float64))
    acts = relu(pre(w, z, True))
    recon, got = saejax.load(tmp_path).reconstruct(x)
    np.testing.assert_allclose(got, acts, atol=1e-4)
    np.testing.assert_allclose(recon, (acts @ w["W_dec"] + w["b_dec"]) * std + mean, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("stored", ["threshold", "topk_threshold"])
def test_a_feature_at_its_threshold_is_off(tmp_path, stored):
    """Numbers that float32 holds, so that pre = threshold to the last bit."""
    identity = {"W_enc": np.eye(D), "b_enc": np.zeros(D), "W_dec": np.eye(D), "b_dec": np.zeros(D)}
    architecture = "jumprelu" if stored == "threshold" else "batchtopk"
    write_lens(tmp_path, identity, architecture=architecture, d_sae=D, **({"k": 2.0} if stored != "threshold" else {}))
    value = np.full(D, 2, np.float32) if stored == "threshold" else np.float64(2)
    write_safetensors(tmp_path / "sae_weights.safetensors", f32(identity) | {stored: value})
    x = np.arange(D, dtype=np.float32)[None] - 3
    np.testing.assert_array_equal(saejax.load(tmp_path).encode(x), np.where(x > 2, x, 0))


def test_square_matrices_are_not_confused(tmp_path):
    """As many features as inputs: only the values tell a matrix from its transpose."""
    rng = np.random.default_rng(0)
    w = {"W_enc": rng.standard_normal((D, D)), "W_dec": rng.standard_normal((D, D)), "b_enc": rng.standard_normal(D)}
    w |= {"b_dec": rng.standard_normal(D), "threshold": rng.uniform(0.1, 1, D)}
    files = {
        "saelens": lambda p: write_lens(p, common(w), d_sae=D),
        "sparsify": lambda p: (
            write_safetensors(
                p / "sae.safetensors",
                f32({"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}),
            ),
            write_json(p / "cfg.json", {"d_in": D, "num_latents": D, "k": D, "activation": "topk"}),
        ),
        "dictionary_learning": lambda p: torch_save(p / "ae.pt", linear(w, bias="b_dec")),
    }
    acts = relu(pre(w, X, True))
    for name, write in files.items():
        write(tmp_path / name)
        check(loaded(tmp_path / name, name), X, acts, acts @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("skip", [True, False])
def test_saelens_jumprelu_transcoders(tmp_path, skip):
    w = weights(10)
    W_skip = np.random.default_rng(5).standard_normal((10, D)).astype(np.float32)
    architecture = "jumprelu_skip_transcoder" if skip else "jumprelu_transcoder"
    tensors = common(w, "threshold") | ({"W_skip": W_skip} if skip else {})
    write_lens(tmp_path, tensors, architecture=architecture, d_out=10, apply_b_dec_to_input=False)
    acts = jump(pre(w, X, False), w["threshold"])
    check(loaded(tmp_path, "saelens"), X, acts, acts @ w["W_dec"] + w["b_dec"] + (X @ W_skip.T if skip else 0))


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_saelens_before_6_other_kinds(tmp_path, architecture):
    w = weights()
    tensors = common(w, *(["threshold"] if architecture == "jumprelu" else []))
    r_mag, b_mag = np.linspace(-0.5, 0.5, F), np.linspace(-0.2, 0.2, F)
    if architecture == "gated":
        tensors = tensors | {"b_gate": tensors.pop("b_enc"), "r_mag": r_mag, "b_mag": b_mag}
    write_safetensors(tmp_path / "sae_weights.safetensors", f32(tensors))
    config = {"d_in": D, "d_sae": F, "architecture": architecture, "apply_b_dec_to_input": False, "normalize_activations": False}
    write_json(tmp_path / "cfg.json", config | {"hook_name": "h", "activation_fn": "relu", "l1_coefficient": 3})
    z = pre(w, X, False)
    magnitude = (z - w["b_enc"]) * np.exp(r_mag.astype(np.float32)) + b_mag.astype(np.float32)
    acts = {"standard": relu(z), "gated": np.where(z > 0, relu(magnitude), 0), "jumprelu": jump(z, w["threshold"])}[architecture]
    check(loaded(tmp_path, "saelens"), X, acts, acts @ w["W_dec"] + w["b_dec"])
