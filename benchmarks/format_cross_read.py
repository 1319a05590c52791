"""Does SAELens read the files of others as we do? For formats and variants of which no peer wrote a fixture.

    python benchmarks/format_cross_read.py peers OUT    # environment with sae-lens: random files, and what it makes of them
    python benchmarks/format_cross_read.py read OUT     # saejax: loads the same files and compares; prints one row each

sae-lens downloads for its loaders; here the download is a look into OUT, nothing else of it is changed. Llama Scope comes out in
units of scaled inputs there and in raw units here: activations are compared after division by that scale. Exit code 1 when any
activation or reconstruction differs by more than 1e-4 of the largest value, or another feature is active beyond rounding.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

D, F, K, LIMIT = 32, 96, 6, 1e-4
NORM = 3.1  # average norm of the inputs of the normalised ones


def arrays(seed=0, **names):
    rng = np.random.default_rng(seed)
    own = {
        "W_enc": rng.standard_normal((D, F)) * 0.3,
        "W_dec": rng.standard_normal((F, D)) * rng.uniform(0.3, 2, (F, 1)),
        "b_enc": rng.standard_normal(F) * 0.3,
        "b_dec": rng.standard_normal(D),
        "threshold": rng.uniform(0.2, 1, F),
        "skip": rng.standard_normal((D, D)),
    }
    return {
        name: np.ascontiguousarray(own[source] if isinstance(source, str) else source(own), np.float32)
        for name, source in names.items()
    }


def npz(path: Path) -> None:
    path.mkdir(parents=True)
    np.savez(path / "params.npz", **arrays(W_enc="W_enc", W_dec="W_dec", b_enc="b_enc", b_dec="b_dec", threshold="threshold"))


def safetensors(path: Path, config: dict, names: dict, file: str, config_file: str = "config.json") -> None:
    from safetensors.numpy import save_file

    (path / file).parent.mkdir(parents=True)
    save_file(arrays(**names), path / file)
    (path / config_file).write_text(json.dumps(config))


LINEAR = {
    "encoder.weight": lambda o: o["W_enc"].T,
    "encoder.bias": "b_enc",
    "decoder.weight": lambda o: o["W_dec"].T,
    "decoder.bias": "b_dec",
}
HOOKS = {"hook_point_in": "blocks.1.hook_resid_post", "hook_point_out": "blocks.1.hook_resid_post"}
GEMMA_3 = {"w_enc": "W_enc", "w_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}


def hub_files(out: Path):
    """(repository, folder, loader, scale of the inputs) of every file that sae-lens' own loaders are asked for."""
    import sae_lens.loading.pretrained_sae_loaders as loaders

    def place(repo, folder):
        return out / "hub" / repo / folder

    scope = "google/gemma-scope-2b-pt"
    for repo, folder in ((f"{scope}-res", "layer_3/width_16k/average_l0_9"), (f"{scope}-res", "embedding/width_4k/average_l0_9")):
        npz(place(repo, folder))
        yield repo, folder, loaders.gemma_2_sae_huggingface_loader, 1.0
    npz(place(f"{scope}-transcoders", "layer_3/width_16k/average_l0_9"))
    yield f"{scope}-transcoders", "layer_3/width_16k/average_l0_9", loaders.gemma_2_transcoder_huggingface_loader, 1.0
    for folder, affine in (
        ("resid_post/layer_5_width_16k_l0_small", False),
        ("transcoder/layer_5_width_16k_l0_small_affine", True),
    ):
        safetensors(
            place("google/gemma-scope-2-1b-pt", folder),
            {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt", "affine_connection": affine},
            GEMMA_3 | ({"affine_skip_connection": "skip"} if affine else {}),
            "params.safetensors",
        )
        yield "google/gemma-scope-2-1b-pt", folder, loaders.gemma_3_sae_huggingface_loader, 1.0
    scale = math.sqrt(D) / NORM
    safetensors(
        place("fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L1R-8x"),
        {
            "d_model": D,
            "d_sae": F,
            "jump_relu_threshold": 0.5,
            "dataset_average_activation_norm": {"in": NORM, "out": NORM},
            **HOOKS,
        },
        LINEAR,
        "checkpoints/final.safetensors",
        "hyperparams.json",
    )
    yield "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L1R-8x", loaders.llama_scope_sae_huggingface_loader, scale
    safetensors(
        place("fnlp/Llama-Scope-R1-Distill", "L1R"),
        {"d_model": D, "expansion_factor": F // D, "act_fn": "jumprelu", **HOOKS},
        LINEAR
        | {
            "log_jumprelu_threshold": lambda o: np.log(o["threshold"]),
            "dataset_average_activation_norm.in": lambda o: np.float32(NORM),
            "dataset_average_activation_norm.out": lambda o: np.float32(NORM),
        },
        "sae_weights.safetensors",
    )
    yield "fnlp/Llama-Scope-R1-Distill", "L1R", loaders.llama_scope_r1_distill_sae_huggingface_loader, scale


def save_io(path: Path, sae, x, scale: float = 1.0, **about) -> None:
    import torch

    with torch.no_grad():
        np.savez(path / "io.npz", x=x.numpy(), acts=sae.encode(x).numpy() / scale, recon=sae(x).numpy(), **about)


def peers(out: Path) -> None:
    import sae_lens
    import sae_lens.loading.pretrained_sae_loaders as loaders
    import torch
    from safetensors import safe_open

    def look(repo_id, filename, subfolder=None, **_):
        return str(out / "hub" / repo_id / (subfolder or "") / filename)

    def shapes(repo_id, filename):
        with safe_open(look(repo_id, filename), "np") as f:
            return {name: list(f.get_slice(name).get_shape()) for name in f.keys()}

    loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes = look, shapes
    x = torch.tensor(np.random.default_rng(1).standard_normal((64, D)), dtype=torch.float32) * 2
    for repo, folder, loader, scale in hub_files(out):
        sizes = {"d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu"} | (
            {"d_out": D} if "transcoder" in repo + folder else {}
        )
        cfg, state, _ = loader(repo, folder, cfg_overrides=sizes)
        cfg = loaders.handle_config_defaulting(cfg)
        kind = sae_lens.SAE.get_sae_config_class_for_architecture(cfg["architecture"])
        sae = sae_lens.SAE.get_sae_class_for_architecture(cfg["architecture"])(kind.from_dict(cfg))
        sae.load_state_dict({name: value.contiguous() for name, value in state.items()})
        if scale != 1.0:
            sae.fold_activation_norm_scaling_factor(scale)
        save_io(out / "hub" / repo / folder, sae, x, scale)
    trained(out, x)


def trained(out: Path, x) -> None:
    """Directories that sae-lens' training classes save, against what they export."""
    import sae_lens
    import torch
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

    values = {
        name: torch.tensor(value) for name, value in arrays(W_enc="W_enc", W_dec="W_dec", b_enc="b_enc", b_dec="b_dec").items()
    }
    scale = math.sqrt(D) / NORM
    for name, extra in (
        ("batchtopk", {"k": K}),
        ("matryoshka_batchtopk", {"k": K, "matryoshka_widths": [32, F]}),
        ("topk", {"k": K}),
    ):
        training, config = SAE_TRAINING_CLASS_REGISTRY[name]
        for rescaled in (True, False):
            sae = training(
                config(
                    d_in=D,
                    d_sae=F,
                    normalize_activations="expected_average_only_in",
                    rescale_acts_by_decoder_norm=rescaled,
                    **extra,
                )
            )
            sae.load_state_dict(values | ({"topk_threshold": torch.tensor(1.1, dtype=torch.double)} if name != "topk" else {}))
            path = out / "trained" / f"{name}{'_rescaled' if rescaled else ''}"
            sae.save_model(path)
            (path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale, "has_whitening": False}))
            sae.fold_activation_norm_scaling_factor(scale)
            sae.save_inference_model(str(out / "exported" / path.name))
            save_io(path, sae_lens.SAE.load_from_disk(str(out / "exported" / path.name)), x)


def read(out: Path) -> bool:
    import saejax

    good = True
    for check in sorted(out.glob("**/io.npz")):
        saved = dict(np.load(check))
        recon, acts = (np.asarray(v) for v in saejax.load(check.parent).reconstruct(saved["x"]))
        worst = [np.abs(a - b).max() / np.abs(b).max() for a, b in ((acts, saved["acts"]), (recon, saved["recon"]))]
        flips = int((((acts > 0) != (saved["acts"] > 0)) & (np.maximum(acts, saved["acts"]) > LIMIT * acts.max())).sum())
        good &= max(worst) <= LIMIT and flips == 0
        print(
            f"| `{check.parent.relative_to(out)}` | {(acts > 0).sum(1).mean():.1f} | {worst[0]:.1e} | {worst[1]:.1e} | "
            f"{flips} | "
            f"{'agrees' if max(worst) <= LIMIT and flips == 0 else 'DIFFERS'} |"
        )
    return good


if __name__ == "__main__":
    command, *rest = sys.argv[1:] or [""]
    if command not in ("peers", "read") or len(rest) != 1:
        sys.exit(__doc__)
    sys.exit(0 if {"peers": peers, "read": read}[command](Path(rest[0])) is not False else 1)
