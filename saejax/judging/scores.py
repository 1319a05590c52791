"""What answers say together: by feature, by interval of activation, over all features. Unscored answers count nowhere."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from scipy import stats

from saejax.base.errors import JudgeError
from saejax.base.storage import read_json
from saejax.features.index.examples import INTERVALS

SCORES = 4  # of the rubric: 0 .. 3
LEAST = 2   # answers behind a mean
RESULTS = "results.json"
KEYS = {"rubric": "mean", "detect": "balanced_accuracy", "fuzz": "balanced_accuracy", "simulate": "pearson"}  # of a task's values


def results(lines: Iterable[dict], explanations: Mapping[int, str] = MappingProxyType({})) -> dict:
    """{"features": {number: {...}}, "overall": {...}} of answer lines, plain JSON; what cannot be computed is null.

    rubric: answers with each score, their mean, and over all features the counts [10 intervals][4 scores]. detect and fuzz:
    balanced accuracy, the mean of the shares of active and of inactive samples told rightly. simulate: Pearson and Spearman
    correlation of predicted and true activation over all tokens of a feature's samples. Over features: mean and its standard
    error. answers: how many were scored; a figure of fewer than 2 is null. unscored: questions whose answer never came or could
    not be read. explanations: those that were given, where the judge made none. Where a feature has drawn activations, the
    rubric's other answers about it are left out: they are sampled otherwise.
    """
    lines = of_one_sampling(list(lines))
    by_feature: dict[int, dict[str, list[dict]]] = {}
    for line in lines:
        by_feature.setdefault(line["feature"], {}).setdefault(line["task"], []).append(line)
    features = {feature: _of_feature(tasks, explanations.get(feature)) for feature, tasks in sorted(by_feature.items())}
    overall = _overall(features, lines)
    return {"features": {str(feature): _but_few(values) for feature, values in features.items()}, "overall": overall}


def scores_in(file: Path) -> dict[int, str]:
    """{feature: its rubric mean and the answers behind it, in words} of the `results.json` that is or lies beside a file; empty
    without one. Raises `JudgeError` for another version's.
    """
    file = file.parent / RESULTS
    if not file.is_file():
        return {}
    try:
        found = {int(number): values["rubric"] for number, values in read_json(file, JudgeError)["features"].items()
                 if "rubric" in values}
        return {feature: f"rubric {values['mean']:.2f} of 3, {values['answers']} answers" for feature, values in found.items()
                if values["mean"] is not None}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise JudgeError(f"{file}: results of another version; `saejax judge` with the same options writes them anew") from error


def _but_few(values: dict) -> dict:
    """The same without figures of too few answers."""
    few = {task: values[task] | {KEYS[task]: None} for task in KEYS if task in values and values[task]["answers"] < LEAST}
    return values | few


def of_one_sampling(lines: list[dict]) -> list[dict]:
    """Without the rubric's other answers about features that have drawn activations."""
    drawn = {line["feature"] for line in lines if line.get("drawn")}
    return [line for line in lines if line["task"] != "rubric" or line["feature"] not in drawn or line.get("drawn")]


def _of_feature(tasks: dict[str, list[dict]], given: str | None) -> dict:
    scored = {task: [line for line in lines if line["score"] is not None] for task, lines in tasks.items()}
    out: dict = {"unscored": sum(len(lines) - len(scored[task]) for task, lines in tasks.items())}
    if scored.get("explain"):
        out["explanation"] = scored["explain"][-1]["score"]
    elif given is not None:
        out["explanation"] = given
    if scored.get("rubric"):
        counts = np.bincount([line["score"] for line in scored["rubric"]], minlength=SCORES)
        out["rubric"] = {"counts": counts.tolist(), "mean": float(counts @ np.arange(SCORES) / counts.sum()),
                         "answers": int(counts.sum())}
    for task in ("detect", "fuzz"):
        if scored.get(task):
            out[task] = _told_apart(scored[task])
    if scored.get("simulate"):
        out["simulate"] = _correlated(scored["simulate"])
    return out


def _told_apart(lines: list[dict]) -> dict:
    truth, said = (np.array([line[key] for line in lines]) for key in ("truth", "score"))
    shares = [float((said[truth == t] == t).mean()) if (truth == t).any() else None for t in (1, 0)]
    return {"active_found": shares[0], "silent_found": shares[1], "answers": len(lines),
            "balanced_accuracy": None if None in shares else sum(shares) / 2}


def _correlated(lines: list[dict]) -> dict:
    truth = np.concatenate([line["truth"] for line in lines])
    said = np.concatenate([np.asarray(line["score"], np.float64) for line in lines])
    if np.ptp(truth) == 0 or np.ptp(said) == 0:  # of a constant there is no correlation
        return {"pearson": None, "spearman": None, "tokens": len(truth), "answers": len(lines)}
    return {"pearson": float(np.corrcoef(truth, said)[0, 1]), "spearman": float(stats.spearmanr(truth, said).statistic),
            "tokens": len(truth), "answers": len(lines)}


def _overall(features: dict[int, dict], lines: list[dict]) -> dict:
    counts = np.zeros((INTERVALS, SCORES), int)
    found = np.zeros((INTERVALS, 2), int)  # active samples of `detect`: told rightly, all
    for line in lines:
        if line["score"] is not None and line["interval"] > 0:
            if line["task"] == "rubric":
                counts[line["interval"] - 1, line["score"]] += 1
            elif line["task"] == "detect":
                found[line["interval"] - 1] += (line["score"], 1)
    out = {"features": len(features), "rubric_counts": counts.tolist(), "detect_found": found.tolist(),
           "unscored": {task: sum(line["score"] is None for line in lines if line["task"] == task)
                        for task in sorted({line["task"] for line in lines})},
           "answers": len(lines)}
    for task, key in KEYS.items():
        found = [v[task] for v in features.values() if task in v and v[task][key] is not None]
        out[task] = _over([(values[key], values["answers"]) for values in found])
    return out


def _over(found: list[tuple[float, int]]) -> dict | None:
    """Of (value of a feature, answers behind it)."""
    values, answers = [value for value, _ in found], sum(n for _, n in found)
    if not values:
        return None
    return {"mean": float(np.mean(values)) if answers >= LEAST else None, "features": len(values), "answers": answers,
            "standard_error": float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None}
