"""Writes the golden files of tests/lm with transformers + torch (never needed to run or to test saejax).

    python -m saejax.assets                                     # fetches the model
    python -m venv torchvenv && torchvenv/bin/pip install torch==2.13.0 transformers gguf numpy accelerate safetensors
    torchvenv/bin/python benchmarks/lm_golden.py

`smollm2.npz`: token ids of two texts, per-token cross-entropy in nats, 64 columns of the logits, and the residual
stream after every layer at a few positions. `tiny_llama.npz`: logits and the residual stream of the tiny random Llama
of tests/lm/tiny_llama.py. `tokenizer.json`: ids of hard texts. All in float32 on CPU, eager attention.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from saejax import assets  # noqa: E402
from tests.lm import tiny_llama  # noqa: E402

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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M GGUF file; default: the embedded asset")
    given = parser.parse_args().gguf
    GOLDEN.mkdir(parents=True, exist_ok=True)
    tiny()
    smollm2(given or assets.model_path("smollm2-135m"))
    for path in sorted(GOLDEN.iterdir()):
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")
