"""Speed of the decoder beside transformers + torch, the two sides taking turns on the same machine; the best of each counts.

    python -m saejax.base.assets
    python benchmarks/lm_side_by_side.py            # needs torch only for the lines marked torch; skips them without it

Prints tokens/s of a full forward (8 x 128 tokens, float32), of a harvest up to layer 15, of greedy generation, the
perplexity of SmolLM2-135M-Instruct on a fixed text by both, and the compile time of a 64-layer decoder.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

BATCH, LENGTH, REPEATS = 8, 128, 5


def fixed_text_ids(tokenizer) -> np.ndarray:
    """The first 8,192 tokens of the `shakespeare` text, whose content is pinned, in rows of 512."""
    from saejax.base.assets import text_path

    with open(text_path("shakespeare")) as documents:
        text = "\n".join(json.loads(next(documents))["text"] for _ in range(8))
    ids = tokenizer.encode(text)[: 16 * 512]
    return np.asarray(ids, np.int32).reshape(-1, 512)


def best(run) -> float:
    run()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def ours(ids_file: Path) -> dict:
    import jax
    import jax.numpy as jnp

    from saejax import lm

    loaded = lm.load("smollm2-135m")
    rows = fixed_text_ids(loaded.tokenizer)
    np.save(ids_file, rows)
    tokens = jnp.asarray(rows[:, :LENGTH][:BATCH])
    full = jax.jit(lambda m, t: m(t))
    harvest = jax.jit(lambda m, t: lm.capture(m, t, ["blocks.15.hook_resid_post"]))
    nll = jax.jit(lambda m, t: lm.cross_entropy(m(t), t))
    found = {
        "forward_tokens_per_s": tokens.size / best(lambda: jax.block_until_ready(full(loaded.model, tokens))),
        "harvest_15_tokens_per_s": tokens.size / best(lambda: jax.block_until_ready(harvest(loaded.model, tokens))),
    }
    prompt = loaded.tokenizer.encode("Once upon a time")
    seconds = best(lambda: lm.generate(loaded.model, [prompt], 64))
    found["generated_tokens_per_s"] = 64 / seconds
    found["perplexity"] = math.exp(float(np.mean([np.asarray(nll(loaded.model, row[None])) for row in rows])))
    found["compile_64_layers_s"] = compile_64_layers()
    return found


def compile_64_layers() -> float:
    """Seconds to trace and compile the forward pass of a 64-layer Llama of 8B width, shapes only."""
    import jax
    import jax.numpy as jnp

    from saejax import lm
    from saejax.lm.hf_config import from_hf
    from saejax.lm.leaves import leaves

    cfg = from_hf(
        {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 64, "head_dim": 128}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "rope_theta": 5e5}
    )
    params = {name: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16) for name, leaf in leaves(cfg).items()}
    tokens = jax.ShapeDtypeStruct((8, 256), jnp.int32)
    start = time.perf_counter()
    jax.jit(lambda p, t: lm.Decoder(cfg, p)(t, taps={"blocks.40.hook_resid_post": lambda x: x})).lower(
        params, tokens
    ).compile()
    return time.perf_counter() - start


def theirs(ids_file: Path) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    from saejax.base import assets

    path = assets.model_path("smollm2-135m")
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    rows = torch.tensor(np.load(ids_file)).long()
    tokens = rows[:, :LENGTH][:BATCH]
    with torch.no_grad():
        seconds = best(lambda: model(tokens, use_cache=False).logits)
        logits = [model(row[None], use_cache=False).logits[0, :-1] for row in rows]
        nll = [torch.nn.functional.cross_entropy(x, row[1:]) for x, row in zip(logits, rows, strict=True)]
        prompt = rows[:1, :4]
        drawn = best(lambda: model.generate(prompt, max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0))
    return {
        "forward_tokens_per_s": tokens.numel() / seconds,
        "generated_tokens_per_s": 64 / drawn,
        "perplexity": math.exp(float(torch.stack(nll).mean())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=("ours", "theirs"), help="(run by the script itself, one process per side)")
    parser.add_argument("--ids", type=Path, help="(run by the script itself) where token ids are kept")
    parser.add_argument("--turns", type=int, default=2, help="turns of each side")
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter that has torch")
    given = parser.parse_args()
    if given.side:
        print(json.dumps({"ours": ours, "theirs": theirs}[given.side](given.ids)))
        return
    with tempfile.TemporaryDirectory() as folder:
        for side, python in (("ours", sys.executable), ("theirs", given.torch_python)) * given.turns:
            command = [python, __file__, "--side", side, "--ids", str(Path(folder) / "ids.npy")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            print(side, done.stdout.strip().splitlines()[-1] if done.returncode == 0 else done.stderr.strip()[-300:], flush=True)


if __name__ == "__main__":
    main()
