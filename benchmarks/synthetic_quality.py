"""How much of a known world SAEs recover: saejax beside SAELens and beside the published SynthSAEBench table.

    python benchmarks/synthetic_quality.py sample DIR [--size small] [--rows N] [--held N]      torch + sae-lens
    python benchmarks/synthetic_quality.py peer   DIR KIND... [--seed 0]                        torch + sae-lens
    python benchmarks/synthetic_quality.py train  DIR KIND... [--seed 0] [--set train.lr=1e-3]  saejax
    python benchmarks/synthetic_quality.py score  DIR                                           saejax
    python benchmarks/synthetic_quality.py table  DIR                                           saejax

`sample` draws rows from the peer's own world (sae-lens 6.54.12, the configuration of synth-sae-bench-16k-v2, world
seed 42) and a held-out set with its true activations; `peer` and `train` read the same rows from DIR, in bfloat16.
`peer` leaves releases, which `score` measures with the same code and on the same held-out rows as `train` does its
own; the peer's own figures are kept beside. Kinds: relu topk batchtopk jumprelu matryoshka gated. Ours aim at k, relu and
gated by `train.target_l0`; the peer's kinds without a k are searched for the coefficient of their penalty until their held-out
L0 is within 3 % of k, at most --tries runs.
Results are lines of DIR/results.jsonl.

Sizes: "published" (16,384 features in 768 dimensions, 4,096 SAE features, k = 25, batch 1,024; the table used 200
million samples, 307 GB in bfloat16: use several epochs of fewer) and "small" (512 in 64, 128, k = 4), of the same
laws and proportions.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

KINDS = ("relu", "topk", "batchtopk", "jumprelu", "matryoshka", "gated")
PIECE = 65_536  # rows in one file
FIGURES = ("l0", "f1", "mcc", "uniqueness", "explained_variance")

# docs/synth_sae_bench.md of SAELens (arXiv 2602.14687): L0 = 25, width 4,096, 200 million samples, means over seeds.
PUBLISHED = {"batchtopk": (.7316, .7574, .9837, .7923), "matryoshka": (.8793, .7927, .9987, .7792),
             "matching pursuit": (.4464, .6930, .8281, .8351), "relu": (.5562, .6039, .8976, .7654),
             "jumprelu": (.7317, .7527, .9885, .7951)}


@dataclass(frozen=True)
class Size:
    """A world and the SAEs trained on it; `lr`, `tokens` and `batch` are the same for both libraries."""

    features: int
    d_in: int
    roots: int
    d_sae: int
    k: int
    batch: int
    lr: float
    tokens: int
    rows: int
    held: int


SIZES = {"published": Size(16_384, 768, 128, 4096, 25, 1024, 3e-4, 200_000_000, 20 * 2**20, 2**17),
         "small": Size(512, 64, 4, 128, 4, 512, 1e-3, 2**20, 2**20, 2**15)}


def size_of(directory: Path) -> Size:
    """The size that a directory was sampled at."""
    return Size(**json.loads((directory / "world.json").read_text())["size"])


def pieces(directory: Path) -> list[Path]:
    return sorted(directory.glob("rows-*.npy"))


def held_out(directory: Path, batch: int = 4096):
    """Batches (x float32 [n, D], true activations [n, F]) of the held-out set."""
    bits = np.load(directory / "held_x.npy", mmap_mode="r")
    pointer, cols, values = (np.load(directory / f"held_{name}.npy") for name in ("pointer", "columns", "values"))
    features = size_of(directory).features
    for start in range(0, len(bits), batch):
        stop = min(start + batch, len(bits))
        x = np.left_shift(bits[start:stop].astype(np.uint32), 16).view(np.float32)
        true = np.zeros((stop - start, features), np.float32)
        here = slice(pointer[start], pointer[stop])
        true[np.repeat(np.arange(stop - start), np.diff(pointer[start:stop + 1])), cols[here]] = values[here]
        yield x, true


def append(directory: Path, **values) -> None:
    """One more line of results."""
    with open(directory / "results.jsonl", "a") as file:
        file.write(json.dumps(values) + "\n")
    print(json.dumps(values), flush=True)


def open_store(directory: Path, size: Size):
    """The sampled rows as an activation store, made at the first call."""
    import ml_dtypes

    from saejax.data.arrays import write_rows
    from saejax.data.store import Store, is_complete
    if is_complete(directory / "store"):
        return Store.open(directory / "store")
    files = pieces(directory)
    rows = sum(len(np.load(file, mmap_mode="r")) for file in files)
    source = {"world": json.loads((directory / "world.json").read_text())}
    return write_rows(directory / "store", (np.load(file).view(ml_dtypes.bfloat16) for file in files), rows,
                      {"synthetic": size.d_in}, model="synthetic", source=source)


def recipe(kind: str, size: Size, run: Path, args):
    """The recipe of a kind at a size; only what the size decides, and `--set`, differs from `default_config(kind)`."""
    from saejax.config import default_config, resolve
    from saejax.config.recipes import WITH_K
    c = default_config(kind)
    c.run_dir, c.lm.model, c.seed, c.log.tensorboard = str(run), "synthetic", args.seed, False
    c.harvest.hookpoints, c.sae.hookpoint = ("synthetic",), "synthetic"
    c.sae.d_sae, c.sae.k = size.d_sae, size.k
    if c.sae.kind not in WITH_K and c.sae.penalty != "target_l0":
        c.train.target_l0 = float(size.k)
    c.sae.dead_tokens = size.tokens // 10
    if c.sae.aux_k:
        c.sae.aux_k = min(256, size.d_in // 2)
    c.train.batch, c.train.tokens, c.train.lr = size.batch, size.tokens, size.lr
    c.checkpoint.every_tokens = size.tokens
    for item in args.set:
        key, value = item.split("=", 1)
        node, *rest = key.split(".")
        target = c
        for part in rest:
            target, node = target[node], part
        try:
            target[node] = json.loads(value)
        except ValueError:
            target[node] = value
    return resolve(c)


def measured(sae, directory: Path) -> dict:
    """Scores of an SAE on the held-out set, with a progress bar."""
    from saejax.base.logs import Progress
    from saejax.evals.synthetic import score

    def batches():
        for x, true in held_out(directory):
            yield x, true
            bar.advance(len(x))

    with Progress("score", size_of(directory).held, unit="row") as bar:
        return score(sae, batches(), np.load(directory / "directions.npy"))


def train(args) -> None:
    """saejax trains each kind on the sampled rows and is scored."""
    import saejax
    from saejax.train import loop
    size = size_of(args.directory)
    store = open_store(args.directory, size)

    for kind in args.kinds:
        label = "-".join([kind, str(args.seed), *args.set])
        path = args.directory / "runs" / label.replace("/", "_").replace("=", "_").replace(" ", "")
        started = time.monotonic()
        loop.train(recipe(kind, size, path, args), store)
        seconds = round(time.monotonic() - started, 1)
        append(args.directory, library="saejax", kind=kind, seed=args.seed, variant=" ".join(args.set),
               **measured(saejax.load(path), args.directory), seconds=seconds)


def score_peer(args) -> None:
    """Scores of the releases that `peer` has left, by the code that scores saejax's own."""
    import saejax
    for facts in sorted(args.directory.glob("peer/*/facts.json")):
        known = json.loads(facts.read_text())
        append(args.directory, **known, **measured(saejax.load(facts.parent), args.directory))


