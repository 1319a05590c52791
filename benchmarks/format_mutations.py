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
SAE, FORMATS = "saejax/sae", "saejax/formats"
MUTATIONS = [
    ("layer_norm without eps", f"{SAE}/row_norm.py", "(std_B1 + LAYER_NORM_EPS)", "std_B1"),
    (
        "layer_norm: eps also on the way back",
        f"{SAE}/row_norm.py",
        "LAYER_NORM_EPS), std_B1,",
        "LAYER_NORM_EPS), std_B1 + LAYER_NORM_EPS,",
    ),
    ("layer_norm: biased std", f"{SAE}/row_norm.py", "ddof=1", "ddof=0"),
    ("layer_norm: mean not added back", f"{SAE}/inference.py", "recon * scale + shift", "recon * scale"),
    ("constant norm: no sqrt(d)", f"{SAE}/row_norm.py", "/ x_BD.shape[1] ** 0.5", "/ 1.0"),
    ("row norm undone in a transcoder", f"{SAE}/inference.py", "== NONE or self.cfg.d_out is not None:", "== NONE:"),
    (
        "b_dec subtracted before the norm",
        f"{SAE}/inference.py",
        "normalise_rows(norm, x_BD)[0])\n",
        "normalise_rows(norm, x_BD - (params.b_dec if norm != NONE else 0))[0] + (params.b_dec if norm != NONE else 0))\n",
    ),
    (
        "threshold not strict",
        f"{SAE}/activations.py",
        "jnp.where(pre_BF > threshold_F, jax.nn.relu",
        "jnp.where(pre_BF >= threshold_F, jax.nn.relu",
    ),
    ("groupmax: smallest of a group", f"{SAE}/activations.py", "grouped_BKG.argmax(2", "grouped_BKG.argmin(2"),
    ("fold: threshold forgotten", f"{SAE}/folding.py", "value if name in _RATIOS else value * by_F", "value"),
    ("fold: r_mag scaled", f"{SAE}/folding.py", '_RATIOS = ("r_mag",)', "_RATIOS = ()"),
    ("fold: b_enc forgotten", f"{SAE}/folding.py", "b_enc=params.b_enc * by_F", "b_enc=params.b_enc"),
    ("fold: b_dec keeps the scale", f"{SAE}/folding.py", "b_dec=params.b_dec / written", "b_dec=params.b_dec"),
    (
        "fold: W_dec times instead of by the scale",
        f"{SAE}/folding.py",
        "W_dec=params.W_dec / written",
        "W_dec=params.W_dec * written",
    ),
    ("b_dec moved with the wrong sign", f"{SAE}/folding.py", "(1.0 if wants else -1.0)", "(-1.0 if wants else 1.0)"),
    (
        "SAELens: apply_b_dec_to_input ignored",
        f"{FORMATS}/saelens_read.py",
        'pre_bias = keys.get("apply_b_dec_to_input", bool, True)',
        'pre_bias = bool(keys.get("apply_b_dec_to_input", bool, True)) or not transcoder',
    ),
    (
        "SAELens: decoder norms of topk ignored",
        f"{FORMATS}/saelens_read.py",
        "bool, False)\n    keys.finish",
        "bool, False) and False\n    keys.finish",
    ),
    ("SAELens: topk_threshold not divided by the scale", f"{FORMATS}/saelens_read.py", "/ (scale if rescaled else 1.0)", "/ 1.0"),
    (
        "SAELens: topk_threshold times decoder norms",
        f"{FORMATS}/saelens_read.py",
        "jnp.full_like(params.b_enc, self.threshold)",
        "self.threshold * decoder_norms(params)",
    ),
    (
        "SAELens: log_threshold taken as threshold",
        f"{FORMATS}/saelens_read.py",
        'jnp.exp(params.per_feature["threshold"])',
        'params.per_feature["threshold"]',
    ),
    ("SAELens: activation_scaler ignored", f"{FORMATS}/saelens_read.py", "    return factor\n", "    return 1.0\n"),
    ("SAELens: W_enc not transposed", f"{FORMATS}/saelens.py", 'TRANSPOSED = ("W_enc", "W_skip")', 'TRANSPOSED = ("W_skip",)'),
    ("sparsify: b_dec not subtracted", f"{FORMATS}/sparsify.py", "pre_bias=not transcode", "pre_bias=False"),
    ("sparsify: W_skip not transposed", f"{FORMATS}/sparsify.py", '_NAMES, ("W_skip",)', "_NAMES, ()"),
    (
        "dictionary_learning: W_dec not transposed",
        f"{FORMATS}/dictionary_learning.py",
        'return ("W_dec",) if self.linear',
        "return () if self.linear",
    ),
    (
        "dictionary_learning: JumpReLU subtracts b_dec",
        f"{FORMATS}/dictionary_learning.py",
        '"threshold"}, False, False)',
        '"threshold"}, True, False)',
    ),
    (
        "dictionary_learning: New subtracts its bias",
        f"{FORMATS}/dictionary_learning.py",
        '"decoder.bias"}, False)',
        '"decoder.bias"}, True)',
    ),
    (
        "dictionary_learning: norm_factor upside down",
        f"{FORMATS}/dictionary_learning.py",
        "params, 1 / norm_factor)",
        "params, norm_factor)",
    ),
    ("Gemma Scope: b_dec subtracted", f"{FORMATS}/gemma_scope.py", "k=0, pre_bias=False", "k=0, pre_bias=True"),
    ("Gemma Scope: embedding scale upside down", f"{FORMATS}/gemma_scope.py", "1 / math.sqrt(", "math.sqrt("),
    ("OpenAI: pre_bias not subtracted", f"{FORMATS}/openai.py", "pre_bias=True", "pre_bias=False"),
    ("OpenAI: no layer norm", f"{FORMATS}/openai.py", "norm = LAYER_NORM if k else NONE", "norm = NONE"),
    ("Goodfire: bias subtracted", f"{FORMATS}/goodfire.py", "pre_bias=False", "pre_bias=True"),
    ("OpenMOSS: threshold without decoder norms", f"{FORMATS}/openmoss.py", "threshold = threshold / norms", "pass"),
    (
        "OpenMOSS: average norm upside down",
        f"{FORMATS}/openmoss.py",
        "d_in ** 0.5 / found[0], d_in ** 0.5 / found[1]",
        "found[0] / d_in ** 0.5, found[1] / d_in ** 0.5",
    ),
    (
        "OpenMOSS: learned threshold not folded",
        f"{FORMATS}/openmoss.py",
        "jnp.exp(threshold) / self.read",
        "jnp.exp(threshold)",
    ),
    (
        "torch: column-major read as row-major",
        f"{FORMATS}/archives.py",
        "offset + tensor.start * itemsize, columns)",
        "offset + tensor.start * itemsize)",
    ),
    ("bfloat16: shifted by 15", f"{FORMATS}/arrays.py", "<< 16).view", "<< 15).view"),
    ("slices: column offset forgotten", f"{FORMATS}/arrays.py", "* width + columns.start)", "* width)"),
]


def first_failure(copy: Path) -> str:
    """The first test that fails in a copy of the repository; empty when all pass."""
    env = os.environ | {"PYTHONPATH": str(copy), "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache")}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            "tests/formats/test_built.py",
            "tests/formats/test_fixtures.py",
            "tests/sae/test_folding.py",
        ],
        cwd=copy,
        env=env,
        capture_output=True,
        text=True,
    )
    found = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.M)
    return found[1] if found else "" if done.returncode == 0 else f"exit code {done.returncode}"


def main(word: str) -> int:
    survived = 0
    print("| broken | first test that fails |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", ".jax_cache", "runs", "__pycache__"))
        for name, file, old, new in (m for m in MUTATIONS if word in m[0]):
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
