"""A splitting on disk: one .parquet file, a row a feature of every dictionary, the smallest first."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saejax.base.errors import FeatureIndexError
from saejax.base.storage import disk_errors, replacing
from saejax.features.compare.splitting import Level, Splitting

FILE, KIND, SCHEMA_VERSION = "splitting.parquet", "saejax-splitting", 1
_ABOUT = b"saejax"
SCHEMA = pa.schema([("level", pa.int16()), ("feature", pa.int32()), ("fired", pa.bool_()), ("parent", pa.int32()),
                    ("cosine", pa.float32()), ("fires_on", pa.list_(pa.string()))])
_GROUP = 65_536


def write(found: Splitting, file: Path) -> None:
    """Writes it. Indexes are named relative to the folder of the file. Raises `DiskError`."""
    about = {"kind": KIND, "schema_version": SCHEMA_VERSION, "least": found.least, "levels": [
        {"name": level.name, "features": level.features, "fingerprint": level.fingerprint, "known": level.known,
         "index": None if level.index is None else _relative(level.index, file)} for level in found.levels]}
    schema = SCHEMA.with_metadata({_ABOUT: json.dumps(about)})
    with disk_errors(file):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as out, pq.ParquetWriter(out, schema, compression="zstd") as writer:
        for number, level in enumerate(found.levels):
            writer.write_table(pa.table([np.full(level.features, number, np.int16), np.arange(level.features, dtype=np.int32),
                                         level.fired_F, level.parent_F, level.cosine_F, level.fires_on], schema=schema), _GROUP)


def read(file: Path) -> Splitting:
    """What `write` wrote. Raises `FeatureIndexError` of one line for another file, a newer schema, and one that is damaged."""
    try:
        with pq.ParquetFile(file) as parquet:
            about = json.loads((parquet.schema_arrow.metadata or {}).get(_ABOUT, b"{}"))
            if not isinstance(about, Mapping) or about.get("kind") != KIND:
                raise FeatureIndexError(f"{file}: is not the {FILE} that a splitting writes")
            if about.get("schema_version") != SCHEMA_VERSION:
                raise FeatureIndexError(f"{file}: schema version {about.get('schema_version')!r}, this saejax reads "
                                        f"{SCHEMA_VERSION}; make it again")
            table, levels, first = parquet.read().combine_chunks(), [], 0
            for number, level in enumerate(about["levels"]):
                levels.append(_level(table.slice(first, level["features"]), number, level, Path(file).parent))
                first += level["features"]
                _check(levels, table["level"].to_numpy()[first - level["features"]:first])
            if first != len(table) or not levels:
                raise ValueError(f"{len(table)} rows of {first} features")
            return Splitting(tuple(levels), float(about["least"]))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise FeatureIndexError(f"{file}: no readable splitting ({' '.join(str(error).split())[:150]}); make it again") from error


def _relative(index: Path, file: Path) -> str:
    return Path(os.path.relpath(index.absolute(), Path(file).absolute().parent)).as_posix()


def _level(part: pa.Table, number: int, about: dict, folder: Path) -> Level:
    return Level(str(about["name"]), str(about["fingerprint"]), bool(about["known"]), part["fired"].to_numpy(),
                 part["parent"].to_numpy(), part["cosine"].to_numpy(), part["fires_on"],
                 None if about["index"] is None else folder / str(about["index"]))


def _check(levels: list[Level], number_F: np.ndarray) -> None:
    """Raises `ValueError` where rows are missing, or a parent is none of the level before."""
    last, parents = levels[-1], levels[-2].features if len(levels) > 1 else 0
    if (number_F != len(levels) - 1).any() or len(number_F) != last.features or not last.fired_F.any():
        raise ValueError(f"rows of level {len(levels) - 1} are missing")
    if ((last.parent_F < -1) | (last.parent_F >= parents)).any():
        raise ValueError(f"a parent in level {len(levels) - 1} does not exist")
