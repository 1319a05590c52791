"""`crcs.bin`: the crc32c of every chunk of a finished store, uint32, at places that follow from the spec.

Shard s owns the bytes from `s * spec.crc_bytes` on: its arrays in the order of the spec, each with a word for every chunk of a
full shard. Words of chunks that a shorter last shard lacks are 0.
"""

import threading
from pathlib import Path

import numpy as np

from saejax.base.errors import StoreCorruptError
from saejax.base.verified import VerifiedFile
from saejax.data import manifest as mf
from saejax.data.manifest import StoreSpec
from saejax.data.shards import AGAIN, CRC

FILE = "crcs.bin"


class Checksums:
    """Reads of `crcs.bin`, of several threads, checked against the manifest. The file is opened by the first one."""

    def __init__(self, root: Path, values: dict, spec: StoreSpec):
        self._path, self._spec, self._words = root / FILE, spec, spec.crc_words()
        self._blocks, self._block = values["crcs"]["blocks"], mf.crc_block(spec, values["n_contexts"])
        self._lock, self._file = threading.Lock(), None

    def of(self, name: str, shard: int, chunks: int) -> np.ndarray:
        """uint32 checksums of the chunks of an array in a shard. Raises `StoreCorruptError`."""
        first = self._words[name].start
        return np.frombuffer(self._read(shard * self._spec.crc_bytes + CRC * first, CRC * chunks), "<u4")

    def row(self, shard: int) -> bytes:
        """All of a shard, as its record holds them."""
        return self._read(shard * self._spec.crc_bytes, self._spec.crc_bytes)

    def _read(self, offset: int, size: int) -> bytes:
        with self._lock:
            try:
                if self._file is None:
                    self._file = VerifiedFile(self._path, self._blocks, StoreCorruptError, block=self._block)
                self._file.seek(offset)
                data = self._file.read(size)
            except OSError as e:
                raise StoreCorruptError(f"{self._path}: {e.strerror or 'missing'}; {AGAIN}") from e
        if len(data) != size:
            raise StoreCorruptError(f"{self._path}: ends before its place {offset + size}; {AGAIN}")
        return data
