"""`report.html` of a record: figures, explanations and scores of every feature. One file, no script, nothing loaded."""

from pathlib import Path

from saejax.base.errors import JudgeError
from saejax.base.storage import read_json, write_bytes, write_json
from saejax.base.text import visible
from saejax.features.index.examples import INTERVALS
from saejax.pages.plots import Plot, bar_plot
from saejax.pages.templates import render

RESULTS, REPORT = "results.json", "report.html"
MEASURES = (("rubric", "rubric, 0 to 3"), ("detect", "detection, balanced accuracy"), ("fuzz", "fuzzing, balanced accuracy"),
            ("simulate", "simulation, Pearson"))
_INTERVALS = [f"{(i - 1) / INTERVALS:.1f} to {i / INTERVALS:.1f}" for i in range(1, INTERVALS + 1)]


def write(folder: Path, subject: str, judge: str, results: dict) -> Path:
    """Writes `results.json` and `report.html`; returns the latter's path. Beside it stand the results of other subjects
    (features, baselines) that the same judge has judged: folders of the same name beside the folder above.
    """
    write_json(folder / RESULTS, {"kind": "saejax-judging-results", "subject": subject, **results})
    features = [(number, visible(values.get("explanation") or "", 600), *(_shown(values, task) for task, _ in MEASURES),
                 values["unscored"]) for number, values in results["features"].items()]
    html = render("judged.html", subject=subject, judge=visible(judge, 200), overall=results["overall"], measures=MEASURES,
                  table=compared(folder, subject, results["overall"]), features=features, plots=plots(results["overall"]),
                  unscored=sum(results["overall"]["unscored"].values()))
    write_bytes(folder / REPORT, html.encode())
    return folder / REPORT


def _shown(values: dict, task: str) -> str:
    key = {"rubric": "mean", "simulate": "pearson"}.get(task, "balanced_accuracy")
    found = values.get(task, {}).get(key)
    return "" if found is None else f"{found:.2f}"


def compared(folder: Path, subject: str, overall: dict) -> list[tuple[str, ...]]:
    """(subject, value of each of `MEASURES`) of this subject and of the others that this judge has judged."""
    rows = [(subject, *(_mean(overall, task) for task, _ in MEASURES))]
    for file in sorted(folder.parent.parent.glob(f"*/{folder.name}/{RESULTS}")):
        if file.parent != folder:
            try:
                other = read_json(file, JudgeError)["overall"]
                rows.append((file.parent.parent.name, *(_mean(other, task) for task, _ in MEASURES)))
            except (JudgeError, KeyError, TypeError, ValueError):
                continue  # of another version, or not ours
    return rows


def _mean(overall: dict, task: str) -> str:
    found = overall[task]
    if found is None:
        return ""
    error = "" if found["standard_error"] is None else f" \u00b1 {found['standard_error']:.2f}"
    return f"{found['mean']:.2f}{error} ({found['features']})"


def plots(overall: dict) -> list[Plot]:
    """Shares against the level of activation: of each score, and of samples in which the activity was detected."""
    out = []
    counts = overall["rubric_counts"]
    if any(map(sum, counts)):
        shares = [[row[score] / sum(row) if sum(row) else 0.0 for row in counts] for score in range(len(counts[0]))]
        out.append(bar_plot("Share of each specificity score", _INTERVALS, {f"score {i}": s for i, s in enumerate(shares)},
                            "activation / maximum", "share of answers", totals=[sum(row) for row in counts]))
    found = overall["detect_found"]
    if any(total for _, total in found):
        out.append(bar_plot("Samples whose activity was detected", _INTERVALS,
                            {"detected": [right / total if total else 0.0 for right, total in found]},
                            "activation / maximum", "share of samples", totals=[total for _, total in found]))
    return out
