"""Specificity of several dictionaries as files: `specificity.html`, `.json` and `.csv`, and the figures as PNG and SVG."""

import csv
import io
import json
from pathlib import Path

from saejax.base.storage import write_bytes, write_json
from saejax.base.text import visible
from saejax.features.index.examples import INTERVALS
from saejax.judging.scores import SCORES
from saejax.judging.specificity import Compared, Dictionary, Level
from saejax.pages.cards import Table
from saejax.pages.plots import Picture, Plot, Series, bar_plot, joined_plot
from saejax.pages.sheets import cell
from saejax.pages.templates import render

KIND, SCHEMA_VERSION = "saejax-specificity", 1
_SHORT, _APART = 120, 0.008  # _APART: of points of one level, so that bars do not cover each other
_LEVELS = [f"{(i - 1) / INTERVALS:.1f} to {i / INTERVALS:.1f}" for i in range(1, INTERVALS + 1)]
_SHARES = tuple(f"score {score}" for score in range(SCORES))
_ALL, _AXIS, _SAMPLED = "all", "activation / maximum", {"index": "examples of the index", "corpus": "drawn from the corpus",
                                                       "both": "both ways"}


def write(out: Path, found: Compared) -> Path:
    """Writes the comparison into a folder and returns its page, which holds no script and loads nothing. Raises `DiskError`."""
    told, plots = caveats(found), pictures(found)
    write_json(out / "specificity.json", {
        "kind": KIND, "schema_version": SCHEMA_VERSION, "judge": found.judge, "prompts": found.prompts, "least": found.least,
        "caveats": told, "dictionaries": [one.to_json() for one in found.dictionaries]})
    write_bytes(out / "specificity.csv", _csv(found).encode())
    for name, picture in plots.items():
        write_bytes(out / f"{name}.svg", picture.svg)
        write_bytes(out / f"{name}.png", picture.png)
    page = out / "specificity.html"
    write_bytes(page, render(
        "specificity.html", title="Specificity", judge=visible(judge_of(found), 300), prompts=found.prompts[:12], caveats=told,
        least=found.least, plots=[*plots.values(), *_bars(found)], summary=summary(found),
        levels=[(visible(one.label, _SHORT), levels(found, one)) for one in found.dictionaries]).encode())
    return page


