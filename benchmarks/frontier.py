"""L0 against FVU of every SAE of a finished sweep: a CSV and a plot.

    python benchmarks/frontier.py runs/frontier... [--out docs/measurements/frontier.csv]
    python benchmarks/frontier.py runs/frontier_1 --beside runs/frontier_8

Held-out figures of each SAE's newest evaluation, of SAEs in several sweeps those of the last; writes the CSV and a plot and
prints a Markdown table. With --beside, how far
the training metrics of two sweeps of the same SAEs are apart (another mesh, say), and nothing is written.
"""

import argparse
import csv
import json
from pathlib import Path

from saejax.base.logs import read_metrics
from saejax.base.records import RunPaths
from saejax.config import read_config

FIGURES = ("l0_mean", "fvu", "fvu_no_outliers", "ce_recovered", "dead_fraction", "tokens")


def rows_of(sweeps: list[Path]) -> list[dict]:
    """One row per evaluated SAE below the sweeps' directories, by kind and L0."""
    out = []
    for evaluation in {file.parent.name: file for sweep in sweeps for file in sweep.glob("*/eval.json")}.values():
        sae = read_config(RunPaths(evaluation.parent).config).sae
        kind = "matryoshka" if sae.groups else f"jumprelu, {sae.penalty}" if sae.kind == "jumprelu" else sae.kind
        result = json.loads(evaluation.read_text())["entries"][-1]["result"]
        out.append({"kind": kind, "run": evaluation.parent.name, **{name: result[name] for name in FIGURES}})
    return sorted(out, key=lambda row: (row["kind"], row["l0_mean"]))


def plot(rows: list[dict], file: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for kind, marker in zip(dict.fromkeys(row["kind"] for row in rows), "osD^vPX*", strict=False):
        own = [row for row in rows if row["kind"] == kind]
        axes.plot([row["l0_mean"] for row in own], [row["fvu"] for row in own], marker=marker, label=kind)
    axes.set(xlabel="L0 (features per token)", ylabel="FVU on held-out text", xscale="log")
    axes.set_xticks([8, 16, 32, 64, 128], labels=["8", "16", "32", "64", "128"])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def _by_step(run: Path) -> dict[int, dict]:
    return {line["step"]: line for line in read_metrics(RunPaths(run).metrics)}


def compare(a: Path, b: Path) -> None:
    """Prints the largest differences over all logged steps, SAE by SAE."""
    print("| SAE | steps | last L0 | last FVU | largest difference of L0 | of FVU, relative |\n|---|---|---|---|---|---|")
    for config in sorted(a.glob("*/config.json")):
        name = config.parent.name
        one, other = _by_step(a / name), _by_step(b / name)
        if one.keys() != other.keys():
            raise SystemExit(f"{name}: the two sweeps logged different steps")
        l0 = max(abs(one[s]["l0"] - other[s]["l0"]) for s in one)
        fvu = max(abs(one[s]["fvu"] / other[s]["fvu"] - 1) for s in one)
        last = max(one)
        print(f"| {name} | {last} | {one[last]['l0']:.3f} | {one[last]['fvu']:.5f} | {l0:.1e} | {fvu:.1e} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweeps", type=Path, nargs="+", metavar="SWEEP")
    parser.add_argument("--out", type=Path, default=Path("docs/measurements/frontier.csv"))
    parser.add_argument("--plot", type=Path, default=Path("docs/images/frontier.png"))
    parser.add_argument("--beside", type=Path, help="another sweep of the same SAEs, to compare with")
    args = parser.parse_args()
    if args.beside:
        compare(args.sweeps[0], args.beside)
        return
    rows = rows_of(args.sweeps)
    if not rows:
        parser.error(f"{args.sweeps[0]}: no evaluated SAE below; run `saejax eval {args.sweeps[0]}` first")
    with open(args.out, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, args.plot)
    print("| kind | L0 | FVU | without outliers | CE recovered | silent on held-out text |\n|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['kind']} | {row['l0_mean']:.1f} | {row['fvu']:.4f} | {row['fvu_no_outliers']:.4f} | "
              f"{row['ce_recovered']:.4f} | {100 * row['dead_fraction']:.2f} % ({row['tokens']:,} tokens) |")


if __name__ == "__main__":
    main()
