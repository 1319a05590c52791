"""Which windows go into which question: what explains a feature never scores it."""

from collections.abc import Sequence

import numpy as np

from saejax.judging import prompts
from saejax.judging.material import Material, Window
from saejax.judging.questions import Question

SILENT_SHOWN, SILENT_DETECTED, SILENT_SIMULATED = 5, 20, 5


def explain(material: Material) -> Question:
    """One question: 10 top contexts, 2 of each of the 10 intervals, 5 silent windows."""
    return prompts.explain(material.feature, material.explain, material.silent[:SILENT_SHOWN])


def scored(task: str, material: Material, explanation: str) -> list[Question]:
    """The questions of a task about one feature, given an explanation of it.

    rubric: every activation drawn, or without a draw every held-out example of the index (up to 3 an interval). detect: 2
    held-out windows of each interval, and 20 silent ones. fuzz: the same active windows rightly marked, and 2 of each interval
    with as many other tokens marked. simulate: 1 held-out window of each interval, and 5 silent ones.
    """
    held, silent = material.held, material.silent[SILENT_SHOWN:]
    if task == "rubric":
        windows = material.drawn or [w for windows in held.values() for w in windows]
        found = [prompts.rubric(w, explanation, drawn=bool(material.drawn)) for w in windows]
    elif task == "detect":
        windows = [w for windows in held.values() for w in windows[:2]] + silent[:SILENT_DETECTED]
        found = [prompts.detect(w, explanation) for w in windows]
    elif task == "fuzz":
        right = [w for windows in held.values() for w in windows[:2]]
        wrong = [w for windows in held.values() for w in windows[-2:]]
        found = [prompts.fuzz(w, explanation, _active(w), 1) for w in right]
        found += [prompts.fuzz(w, explanation, chosen, 0) for w in wrong if (chosen := _others(w)) is not None]
    else:
        windows = [w for windows in held.values() for w in windows[:1]]
        windows += silent[SILENT_DETECTED:SILENT_DETECTED + SILENT_SIMULATED]
        found = [prompts.simulate(w, explanation) for w in windows]
    return list({question.id: question for question in found}.values())


def _active(window: Window) -> Sequence[bool]:
    return [act > 0 for act in window.acts]


def _others(window: Window) -> list[bool] | None:
    """As many tokens as are active, among those that are not; None where there are too few."""
    active = np.array(_active(window))
    silent = np.flatnonzero(~active)
    if len(silent) < active.sum():
        return None
    rng = np.random.default_rng([window.feature, window.context, window.position])
    chosen = rng.choice(silent, active.sum(), replace=False)
    return np.isin(np.arange(len(active)), chosen).tolist()
