"""Writes the golden files of tests/lm with transformers + torch (never needed to run or to test saejax).

    python -m saejax.base.assets                                     # fetches the model
    python -m venv torchvenv && torchvenv/bin/pip install torch==2.13.0 transformers gguf numpy accelerate safetensors jax flax
    torchvenv/bin/python benchmarks/lm_golden.py

`smollm2.npz`: token ids of two texts, per-token cross-entropy in nats, 64 columns of the logits, and the residual
stream after every layer at a few positions. `tiny_llama.npz`: logits and the residual stream of the tiny random Llama
of tests/lm/tiny_llama.py. `families/*.npz`: logits and every hookpoint of the tiny random models of
tests/lm/families.py; `--families` writes these alone. `tokenizer.json`: ids of hard texts. All in float32 on CPU, eager
attention.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from saejax.base import assets  # noqa: E402
from saejax.lm.hf_config import from_hf  # noqa: E402
from tests.lm import families, tiny_llama  # noqa: E402

GOLDEN = ROOT / "tests" / "lm" / "golden"
LENGTH = 128
POSITIONS = ((0, 0), (0, 1), (0, 17), (0, 63), (0, 127), (1, 100))
COLUMNS = np.arange(11, 49152, 768)

TEXTS = (
    """The river rose for three days before anyone in the valley spoke of leaving. On the fourth morning the miller \
opened his gate, looked at the brown water standing in the lower field, and began to carry his sacks up to the \
loft. His wife counted them aloud as he climbed: eleven, twelve, thirteen. By noon the road to the bridge was \
gone, and the priest, who had laughed at the old men's warnings in the spring, was seen rowing a flat boat \
between the apple trees with two hens and a clock in his lap. Nobody laughed at him. In the evening they all \
sat together in the church tower and listened to the bells, which the current was ringing.""",
    '''import math


def primes(limit: int) -> list[int]:
    """Primes up to `limit`, by the sieve of Eratosthenes."""
    composite = bytearray(limit + 1)
    found = []
    for n in range(2, limit + 1):
        if composite[n]:
            continue
        found.append(n)
        for multiple in range(n * n, limit + 1, n):
            composite[multiple] = 1
    return found


if __name__ == "__main__":
    for limit in (10, 100, 1000):
        print(limit, len(primes(limit)), limit / math.log(limit))
''',
)

TOKENIZER_TEXTS = (
    "",
    " ",
    "Hello world",
    "  two  spaces and\ttab\n\n\nlines\r\n",
    "I'll don't WE'RE",
    "x=123456;y=3.14",
    "naïve café — «Привет» 你好 🙂🏽",
    "<|im_start|>user\nHi<|im_end|>",
    "<|endoftext|>",
    "e\u0301 \u200b\u202e",
    "def f(x):\n        return x**2\n",
    "\x00\x01\x7f",
    "a" * 50,
)


def hidden_states(model, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [B, T, V], residual stream [L + 1, B, T, D]): the embeddings, then the output of every layer."""
    kept = []
    layers = model.model.layers
    handles = [layers[0].register_forward_pre_hook(lambda _, args: kept.append(args[0]))]
    handles += [
        layer.register_forward_hook(lambda _, args, out: kept.append(out[0] if isinstance(out, tuple) else out))
        for layer in layers
    ]
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits, torch.stack(kept)


def smollm2(gguf: Path) -> None:
    options = {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids[:LENGTH] for text in TEXTS])
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.float32, attn_implementation="eager", **options
    ).eval()
    logits, residual = hidden_states(model, ids)
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    rows, columns = zip(*POSITIONS, strict=True)
    np.savez_compressed(
        GOLDEN / "smollm2.npz",
        tokens=ids.numpy().astype(np.int32),
        nll=nll.reshape(len(TEXTS), -1).numpy(),
        logit_columns=COLUMNS.astype(np.int32),
        logits=logits[..., COLUMNS].numpy(),
        positions=np.array(POSITIONS, np.int32),
        residual=residual[:, rows, columns].numpy(),
    )
    exact, exact64 = hidden_states(model.double(), ids)
    error = (residual.double() - exact64).norm(dim=-1) / exact64.norm(dim=-1)
    print(
        f"smollm2: mean nll {nll.mean():.5f}; torch float32 against float64: residual {error.max():.2e} relative, "
        f"logits {(logits.double() - exact).abs().max():.2e}"
    )
    golden = [
        {"text": text, "ids": tokenizer(text, add_special_tokens=False).input_ids}
        for text in (*TOKENIZER_TEXTS, *TEXTS)
    ]
    (GOLDEN / "tokenizer.json").write_text(json.dumps(golden, ensure_ascii=True, indent=0) + "\n")


def tiny() -> None:
    with tempfile.TemporaryDirectory() as folder:
        tiny_llama.write(Path(folder))
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        assert model.config.rope_parameters["rope_theta"] == tiny_llama.CONFIG["rope_parameters"]["rope_theta"]
        logits, residual = hidden_states(model, torch.tensor(tiny_llama.tokens()))
    np.savez_compressed(GOLDEN / "tiny_llama.npz", logits=logits.numpy(), residual=residual.numpy())
    print(f"tiny_llama: logits rms {logits.pow(2).mean().sqrt():.3f}")


# Where each family keeps its modules: (blocks, embedding, final norm, per block: ln1, attention output projection,
# what attention adds, what the MLP norm (or, without one, the MLP) reads, ln2, MLP output projection, what the MLP adds).
_LLAMA = (
    "model.layers", "model.embed_tokens", "model.norm", "input_layernorm", "self_attn.o_proj", "self_attn",
    "post_attention_layernorm", "post_attention_layernorm", "mlp.down_proj", "mlp",
)
_GEMMA = (
    "model.layers", "model.embed_tokens", "model.norm", "input_layernorm", "self_attn.o_proj",
    "post_attention_layernorm", "pre_feedforward_layernorm", "pre_feedforward_layernorm", "mlp.down_proj",
    "post_feedforward_layernorm",
)
MODULES = {
    "gpt2": (
        "transformer.h", "transformer.wte", "transformer.ln_f", "ln_1", "attn.c_proj", "attn", "ln_2", "ln_2",
        "mlp.c_proj", "mlp",
    ),
    "gpt_neox": (
        "gpt_neox.layers", "gpt_neox.embed_in", "gpt_neox.final_layer_norm", "input_layernorm", "attention.dense",
        "attention", "post_attention_layernorm", "post_attention_layernorm", "mlp.dense_4h_to_h", "mlp",
    ),
    "gemma2": _GEMMA,
    "gemma3": tuple(name.replace("model.", "model.language_model.") for name in _GEMMA),
    "gemma3_text": _GEMMA,
    "olmo2": (
        "model.layers", "model.embed_tokens", "model.norm", None, "self_attn.o_proj", "post_attention_layernorm", "mlp",
        None, "mlp.down_proj", "post_feedforward_layernorm",
    ),
}


def first(value):
    return value[0] if isinstance(value, tuple) else value


def ungained(module, value: torch.Tensor, offset: float) -> torch.Tensor:
    """TransformerLens' hook_normalized: an RMS norm's value before its gain, a LayerNorm's after gain and bias."""
    return value if isinstance(module, torch.nn.LayerNorm) else value / (module.weight + offset)


