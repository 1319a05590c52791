"""L0 against FVU of every SAE of a finished sweep: a CSV and a plot.

    python benchmarks/frontier.py runs/frontier [--out docs/frontier]

Held-out figures of each SAE's newest evaluation; writes OUT.csv and OUT.png and prints a Markdown table.
"""

import argparse
import csv
import json
from pathlib import Path

from saejax.records import RunPaths, read_config

FIGURES = ("l0_mean", "fvu", "fvu_no_outliers", "ce_recovered", "dead_fraction")


def rows_of(sweep: Path) -> list[dict]:
    """One row per evaluated SAE below a sweep's directory."""
    out = []
    for evaluation in sorted(sweep.glob("*/eval.json")):
        sae = read_config(RunPaths(evaluation.parent).config).sae
        kind = "matryoshka" if sae.groups else f"jumprelu, {sae.objective}" if sae.kind == "jumprelu" else sae.kind
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/frontier"))
    args = parser.parse_args()
    rows = rows_of(args.sweep)
    if not rows:
        parser.error(f"{args.sweep}: no evaluated SAE below; run `saejax eval {args.sweep}` first")
    with open(args.out.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, args.out.with_suffix(".png"))
    print("| kind | L0 | FVU | without outliers | CE recovered | dead on held-out text |\n|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['kind']} | {row['l0_mean']:.1f} | {row['fvu']:.4f} | {row['fvu_no_outliers']:.4f} | "
              f"{row['ce_recovered']:.4f} | {100 * row['dead_fraction']:.2f} % |")


if __name__ == "__main__":
    main()
