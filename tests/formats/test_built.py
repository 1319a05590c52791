"""Formats and variants without a file of the peer: files built from the description of the layout, formulas in float64."""

import math

import numpy as np
import pytest

import saejax
from saejax.base import sharding
from saejax.base.records import MeshOptions
from tests.formats.building import (
    D,
    F,
    check,
    common,
    f32,
    inputs,
    jump,
    layer_norm,
    linear,
    loaded,
    pre,
    relu,
    topk,
    torch_save,
    weights,
    write_json,
    write_lens,
    write_safetensors,
)

X = inputs()
NORMS = np.linalg.norm(weights()["W_dec"], axis=1)
S = 0.37  # factor on the inputs


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
