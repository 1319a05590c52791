"""`saejax compare`: two dictionaries at one place."""

import json
from dataclasses import dataclass
from pathlib import Path

from saejax.cli.options import Job, Json, count, number, path, places, value


@dataclass(frozen=True)
class Options(Json):
    paths: tuple[str, ...] = places("A B", "two SAEs", least=2, most=2)
    rows: int | None = value("rows of A's store, or B's, on which activations are compared (65,536)", "N", count)
    least: float = value("cosine, or correlation of activations, from which on two are a match", "BOUND", number, default=0.7)
    out: Path | None = value("write the matches: a .parquet file, a row a feature of A and of B", "FILE", path)


def run(options: Options) -> int:
    """Prints what two dictionaries share; with --out the matches of every feature."""
    from saejax.base.storage import is_writer
    from saejax.features.compare.dictionaries import write
    from saejax.runs.comparison import compare_subjects
    found = compare_subjects(*options.paths, rows=options.rows, least=options.least)
    if not is_writer():
        return 0
    if options.out:
        write(found, options.out)
    said = found.shares()
    if options.json:
        print(json.dumps({"features_A": len(found.match_A), "features_B": len(found.match_B), **said}))
        return 0
    for name, source, matches in zip("AB", options.paths, (found.match_A, found.match_B), strict=True):
        print(f"{name}        {source}: {len(matches):,} features")
    print("by decoder row")
    print(f"  shared {len(found.shared):,}: {_percent(said['shared_A'])} of A, {_percent(said['shared_B'])} of B; mean cosine "
          f"{_number(said['cosine'])}")
    print(f"  alone  {_percent(said['only_A'])} of A, {_percent(said['only_B'])} of B have no match of cosine {options.least:g}")
    print(f"  split  {len(found.split):,} features of A are the match of two or more of B")
    _firing(found, said.get("by_firing"))
    return 0


def _firing(found, said: dict | None) -> None:
    if said is None:
        print("by firing: not compared; it needs a store of either, and that both read one place")
        return
    print(f"by activations on {said['rows']:,} rows")
    print(f"  shared {len(found.shared_by_firing):,}: {_percent(said['shared_A'])} of A, {_percent(said['shared_B'])} of B; mean "
          f"correlation {_number(said['correlation'])}; {_percent(said['silent_A'])} of A have no match, most fire too seldom")
    print("both, of A")
    print(f"  agree  {_percent(said['same_A'])} are shared with one feature either way, {_percent(said['other_A'])} with two")
    print(f"  differ {_percent(said['direction_alone_A'])} are shared by decoder row alone, {_percent(said['firing_alone_A'])} "
          f"by activations alone; mean correlation of those shared by decoder row {_number(said['paired'])}")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


JOB = Job(
    "compare", "understand", "which features two dictionaries share, which one lacks, which are split", """
    Reads two SAEs that write to one place, as runs or files; prints which share of their features is each other's nearest by
    decoder row, has no match, or is split into several; which share is each other's best match by activations on a store of
    either; and where the two agree; writes nothing but what --out names.
    """, "saejax compare runs/demo runs/k64", Options, run)
