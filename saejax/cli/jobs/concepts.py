"""`saejax concepts`: which concepts have a feature, against their frequency, in dictionaries of several sizes."""

import json
from dataclasses import dataclass
from pathlib import Path

from saejax.base.errors import ConfigError
from saejax.cli.options import DistributedOptions, Job, Json, count, number, numbers, path, places, refuse, value, words


@dataclass(frozen=True)
class Options(Json, DistributedOptions):
    paths: tuple[str, ...] = places("RUN", "runs, or sweeps, at one hookpoint and on one text")
    out: Path | None = value("where to write, and what was measured is kept", "DIR", path, required=True)
    list: tuple[str, ...] | None = value("concepts: animals, cities, elements, foods, london_boroughs, or files with one a line, "
                                         "with commas between (default: all that come with saejax, or --nouns alone)",
                                         "NAMES", words)
    nouns: Path | None = value("a file of candidates, one a line, of which --pick are taken, evenly spread in log frequency",
                               "FILE", path)
    pick: int = value("of the candidates", "N", count, default=400)
    between: tuple[float, ...] = value("the least and the highest frequency of these, in occurrences per token", "LOW,HIGH",
                                       numbers, default=(1e-6, 1e-3))
    tokens: int | None = value("of the training text, to count and search (default: as many as the store holds, or were trained "
                               "on)", "N", count)
    precision: float = value("the least precision of a concept's feature", "SHARE", number, default=0.5)
    recall: float = value("its least recall", "SHARE", number, default=0.5)
    level: float = value("the share of its maximum from which on a feature fires", "SHARE", number, default=0.25)
    per_concept: int = value("contexts of each concept that are looked at", "N", count, default=64)
    random: int = value("contexts drawn from all", "N", count, default=8192)


def run(options: Options) -> int:
    """Writes the study and prints a line for each size."""
    from saejax.base.storage import is_writer
    from saejax.cli.subjects import subjects
    from saejax.features.dedicated import Criterion
    from saejax.runs.concepts import Asked, concept_study
    if options.nouns is None:
        refuse("concepts", options, ("pick", "between"), "without --nouns")
    if len(options.between) != 2:
        raise ConfigError("saejax concepts: --between takes two numbers, as --between=1e-6,1e-3")
    if max(options.precision, options.recall, options.level) > 1:
        raise ConfigError("saejax concepts: --precision, --recall and --level are shares of at most 1")
    asked = Asked(options.list or (), options.nouns, options.pick, options.between, options.tokens,
                  Criterion(options.precision, options.recall, options.level), options.per_concept, options.random)
    study, page = concept_study(subjects(options), asked, options.out)
    if is_writer():
        _report(study, page, options.json)
    return 0


def _report(study, page: Path, as_json: bool) -> None:
    found = study.curves
    if as_json:
        print(json.dumps({"page": str(page), "absent": study.counts.absent, "unsampled": study.unsampled, "dead": study.dead,
                          "f50_alive": found.f50_alive, "sizes": [_size(size, one) for size, one in zip(
                              study.sizes, found.sizes, strict=True)]}))
        return
    for size, one in zip(study.sizes, found.sizes, strict=True):
        curve = one.refused.removeprefix(f"{one.label}: ") if one.curve is None else (
            f"half at {one.f50:.3g} per token, times alive {one.f50_alive:.3g}")
        present = f"{int(size.present_N.sum())} of {len(size.names)} concepts have a feature"
        print(f"{one.label:<24}  {one.alive:,} alive; {present}; {curve}")
    print(f"all sizes                 {found.refused or f'half at {found.f50_alive:.3g} of frequency times alive'}")
    print(f"page {page}")


def _size(size, one) -> dict:
    return {"label": one.label, "alive": one.alive, "concepts": len(size.names), "present": int(size.present_N.sum()),
            "f50": one.f50, "f50_alive": one.f50_alive, "refused": one.refused}


JOB = Job(
    "concepts", "understand", "which concepts have a feature, against frequency, by size of the dictionary", """
    Reads runs of several sizes at one hookpoint and on one text; counts concepts in that text, looks in each SAE for a feature
    that fires on a concept and on little else, and fits its probability over the concept's frequency; writes DIR/concepts.html,
    concepts.csv, concepts.json, figures (SVG, PNG), and what was measured of each SAE, which the same command does not measure
    again. Evaluate the runs first: dead features are those of `saejax eval`. docs/how-to/concepts.md describes it.
    """, "saejax concepts runs/f4096 runs/f16384 runs/f65536 --out=concepts", Options, run)
