"""The half of `synthetic_quality.py` that runs where torch and sae-lens are installed: sampling the peer's world,
training its SAEs."""

import dataclasses
import itertools
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from sae_lens import __version__ as sae_lens_version
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.evals import ExplainedVarianceCalculator
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import SAE
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.synthetic import (
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
)
from sae_lens.synthetic.evals import ClassificationMetricsCalculator, feature_uniqueness, mean_correlation_coefficient
from sae_lens.training.sae_trainer import SAETrainer
from synthetic_quality import PIECE, SIZES, Size, held_out, pieces, size_of
from tqdm import tqdm

BATCH = 512  # rows drawn at a time: temporary arrays of 34 MB, which malloc can reuse
SEARCHED = ("relu", "gated")  # kinds whose L0 follows from a coefficient
TOLERANCE = 0.03              # of L0, where the search stops
ORTHOGONAL_STEPS, ORTHOGONAL_LR = 100, 3e-4  # of the published world


def searched(run, target: float, start: float, tries: int) -> dict:
    """The result of `run(coefficient)` whose L0 comes closest to the target; log L0 is taken as linear in log
    coefficient."""
    seen = []
    coefficient = start
    for _ in range(max(1, tries)):
        result = run(coefficient)
        seen.append((math.log(coefficient), math.log(max(result["l0"], 1e-3)), result))
        if abs(result["l0"] / target - 1) <= TOLERANCE:
            break
        (a, la, _), (b, lb, _) = (seen[0], seen[0]) if len(seen) == 1 else sorted(
            seen, key=lambda s: abs(s[1] - math.log(target)))[:2]
        slope = (lb - la) / (b - a) if len(seen) > 1 and abs(lb - la) > 1e-6 else -1.0
        slope = min(slope, -0.2)
        coefficient = math.exp(a + float(np.clip((math.log(target) - la) / slope, -1.5, 1.5)))
    return min((s[2] for s in seen), key=lambda result: abs(math.log(max(result["l0"], 1e-3) / target)))


def world(size: Size, device: str) -> SyntheticModel:
    """The peer's world: the configuration of synth-sae-bench-16k-v2, with the size's numbers of features, dimensions,
    roots. Its directions are those that the peer makes, in a thirtieth of the time (`orthogonalised`)."""
    model = SyntheticModel(SyntheticModelConfig(
        num_features=size.features, hidden_dim=size.d_in, bias=0.5, seed=42,
        firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
        hierarchy=HierarchyConfig(
            total_root_nodes=size.roots, branching_factor=4, max_depth=3, mutually_exclusive_portion=1.0,
            mutually_exclusive_min_depth=0, compensate_probabilities=True, scale_children_by_parent=True),
        orthogonalization=None,
        correlation=LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
        mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
        std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5)), device=device)
    vectors = model.feature_dict.feature_vectors
    vectors.data = orthogonalised(vectors.data, ORTHOGONAL_STEPS, ORTHOGONAL_LR)
    return model


def orthogonalised(vectors: torch.Tensor, steps: int, lr: float) -> torch.Tensor:
    """What the peer's `orthogonalize_embeddings` gives: Adam on sum_{i != j} (v_i . v_j)^2 + n sum_i (|v_i|^2 - 1)^2.

    The first sum is |V^T V|^2 - sum_i |v_i|^4, a [d, d] product where the peer makes all [n, n] of them.
    """
    vectors = torch.nn.functional.normalize(vectors).requires_grad_(True)
    adam = torch.optim.Adam([vectors], lr=lr)
    for _ in range(steps):
        sq = vectors.square().sum(1)
        loss = (vectors.T @ vectors).square().sum() - sq.square().sum() + len(vectors) * (sq - 1).square().sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return torch.nn.functional.normalize(vectors.detach())


def bits(x: torch.Tensor) -> np.ndarray:
    """bfloat16 as integers."""
    return x.to(torch.bfloat16).cpu().view(torch.int16).numpy().view(np.uint16)


