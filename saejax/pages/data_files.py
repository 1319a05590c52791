"""The data files of a dashboard: scripts of a bounded size that hand one JSON value to the page, `saejax(kind, number, value)`.

A page opened from disk may load a script, but not read a file.
"""

import base64
from pathlib import Path

import numpy as np

from saejax.base.storage import write_bytes
from saejax.base.text import script_json

LARGEST = 256_000  # bytes of a file
_AROUND = 64       # of them around the value
_ARRAYS = {"f4": "Float32Array", "u2": "Uint16Array", "u4": "Uint32Array"}  # of numpy, and what the page calls them


def write_value(file: Path, kind: str, number: int, value) -> None:
    """A file of one value."""
    _write(file, kind, number, script_json(value))


def packed(values: np.ndarray) -> list[str]:
    """Numbers as the page's typed array and base64: floats as float32, whole numbers in two bytes where these are enough."""
    kind = "f4" if values.dtype.kind == "f" else "u2" if values.max(initial=0) < 2**16 else "u4"
    return [_ARRAYS[kind], base64.b64encode(np.ascontiguousarray(values, f"<{kind}").tobytes()).decode("ascii")]


class Divided:
    """Lists of JSON values, one behind the other, in as few files as can be. A value that is larger than a file may be is alone
    in one. firsts: the number of the value that each file begins with.
    """

    def __init__(self, kind: str, place):
        """place: number of a file -> where it is written."""
        self.firsts: list[int] = []
        self._kind, self._place = kind, place
        self._texts, self._size = [], _AROUND

    def fits(self, text: str) -> bool:
        """Whether the file that is being filled has room for one more."""
        return not self._texts or self._size + len(text) < LARGEST

    def add(self, number: int, text: str) -> None:
        """text: of `script_json`. Numbers rise."""
        if not self.fits(text):
            self.finish()
        if not self._texts:
            self.firsts.append(number)
        self._texts.append(text)
        self._size += len(text) + 1

    def finish(self) -> None:
        """Writes what has not been written; the next value begins a file."""
        if self._texts:
            number = len(self.firsts) - 1
            _write(self._place(number), self._kind, number, f"[{','.join(self._texts)}]")
        self._texts, self._size = [], _AROUND


def numbered(folder: Path, kind: str, number: int) -> Path:
    """Where a file of a kind lies that is not divided into folders."""
    return folder / kind / f"{number:04d}.js"


def _write(file: Path, kind: str, number: int, text: str) -> None:
    write_bytes(file, f"saejax({script_json(kind)},{number},{text});\n".encode("ascii"))
