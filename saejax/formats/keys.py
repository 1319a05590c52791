"""The config files of other libraries: small JSON, read key by key."""

import re
from pathlib import Path

from saejax.base.errors import FormatError
from saejax.base.keys import Keys
from saejax.base.storage import read_json

SIZE_CAP = 16 << 20
_NAMED = 10


def file_keys(path: Path) -> Keys:
    """The keys of a config file. Raises `FormatError`, as they do."""
    return Keys(read_small_json(path), path, FormatError)


def read_small_json(path: Path):
    """JSON of a file of at most 16 MiB; raises `FormatError`."""
    if path.is_file() and path.stat().st_size > SIZE_CAP:
        raise FormatError(f"{path}: {path.stat().st_size:,} bytes of JSON, at most {SIZE_CAP:,} are read")
    return read_json(path, FormatError)


def json_object(path: Path) -> dict:
    """The JSON object of a file, or {} where it is none: for recognising, which must not fail."""
    try:
        values = read_small_json(path) if path.is_file() else {}
    except FormatError:
        return {}
    return values if isinstance(values, dict) else {}


def one_of(found: list[str]) -> str:
    """At most ten of these, and how many more there are."""
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"one of {', '.join(found[:_NAMED])}{more}"


def counted(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer_2 before layer_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]
