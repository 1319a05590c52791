"""`saejax compare`: two dictionaries at one place."""

import json
from dataclasses import dataclass
from pathlib import Path

from saejax.cli.options import Job, Json, count, number, path, places, value


@dataclass(frozen=True)
class Options(Json):
    paths: tuple[str, ...] = places("A B", "two SAEs", least=2, most=2)
    rows: int = value("rows of A's store on which the firing of matched features is compared", "N", count, default=65_536)
    least: float = value("cosine from which two features are a match", "COSINE", number, default=0.7)
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
    percent = {name: f"{100 * share:.1f} %" for name, share in said.items()}
    firing = f", correlation of firing {said['firing']:.3f}" if "firing" in said else ""
    print(f"shared   {len(found.shared):,}: {percent['shared_A']} of A, {percent['shared_B']} of B; mean cosine "
          f"{said['cosine']:.3f}{firing}")
    print(f"alone    {percent['only_A']} of A, {percent['only_B']} of B have no match of cosine {options.least:g}")
    print(f"split    {len(found.split):,} features of A are the match of two or more of B")
    return 0


JOB = Job(
    "compare", "understand", "which features two dictionaries share, which one lacks, which are split", """
    Reads two SAEs that write to one place, as runs or files; prints which share of their features is each other's nearest by
    decoder row, has no match, or is split into several, and how matched features fire together on A's store; writes nothing but
    what --out names.
    """, "saejax compare runs/demo runs/k64", Options, run)
