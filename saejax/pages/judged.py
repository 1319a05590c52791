"""`report.html` of a record: figures, explanations and scores of every feature, and `answers/N.html`: every answer about feature
N. No script, nothing loaded.
"""

from collections.abc import Iterable
from pathlib import Path

from saejax.base.errors import JudgeError
from saejax.base.storage import read_json, write_bytes, write_json
from saejax.base.text import visible
from saejax.features.index.examples import INTERVALS
from saejax.judging.scores import KEYS, LEAST, RESULTS
from saejax.pages.plots import Plot, bar_plot
from saejax.pages.templates import render

REPORT, ANSWERS = "report.html", "answers"
_LONGEST = 20_000
MEASURES = (("rubric", "rubric, 0 to 3"), ("detect", "detection, balanced accuracy"), ("fuzz", "fuzzing, balanced accuracy"),
            ("simulate", "simulation, Pearson"))
_INTERVALS = [f"{(i - 1) / INTERVALS:.1f} to {i / INTERVALS:.1f}" for i in range(1, INTERVALS + 1)]


def write(folder: Path, subject: str, judge: str, results: dict, lines: Iterable[dict] = ()) -> Path:
    """Writes `results.json`, `report.html` and a page for every feature that `lines` are about; returns the report's path. Beside
    it stand the results of other subjects (features, baselines) that the same judge has judged: folders of the same name beside
    the folder above.
    """
    write_json(folder / RESULTS, {"kind": "saejax-judging-results", "subject": subject, **results})
    pages = _write_answers(folder, subject, results, lines)
    features = [(number, pages.get(number, ""), visible(values.get("explanation") or "", 600),
                 *(_shown(values, task) for task, _ in MEASURES), values["unscored"])
                for number, values in results["features"].items()]
    html = render("judged.html", subject=subject, judge=visible(judge, 200), overall=results["overall"], measures=MEASURES,
                  table=compared(folder, subject, results["overall"]), features=features, plots=plots(results["overall"]),
                  unscored=sum(results["overall"]["unscored"].values()))
    write_bytes(folder / REPORT, html.encode())
    return folder / REPORT


def _write_answers(folder: Path, subject: str, results: dict, lines: Iterable[dict]) -> dict[str, str]:
    """{number of a feature: address of the page with the answers about it}."""
    by_feature: dict[str, list[dict]] = {}
    for line in lines:
        by_feature.setdefault(str(int(line["feature"])), []).append(line)
    for number, found in by_feature.items():
        rows = [{"task": visible(str(line["task"])), "interval": _INTERVALS[line["interval"] - 1] if line.get("interval") else "",
                 "truth": "" if isinstance(line.get("truth"), (list, tuple, type(None))) else line["truth"],
                 "score": "unscored" if line["score"] is None else visible(str(line["score"]), 600),
                 "trouble": visible(line.get("trouble") or "", 600), "prompt": visible(line.get("prompt") or "", _LONGEST),
                 "raw": [visible(text, _LONGEST) for text in line["raw"]]} for line in found]
        said = results["features"].get(number, {}).get("explanation") or ""
        html = render("answers.html", title=f"{subject}, {number}", explanation=visible(said, 600), rows=rows)
        write_bytes(folder / ANSWERS / f"{number}.html", html.encode())
    return {number: f"{ANSWERS}/{number}.html" for number in by_feature}


def _shown(values: dict, task: str) -> str:
    if task not in values:
        return ""
    found, answers = values[task][KEYS[task]], values[task]["answers"]
    if answers < LEAST:
        return f"too few answers ({answers})"
    return "" if found is None else f"{found:.2f} ({answers} answers)"


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
    if found["mean"] is None:
        return f"too few answers ({found['answers']})"
    error = "" if found["standard_error"] is None else f" \u00b1 {found['standard_error']:.2f}"
    return f"{found['mean']:.2f}{error} ({found['answers']:,} answers, {found['features']} feature{'s'[:found['features'] != 1]})"


def plots(overall: dict) -> list[Plot]:
    """Shares against the level of activation: of each score, and of samples in which the activity was detected. No bar for too
    few answers.
    """
    out = []
    counts = overall["rubric_counts"]
    if any(map(sum, counts)):
        shares = [[row[score] / sum(row) if sum(row) >= LEAST else 0.0 for row in counts] for score in range(len(counts[0]))]
        out.append(bar_plot("Share of each specificity score", _INTERVALS, {f"score {i}": s for i, s in enumerate(shares)},
                            "activation / maximum", "share of answers", totals=[sum(row) for row in counts]))
    found = overall["detect_found"]
    if any(total for _, total in found):
        out.append(bar_plot("Samples whose activity was detected", _INTERVALS,
                            {"detected": [right / total if total >= LEAST else 0.0 for right, total in found]},
                            "activation / maximum", "share of samples", totals=[total for _, total in found]))
    return out
