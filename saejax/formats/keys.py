"""The keys of a foreign config file: typed, and none of them overlooked."""

import math
from collections.abc import Iterable
from pathlib import Path

from saejax.base.errors import FormatError
from saejax.base.storage import read_json

SIZE_CAP = 16 << 20
UNKNOWN = "unknown"  # a model or hookpoint that the source does not name
_MISSING = object()


class Keys:
    """A JSON object of a file. Every read notes the key; `finish` refuses the keys that nobody read."""

    def __init__(self, path: Path, values=None, prefix: str = ""):
        self.path, self.prefix = Path(path), prefix
        if values is None:
            values = read_small_json(self.path)
        if not isinstance(values, dict):
            raise FormatError(f"{path}: {prefix or 'the file'} is no JSON object; download or write it again")
        self.values, self._read = values, set()

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def get(self, key: str, kind: type, default=_MISSING):
        """The value of a key; None only where `default` is None. Raises `FormatError` for a missing key or another type."""
        self._read.add(key)
        value = self.values.get(key, default)
        if value is _MISSING:
            raise FormatError(f"{self.path}: missing or malformed key: {self.prefix}{key} is not there")
        if value is None and default is None:
            return None
        if kind is float and type(value) is int and abs(value) < 1 << 53:
            value = float(value)
        if type(value) is not kind or kind is float and not math.isfinite(value):
            raise FormatError(f"{self.path}: missing or malformed key: {self.prefix}{key} is {value!r:.80}, expected "
                              f"{kind.__name__}")
        return value

    def size(self, key: str, default=_MISSING) -> int:
        """A whole number of at least 1 and below 2^31."""
        value = self.get(key, int, default)
        if value is not None and not 0 < value < 1 << 31:
            raise FormatError(f"{self.path}: {self.prefix}{key} = {value}; expected 1 or more")
        return value

    def one_of(self, key: str, allowed: Iterable, default=_MISSING):
        """A value that must be among those that are understood."""
        self._read.add(key)
        value = self.values.get(key, default)
        if not any(type(value) is type(a) and value == a for a in allowed):
            known = ", ".join(map(repr, allowed))
            raise FormatError(f"{self.path}: {self.prefix}{key} {None if value is _MISSING else value!r:.80} is not one of "
                              f"{known}")
        return value

    def section(self, key: str, default=_MISSING) -> "Keys":
        return Keys(self.path, self.get(key, dict, default), f"{self.prefix}{key}.")

    def finish(self, known: Iterable[str] = ()) -> None:
        """Raises `FormatError` for keys that were not read and are not among `known` (those that change nothing here)."""
        unknown = [key for key in self.values if key not in self._read and key not in set(known)]
        if unknown:
            raise FormatError(f"{self.path}: unknown key {', '.join(f'{self.prefix}{k}'[:60] for k in unknown[:8])}; written "
                              "by a newer version of its library, or not this format: what it changes is not known, so it is "
                              "not read")


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
