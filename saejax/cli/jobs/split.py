"""`saejax split`: which features of larger dictionaries come from which of smaller ones."""

import json
from dataclasses import dataclass
from pathlib import Path

from saejax.cli.options import Job, Json, features, number, path, places, refuse, value


@dataclass(frozen=True)
class Options(Json):
    paths: tuple[str, ...] = places("SAE", "SAEs of growing size at one place, or a sweep of them")
    least: float = value("cosine from which on a feature is the child of the nearest one", "BOUND", number, default=0.7)
    features: tuple[int, ...] | None = value("of the smallest SAE, whose trees the page shows first", "NUMBERS", features)
    out: Path | None = value("write splitting.parquet, a row a feature, and splitting.html, a page with trees", "DIR", path)


def run(options: Options) -> int:
    """Prints how dictionaries split each other's features; with --out the links and the page."""
    from saejax.base.storage import is_writer
    from saejax.features.compare.splitting_file import FILE, write
    from saejax.pages.splitting import PAGE, levels_table, steps_table, write_splitting
    from saejax.runs.comparison import split_subjects
    if options.out is None:
        refuse("split", options, ("features",), "without --out=DIR, where the page is written")
    found = split_subjects(*options.paths, least=options.least)
    if not is_writer():
        return 0
    if options.out is not None:
        write(found, options.out / FILE)
        page = write_splitting(found, options.out / PAGE, options.features or ())
    if options.json:
        levels = [{"sae": level.name, "features": level.features,
                   "left_out": int((~level.fired_F).sum()) if level.known else None} for level in found.levels]
        print(json.dumps({"least": found.least, "levels": levels,
                          "steps": [found.shares(level) for level in range(len(found.levels) - 1)]}))
        return 0
    print(f"{levels_table(found)}\n\n{steps_table(found)}")
    if options.out is not None:
        print(f"\npage     {page}\nnext     saejax dashboard SAE --splitting={options.out / FILE}")
    return 0


JOB = Job(
    "split", "understand", "which features of larger dictionaries come from one of a smaller", """
    Reads SAEs of growing size at one place, as runs, files or a sweep, and their indexes where they have one. Every feature goes
    to the feature of the next smaller SAE whose decoder row is nearest: its parent, where the cosine is at least BOUND. Features
    that fired on none of the tokens of their index are left out; without an index all count.

    Prints how many children features have, and which share of each larger dictionary is new, without a parent; writes nothing but
    what --out names.
    """, "saejax split runs/small runs/demo --out=splitting", Options, run)