def table(args) -> None:
    """Markdown: means (and half ranges over seeds) of every library, kind and variant, newest line of each seed."""
    lines = [json.loads(line) for line in (args.directory / "results.jsonl").read_text().splitlines()]
    newest = {(r["library"], r["kind"], r["variant"], r["seed"]): r for r in lines}
    groups: dict[tuple, list[dict]] = {}
    for (library, kind, variant, _), r in newest.items():
        groups.setdefault((KINDS.index(kind), library, variant), []).append(r)
    columns = ("kind", "library", "L0", "F1", "MCC", "uniqueness", "explained variance", "dead", "seeds", "s")
    print(f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
    for (kind, library, variant), runs in sorted(groups.items()):
        cells = [_mean([r[name] for r in runs], 2 if name == "l0" else 3) for name in FIGURES]
        cells += [_mean([r["dead_features"] for r in runs], 0), str(len(runs)), _mean([r["seconds"] for r in runs], 0)]
        print(f"| {KINDS[kind]}{f' ({variant})' if variant else ''} | {library} | {' | '.join(cells)} |")
    print("\nPublished, 16,384 features, 200 million samples:\n\n"
          "| kind | L0 | F1 | MCC | uniqueness | explained variance |\n|---|---|---|---|---|---|")
    for kind, values in PUBLISHED.items():
        print(f"| {kind} | 25 | {' | '.join(f'{v:.4f}' for v in values)} |")


def _mean(values: list[float], digits: int) -> str:
    half = (max(values) - min(values)) / 2
    return f"{np.mean(values):.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 and digits else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("sample", "peer", "train", "score", "table"):
        command = commands.add_parser(name)
        command.add_argument("directory", type=Path)
        if name in ("peer", "train"):
            command.add_argument("kinds", nargs="+", choices=KINDS)
            command.add_argument("--seed", type=int, default=0)
            command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
        if name == "peer":
            command.add_argument("--tries", type=int, default=4, help="runs of the search for a coefficient")
            command.add_argument("--coefficient", type=float, help="where the search starts")
        if name == "sample":
            command.add_argument("--size", choices=SIZES, default="small")
            command.add_argument("--rows", type=int)
            command.add_argument("--held", type=int)
            command.add_argument("--seed", type=int, default=0, help="of the samples; the world's is 42")
        if name in ("sample", "peer"):
            command.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.command in ("sample", "peer"):
        import synthetic_peer
        getattr(synthetic_peer, args.command)(args)
    else:
        {"train": train, "score": score_peer, "table": table}[args.command](args)


if __name__ == "__main__":
    main()
