"""Would the tests notice? Breaks one formula of the readers at a time, in a copy, and runs tests/formats.

    python benchmarks/format_mutations.py [WORD]      # only mutations whose name has WORD

Prints one row per mutation with the first test that fails; exit code 1 when a mutation survives. Some ten seconds each.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MUTATIONS = {  # file -> (what is broken, text, text in its place)
    "saejax/sae/row_norm.py": (
        ("layer_norm without eps", "(std_B1 + LAYER_NORM_EPS)", "std_B1"),
        ("layer_norm: eps also on the way back", "LAYER_NORM_EPS), std_B1,", "LAYER_NORM_EPS), std_B1 + LAYER_NORM_EPS,"),
        ("layer_norm: biased std", "ddof=1", "ddof=0"),
        ("constant norm: no sqrt(d)", "/ x_BD.shape[1] ** 0.5", "/ 1.0"),
    ),
    "saejax/sae/inference.py": (
        ("layer_norm: mean not added back", "recon * scale + shift", "recon * scale"),
        ("row norm undone in a transcoder", "== NONE or self.cfg.d_out is not None:", "== NONE:"),
        ("b_dec subtracted before the norm", "normalise_rows(norm, x_BD)[0])\n",
         "normalise_rows(norm, x_BD - (params.b_dec if norm != NONE else 0))[0] + (params.b_dec if norm != NONE else 0))\n"),
    ),
    "saejax/sae/activations.py": (
        ("threshold not strict", "jnp.where(pre_BF > threshold_F, jax.nn.relu", "jnp.where(pre_BF >= threshold_F, jax.nn.relu"),
        ("groupmax: smallest of a group", "grouped_BKG.argmax(2", "grouped_BKG.argmin(2"),
    ),
    "saejax/sae/folding.py": (
        ("fold: threshold forgotten", "value if name in _RATIOS else value * by_F", "value"),
        ("fold: r_mag scaled", '_RATIOS = ("r_mag",)', "_RATIOS = ()"),
        ("fold: b_enc forgotten", "b_enc=params.b_enc * by_F", "b_enc=params.b_enc"),
        ("fold: b_dec keeps the scale", "b_dec=params.b_dec / written", "b_dec=params.b_dec"),
        ("fold: W_dec times instead of by the scale", "W_dec=params.W_dec / written", "W_dec=params.W_dec * written"),
        ("b_dec moved with the wrong sign", "(1.0 if wants else -1.0)", "(-1.0 if wants else 1.0)"),
    ),
    "saejax/formats/saelens_read.py": (
        ("SAELens: apply_b_dec_to_input ignored", 'pre_bias = keys.get("apply_b_dec_to_input", bool, True)',
         'pre_bias = bool(keys.get("apply_b_dec_to_input", bool, True)) or not transcoder'),
        ("SAELens: decoder norms of topk ignored", "bool, False)\n    keys.finish", "bool, False) and False\n    keys.finish"),
        ("SAELens: topk_threshold not divided by the scale", "/ (scale if rescaled else 1.0)", "/ 1.0"),
        ("SAELens: topk_threshold times decoder norms", "jnp.full_like(params.b_enc, self.threshold)",
         "self.threshold * decoder_norms(params)"),
        ("SAELens: log_threshold taken as threshold", 'jnp.exp(params.per_feature["threshold"])',
         'params.per_feature["threshold"]'),
        ("SAELens: activation_scaler ignored", "    return factor\n", "    return 1.0\n"),
    ),
    "saejax/formats/saelens.py": (
        ("SAELens: W_enc not transposed", 'TRANSPOSED = ("W_enc", "W_skip")', 'TRANSPOSED = ("W_skip",)'),
    ),
    "saejax/formats/sparsify.py": (
        ("sparsify: b_dec not subtracted", "pre_bias=not transcode", "pre_bias=False"),
        ("sparsify: W_skip not transposed", '_NAMES, ("W_skip",)', "_NAMES, ()"),
    ),
    "saejax/formats/dictionary_learning.py": (
        ("dictionary_learning: W_dec not transposed", 'return ("W_dec",) if self.linear', "return () if self.linear"),
        ("dictionary_learning: JumpReLU subtracts b_dec", '"threshold"}, False, False)', '"threshold"}, True, False)'),
        ("dictionary_learning: New subtracts its bias", '"decoder.bias"}, False)', '"decoder.bias"}, True)'),
        ("dictionary_learning: norm_factor upside down", "params, 1 / norm_factor)", "params, norm_factor)"),
    ),
    "saejax/formats/gemma_scope.py": (
        ("Gemma Scope: b_dec subtracted", "k=0, pre_bias=False", "k=0, pre_bias=True"),
        ("Gemma Scope: embedding scale upside down", "1 / math.sqrt(", "math.sqrt("),
    ),
    "saejax/formats/openai.py": (
        ("OpenAI: pre_bias not subtracted", "pre_bias=True", "pre_bias=False"),
        ("OpenAI: no layer norm", "norm = LAYER_NORM if k else NONE", "norm = NONE"),
    ),
    "saejax/formats/goodfire.py": (
        ("Goodfire: bias subtracted", "pre_bias=False", "pre_bias=True"),
    ),
    "saejax/formats/openmoss.py": (
        ("OpenMOSS: threshold without decoder norms", "threshold = threshold / norms", "pass"),
        ("OpenMOSS: average norm upside down", "d_in ** 0.5 / found[0], d_in ** 0.5 / found[1]",
         "found[0] / d_in ** 0.5, found[1] / d_in ** 0.5"),
        ("OpenMOSS: learned threshold not folded", "jnp.exp(threshold) / self.read", "jnp.exp(threshold)"),
    ),
    "saejax/formats/archives.py": (
        ("torch: column-major read as row-major", "offset + tensor.start * itemsize, columns)",
         "offset + tensor.start * itemsize)"),
    ),
    "saejax/formats/arrays.py": (
        ("bfloat16: shifted by 15", "<< 16).view", "<< 15).view"),
        ("slices: column offset forgotten", "* width + columns.start)", "* width)"),
    ),
}
TESTS = [f"tests/{name}.py" for name in
         ("formats/test_built", "formats/test_built_saelens", "formats/test_fixtures", "sae/test_folding")]


def first_failure(copy: Path) -> str:
    """The first test that fails in a copy of the repository; empty when all pass."""
    env = os.environ | {"PYTHONPATH": str(copy), "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache")}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
    found = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.M)
    return found[1] if found else "" if done.returncode == 0 else f"exit code {done.returncode}"


def main(word: str) -> int:
    survived = 0
    print("| broken | first test that fails |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", ".jax_cache", "runs", "__pycache__"))
        for file, (name, old, new) in ((f, m) for f, found in MUTATIONS.items() for m in found if word in m[0]):
            text = (ROOT / file).read_text()
            if text.count(old) != 1:
                sys.exit(f"{name}: {file} has {text.count(old)} times {old!r}; adapt the mutation")
            (copy / file).write_text(text.replace(old, new))
            failed = first_failure(copy)
            (copy / file).write_text(text)
            survived += not failed
            print(f"| {name} | {f'`{failed}`' if failed else 'SURVIVED'} |", flush=True)
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2] or [""]))