def judge_of(found: Compared) -> str:
    """The judge in words: its kind, and what else its records say of it."""
    rest = {key: value for key, value in found.judge.items() if key != "kind"}
    said = ", ".join(f"{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in rest.items())
    return f"{found.judge.get('kind', 'judge')}: {said}"


def summary(found: Compared) -> Table:
    """A row a dictionary: over all levels."""
    columns = ("dictionary", "features in it", "reads", "density of the median judged", "activations", "answers", "unscored",
               "features", *_SHARES, "mean")
    return Table(columns, [(visible(one.label, _SHORT), "" if one.size is None else f"{one.size:,}",
                            visible(one.place or "", _SHORT), "" if one.density is None else f"{one.density:.2g}",
                            _SAMPLED[one.drawn], f"{one.overall.answers:,}", f"{one.unscored:,}", f"{one.overall.features:,}",
                            *_shares(one.overall, found.least), _mean(one.overall, found.least)) for one in found.dictionaries])


def levels(found: Compared, one: Dictionary) -> Table:
    """A row for each tenth of the maximum, and one for all."""
    return Table((_AXIS, "answers", "features", *_SHARES, "mean"), [
        (name, f"{level.answers:,}", f"{level.features:,}", *_shares(level, found.least), _mean(level, found.least))
        for name, level in zip([*_LEVELS, _ALL], [*one.levels, one.overall], strict=True)])


def caveats(found: Compared) -> list[str]:
    """What a reader has to know, one sentence or two each."""
    sampled = {one.drawn for one in found.dictionaries}
    places = {one.place for one in found.dictionaries if one.place}
    left = [f"{visible(one.label, _SHORT)}: {missing}" for one in found.dictionaries
            if (missing := sum(level.mean is None for level in one.levels))]
    explained = "The judge scores its own explanations: one that explains badly gives low scores to everything." if (
        found.dictionaries[0].explained == "own") else "The explanations were given to the judge."
    asked = sum(one.overall.answers + one.unscored for one in found.dictionaries)
    unscored = sum(one.unscored for one in found.dictionaries)
    return [
        "All of this is the opinion of one judge. Of a weak judge, or of one whose scores nobody has held against those of "
        "people on the same questions, it says nothing about the features, nor do differences between dictionaries.",
        explained,
        f"{unscored:,} of {asked:,} questions have no score ({unscored / asked:.1%}) and count nowhere. Where this is much, the "
        "rest is a selection.",
        f"No point stands for fewer than {found.least} answers or for a single feature. Levels without a point: "
        f"{'; '.join(left) if left else 'none'}.",
        "Means are over features, of each feature's mean, with the standard error of these; shares are of answers.",
        "A level is a tenth of each feature's own maximum. What has no threshold (neurons, directions) is active on a "
        "large part of all tokens, mostly at low levels.",
        *(["Activations were drawn from the corpus for some and are the index' examples of others: compare single levels, not "
           "all levels together."] if sampled != {"index"} and sampled != {"corpus"} else []),
        *(["The mean over all levels gives every level about the same weight: of the activations in a text most are low."]
          if "index" in sampled else []),
        *([f"They read at several places: {', '.join(visible(place, _SHORT) for place in sorted(places))}."]
          if len(places) > 1 else []),
    ]


def pictures(found: Compared) -> dict[str, Picture]:
    """{name of its files: figure}: scores over level, and the answers behind them. None where there is nothing to draw."""
    scores, answers = [], []
    for number, one in enumerate(found.dictionaries):
        drawn = "joined" if one.baseline is None else "joined dashed"
        shift = _APART * (number - (len(found.dictionaries) - 1) / 2)
        points = [((i + 0.5) / INTERVALS + shift, level) for i, level in enumerate(one.levels)]
        shown = [(x, level.mean, level.standard_error) for x, level in points if level.mean is not None]
        if shown:
            scores.append(Series(one.label, [x for x, _, _ in shown], [mean for _, mean, _ in shown], drawn,
                                 [(mean - error, mean + error) for _, mean, error in shown]))
            answers.append(Series(one.label, [x for x, level in points if level.answers],
                                  [level.answers for _, level in points if level.answers], drawn))
    if not scores:
        return {}
    return {"scores": joined_plot("Specificity by level of activation (mean and standard error)", scores, _AXIS, "score, 0 to 3",
                                  heights=(-0.1, SCORES - 0.9)),
            "answers": joined_plot("Answers behind each level", answers, _AXIS, "answers", log=True)}


def _bars(found: Compared) -> list[Plot]:
    """Of each dictionary the share of every score by level, and how many answers it is a share of."""
    out = []
    for one in found.dictionaries:
        if any(level.answers >= found.least for level in one.levels):
            shares = [[level.counts[score] / level.answers if level.answers >= found.least else 0.0 for level in one.levels]
                      for score in range(SCORES)]
            out.append(bar_plot(visible(one.label, _SHORT), _LEVELS, dict(zip(_SHARES, shares, strict=True)), _AXIS,
                                "share of answers", totals=[level.answers for level in one.levels]))
    return out


def _shares(level: Level, least: int) -> list[str]:
    few = level.answers < max(1, least)
    return ["" if few else f"{count / level.answers:.0%}" for count in level.counts]


def _mean(level: Level, least: int) -> str:
    if level.mean is None:
        return f"too few {'answers' if level.answers < least else 'features'}"
    return f"{level.mean:.2f} \u00b1 {level.standard_error:.2f}"


def _csv(found: Compared) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["dictionary", "above", "to", "answers", "features", *(f"score_{score}" for score in range(SCORES)), "mean",
                     "standard_error"])
    for one in found.dictionaries:
        ends = [((i - 1) / INTERVALS, i / INTERVALS) for i in range(1, INTERVALS + 1)]
        for (low, high), level in zip([*ends, (0.0, 1.0)], [*one.levels, one.overall], strict=True):
            writer.writerow([cell(one.label), low, high, level.answers, level.features, *level.counts,
                             *("" if value is None else repr(value) for value in (level.mean, level.standard_error))])
    return text.getvalue()