def sample(args) -> None:
    """Rows in pieces, the directions, and a held-out set with its true activations in compressed rows."""
    size, directory = SIZES[args.size], args.directory
    size = dataclasses.replace(size, rows=args.rows or size.rows, held=args.held or size.held)
    directory.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    model = world(size, args.device)
    made = time.monotonic() - started
    np.save(directory / "directions.npy", model.feature_dict.feature_vectors.detach().cpu().numpy())
    torch.manual_seed(args.seed)
    held = sample_held_out(model, size, directory)
    started, written = time.monotonic(), 0
    with tqdm(total=size.rows, unit="row", unit_scale=True, desc="sample") as bar:
        for piece in range(-(-size.rows // PIECE)):
            n, parts = min(PIECE, size.rows - piece * PIECE), []
            for start in range(0, n, BATCH):
                parts.append(bits(model.sample(min(BATCH, n - start))))
                bar.update(len(parts[-1]))
            file = directory / f"rows-{piece:05d}.npy"
            np.save(file, np.concatenate(parts))
            written += file.stat().st_size
    seconds = time.monotonic() - started
    facts = {"size": dataclasses.asdict(size), "seed": args.seed, "sae_lens": sae_lens_version,
             "torch": torch.__version__, "config": model.cfg.to_dict(), **held}
    (directory / "world.json").write_text(json.dumps(facts, indent=1))
    print(json.dumps({"world_seconds": round(made, 1), "rows_per_second": round(size.rows / seconds),
                      "megabytes_per_million_rows": round(written / size.rows, 1), **held}))


def sample_held_out(model: SyntheticModel, size: Size, directory: Path) -> dict:
    """Writes held_x and the true activations; returns the true L0, of all features and of the `d_sae` most frequent."""
    x, columns, values, counts, frequent = [], [], [], [], 0
    for start in tqdm(range(0, size.held, BATCH), desc="held out", unit="batch"):
        rows, acts = model.sample_with_features(min(BATCH, size.held - start))
        where = acts.nonzero()
        x.append(bits(rows))
        columns.append(where[:, 1].cpu().numpy().astype(np.int32))
        values.append(acts[where[:, 0], where[:, 1]].cpu().numpy())
        counts.append((acts > 0).sum(1).cpu().numpy())
        frequent += int((acts[:, :size.d_sae] > 0).sum())
    total = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    for name, array in (("x", np.concatenate(x)), ("pointer", total), ("columns", np.concatenate(columns)),
                        ("values", np.concatenate(values))):
        np.save(directory / f"held_{name}.npy", array)
    return {"true_l0": float(total[-1] / size.held), "true_l0_of_the_first_d_sae": frequent / size.held}


def rows_of(directory: Path, batch: int, seed: int):
    """Batches of the sampled rows without end, in the order of the files, starting somewhere that the seed chooses."""
    files = pieces(directory)
    for file in itertools.islice(itertools.cycle(files), seed % len(files), None):
        x = np.load(file)
        for start in range(0, len(x) - batch + 1, batch):
            yield torch.from_numpy(x[start:start + batch].view(np.int16)).view(torch.bfloat16).float()


def training_sae(kind: str, size: Size, steps: int, coefficient: float | None, settings: dict):
    """The peer's SAE of a kind: the library's defaults, and what the published experiments set beyond them."""
    common = {"d_in": size.d_in, "d_sae": size.d_sae}
    widths = [size.d_sae // share for share in (32, 8, 2)]
    penalty = {"l1_coefficient": coefficient, "l1_warm_up_steps": steps // 3}
    jumprelu = {"normalize_activations": "expected_average_only_in", "jumprelu_bandwidth": 1.0,
                "jumprelu_init_threshold": 1.0, "decoder_init_norm": 0.5, "jumprelu_sparsity_loss_mode": "quadratic",
                "target_l0": float(size.k)}
    sae, config, own = {
        "relu": (StandardTrainingSAE, StandardTrainingSAEConfig, penalty),
        "gated": (GatedTrainingSAE, GatedTrainingSAEConfig, penalty),
        "topk": (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": size.k}),
        "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": size.k}),
        "matryoshka": (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig,
                       {"k": size.k, "matryoshka_widths": widths, "use_matryoshka_aux_loss": True}),
        "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, jumprelu),
    }[kind]
    fields = {f.name for f in dataclasses.fields(config)}
    return sae(config(**common, **own | {k: v for k, v in settings.items() if k in fields}))


def peer(args) -> None:
    """sae-lens trains each kind on the sampled rows; releases and the peer's own scores go to DIR/peer."""
    size = size_of(args.directory)
    steps = size.tokens // size.batch
    settings = {key: json.loads(value) for key, value in (item.split("=", 1) for item in args.set)}

    def run(kind: str, coefficient: float | None) -> dict:
        torch.manual_seed(args.seed)
        sae = training_sae(kind, size, steps, coefficient, settings).to(args.device)
        values = {"lr": size.lr, "lr_end": size.lr, "dead_feature_window": steps // 10,
                  "n_batches_for_norm_estimate": 100} | settings
        fields = {f.name for f in dataclasses.fields(SAETrainerConfig)}
        trainer = SAETrainer(SAETrainerConfig(
            total_training_samples=size.tokens, train_batch_size_samples=size.batch, device=args.device,
            logger=LoggingConfig(log_to_wandb=False), **{k: v for k, v in values.items() if k in fields}),
            sae=sae, data_provider=rows_of(args.directory, size.batch, args.seed))
        started = time.monotonic()
        sae = trainer.fit()
        seconds = round(time.monotonic() - started, 1)
        label = "-".join([kind, str(args.seed), *([f"{coefficient:.4g}"] if coefficient else []), *args.set])
        path = args.directory / "peer" / label
        released = release(sae, path)
        return {"path": path, "coefficient": coefficient, "seconds": seconds, **own_scores(sae, released, args)}

    for kind in args.kinds:
        start = args.coefficient or {"relu": 2.0, "gated": 1.0}.get(kind)
        found = (searched(lambda c, kind=kind: run(kind, c), size.k, start, args.tries) if kind in SEARCHED
                 else run(kind, None))
        facts = {"library": "sae-lens", "kind": kind, "seed": args.seed, "variant": " ".join(args.set),
                 **{k: v for k, v in found.items() if k not in ("path", "l0")}}
        (found["path"] / "facts.json").write_text(json.dumps(facts))
        print(json.dumps(facts), flush=True)


def release(sae: torch.nn.Module, path: Path) -> SAE:
    """The inference SAE, saved with its decoder norms folded: a topk SAE is saved with a rule to rescale instead."""
    sae.save_inference_model(path)
    released = SAE.load_from_disk(path, device="cpu")
    if getattr(released.cfg, "rescale_acts_by_decoder_norm", False):
        released.fold_W_dec_norm()
        released.cfg.rescale_acts_by_decoder_norm = False
        released.save_model(path)
    return released


@torch.no_grad()
def own_scores(training: torch.nn.Module, released: SAE, args) -> dict:
    """The peer's figures by its own code: of the SAE as trained (its published way), and L0 of the released one."""
    directions = torch.from_numpy(np.load(args.directory / "directions.npy"))
    training = training.to("cpu").eval()
    counts, variance = ClassificationMetricsCalculator(training.W_dec, directions), ExplainedVarianceCalculator()
    rows = active = released_active = 0
    for x, true in held_out(args.directory, 1024):
        x, true = torch.from_numpy(x), torch.from_numpy(true)
        acts = training.encode(x)
        counts.add_batch(acts, true)
        variance.add_batch(training.decode(acts), x)
        rows, active = rows + len(x), active + int((acts != 0).sum())
        released_active += int((released.encode(x) != 0).sum())
    return {"l0": released_active / rows, "own": {
        "l0": active / rows, "f1": counts.compute().f1_score, "explained_variance": variance.compute(),
        "mcc": mean_correlation_coefficient(training.W_dec, directions),
        "uniqueness": feature_uniqueness(training.W_dec, directions)}}