def watch(model, kept: dict[str, torch.Tensor], model_type: str, offset: float, parallel: bool) -> None:
    """Registers a torch hook for every hookpoint."""
    blocks, embed, final, ln1, o, attn_out, mlp_in, ln2, down, mlp_out = MODULES.get(model_type, _LLAMA)

    def reads(module, name):
        def keep(_, args, kwargs):
            kept[name] = first(args) if args else kwargs["hidden_states"]

        module.register_forward_pre_hook(keep, with_kwargs=True)

    def returns(module, name, convert=lambda module, value: value):
        module.register_forward_hook(lambda module, _, out: kept.__setitem__(name, convert(module, first(out))))

    def gainless(module, value):
        return ungained(module, value, offset)

    returns(model.get_submodule(embed), "hook_embed")
    returns(model.get_submodule(final), "ln_final.hook_normalized", gainless)
    for i, block in enumerate(model.get_submodule(blocks)):
        name = f"blocks.{i}."
        reads(block, name + "hook_resid_pre")
        returns(block, name + "hook_resid_post")
        for norm, hook in ((ln1, "ln1"), (ln2, "ln2")):
            if norm:
                returns(block.get_submodule(norm), f"{name}{hook}.hook_normalized", gainless)
        reads(block.get_submodule(o), name + "attn.hook_z")
        returns(block.get_submodule(attn_out), name + "hook_attn_out")
        reads(block.get_submodule(mlp_in), name + "hook_mlp_in")
        if not parallel:
            reads(block.get_submodule(mlp_in), name + "hook_resid_mid")
        reads(block.get_submodule(down), name + "mlp.hook_post")
        returns(block.get_submodule(mlp_out), name + "hook_mlp_out")


def family(label: str, config: dict) -> None:
    cfg = from_hf(config)
    theirs = AutoConfig.for_model(**config)
    if (again := from_hf(theirs.to_dict())) != cfg:
        raise SystemExit(f"{label}: transformers' own spelling of the config reads as {again}, not {cfg}")
    with tempfile.TemporaryDirectory() as folder:
        families.write(Path(folder), config)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
        )
    if any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise SystemExit(f"{label}: {info}")
    model.eval()
    kept: dict[str, torch.Tensor] = {}
    watch(model, kept, config["model_type"], cfg.norm_offset, cfg.parallel)
    with torch.no_grad():
        logits = model(torch.tensor(families.TOKENS), use_cache=False).logits
    rows, columns = zip(*families.POSITIONS, strict=True)
    np.savez_compressed(
        GOLDEN / "families" / f"{label}.npz",
        logits=logits[:, ::3].numpy(),
        **{name: value[rows, columns].numpy() for name, value in kept.items()},
    )
    print(f"{label}: logits rms {logits.pow(2).mean().sqrt():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct GGUF file; default: the embedded asset")
    parser.add_argument("--families", action="store_true", help="only the tiny random models of every family")
    given = parser.parse_args()
    (GOLDEN / "families").mkdir(parents=True, exist_ok=True)
    for label, config in families.CONFIGS.items():
        family(label, config)
    if not given.families:
        tiny()
        smollm2(given.gguf or assets.model_path("smollm2-135m"))
    for path in sorted(GOLDEN.rglob("*.*")):
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")
