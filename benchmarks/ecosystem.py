"""Do SAEBench and SAEDashboard take what they are given? In an environment with saejax, torch, sae-lens, sae-bench and
transformer-lens (`saebench`), or saejax and sae-dashboard (`neuronpedia`).

    python benchmarks/ecosystem.py saebench                 # the peers' files of tests/formats/fixtures as torch modules
    python benchmarks/ecosystem.py neuronpedia DIR          # what `saejax features RUN --export=neuronpedia` wrote

saebench: activations and reconstructions of `as_saebench()` beside those that the peer wrote into `io.npz`, the gradient of the
reconstruction in torch beside jax's, then SAEBench's own `core.run_evals` with the module in a small random model of
TransformerLens. neuronpedia: every batch through SAEDashboard's classes and back. Exit code 1 when anything differs.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).resolve().parents[1] / "tests" / "formats" / "fixtures"
LIMIT, HOOKPOINT = 1e-4, "blocks.0.hook_resid_post"


def model_and_text():
    """A random one-block model of width 32, which is the width of the fixtures, and rows of random tokens."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = {f"w{i}": i for i in range(64)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w1")), bos_token="w0",
                                        eos_token="w0", pad_token="w0", unk_token="w1")
    cfg = HookedTransformerConfig(n_layers=1, d_model=32, n_ctx=16, d_head=8, d_vocab=64, act_fn="relu", device="cpu",
                                  model_name="random")
    rows = np.random.default_rng(0).integers(1, 64, (256, 16)).tolist()
    model = HookedTransformer(cfg)
    model.tokenizer = tokenizer  # as an argument it would be looked up by a name on the hub
    return model, Dataset.from_dict({"tokens": rows})


def evaluated(view, model, text) -> dict:
    """What SAEBench's core evaluation says of it."""
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_bench.evals.core.main import run_evals
    from sae_bench.sae_bench_utils.general_utils import _standardize_sae_cfg
    from sae_lens import ActivationsStore

    _standardize_sae_cfg(view.cfg)
    store = ActivationsStore.from_sae(model, view, context_size=16, dataset=text, streaming=False, store_batch_size_prompts=8,
                                      n_batches_in_buffer=2)
    options = CoreEvalConfig(batch_size_prompts=8, n_eval_reconstruction_batches=2, n_eval_sparsity_variance_batches=2,
                             compute_kl=True, compute_ce_loss=True, compute_l2_norms=True, compute_sparsity_metrics=True,
                             compute_variance_metrics=True, compute_featurewise_density_statistics=True,
                             compute_featurewise_weight_based_metrics=True)
    scalars, features = run_evals(view, store, model, options)
    assert all(len(values) == view.cfg.d_sae for values in features.values()), "a list of every feature"
    return {name: value for group in scalars.values() for name, value in group.items()}


def gradients_differ(sae, view, x) -> float:
    """Largest relative difference of d |recon|^2 / d x."""
    import jax
    import torch

    ours = np.asarray(jax.grad(lambda x: (sae(x) ** 2).sum())(x))
    given = torch.from_numpy(x).requires_grad_()
    (view(given) ** 2).sum().backward()
    return float(np.abs(ours - given.grad.numpy()).max() / np.abs(ours).max())


def saebench() -> bool:
    import torch

    import saejax
    from saejax.base.errors import FormatError

    model, text = model_and_text()
    good = True
    print("| file | architecture | activations | reconstruction | gradient | L0 by SAEBench | its core evaluation |")
    print("|---|---|---|---|---|---|---|")
    for folder in sorted(path.parent for path in FIXTURES.glob("*/*/io.npz")):
        sae, io = saejax.load(folder), np.load(folder / "io.npz")
        sae.cfg = dataclasses.replace(sae.cfg, hookpoints=(HOOKPOINT,))
        name = folder.relative_to(FIXTURES)
        try:
            view = sae.as_saebench(model_name="random")
        except FormatError as error:
            print(f"| `{name}` | refused: {str(error).split(': ', 1)[1]} | | | | | |")
            continue
        with torch.no_grad():
            acts, recon = view.encode(torch.from_numpy(io["x"])), view(torch.from_numpy(io["x"]))
        found = [float(np.abs(got.numpy() - io[want]).max()) for got, want in ((acts, "feature_acts"), (recon, "x_hat"))]
        found.append(gradients_differ(sae, view, io["x"]))
        scores = evaluated(view, model, text)
        good &= max(found) <= LIMIT and len(scores) > 10
        differences = " | ".join(f"{value:.1e}" for value in found)
        print(f"| `{name}` | {view.cfg.architecture} | {differences} | {scores['l0']:.2f} | {len(scores)} numbers, MSE "
              f"{scores['mse']:.3g}, CE with SAE {scores['ce_loss_with_sae']:.3g} |", flush=True)
    return good


def neuronpedia(folder: Path) -> bool:
    from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch

    features = activations = 0
    good = True
    for file in sorted(folder.glob("batch-*.json")):
        written = json.loads(file.read_text())
        read = NeuronpediaDashboardBatch(**written)
        good &= read.to_dict() == written
        features += len(read.features)
        activations += sum(len(feature.activations) for feature in read.features)
    print(f"{features:,} features with {activations:,} examples: {'read and written again unchanged' if good else 'DIFFERENT'}")
    return good and features > 0


if __name__ == "__main__":
    what, *rest = sys.argv[1:] or [""]
    if what not in ("saebench", "neuronpedia") or len(rest) != (what == "neuronpedia"):
        sys.exit(__doc__)
    sys.exit(not (saebench() if what == "saebench" else neuronpedia(Path(rest[0]))))
