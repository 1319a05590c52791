"""Files whose every read is checked against digests that were taken when they were written."""

import hashlib
import io
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from saejax.base.errors import SaejaxError

BLOCK = 1 << 20  # bytes of one digest


def block_of(size: int, most: int) -> int:
    """Bytes of a block, a power of two from `BLOCK` on, such that a file of `size` bytes has at most `most` blocks."""
    block = BLOCK
    while -(-size // block) > most:
        block *= 2
    return block


def digests(path: str | Path, advance: Callable[[int], object] = lambda _: None, *, block: int = BLOCK) -> dict:
    """{bytes, sha256, blocks: CRC-32 of every block, the last one shorter} of a file, which is read once. advance: is told how
    many bytes have been read. block: bytes of one.
    """
    blocks = []
    with open(path, "rb") as file:
        size, found = os.fstat(file.fileno()).st_size, hashlib.sha256()
        for data in iter(lambda: file.read(block), b""):
            found.update(data)
            blocks.append(zlib.crc32(data))
            advance(len(data))
    return {"bytes": size, "sha256": found.hexdigest(), "blocks": blocks}


def continued(blocks: Sequence[int], size: int, data: bytes) -> list[int]:
    """The digests of a file of `size` bytes, which has these `blocks`, after `data` is appended to it."""
    out, rest = list(blocks), memoryview(data)
    if size % BLOCK and len(rest):
        room = BLOCK - size % BLOCK
        out[-1], rest = zlib.crc32(rest[:room], out[-1]), rest[room:]
    return out + [zlib.crc32(rest[a:a + BLOCK]) for a in range(0, len(rest), BLOCK)]


class VerifiedFile(io.RawIOBase):
    """A file to read from; a block is checked when a read touches it first. Raises `error` naming file and block.

    block: bytes of one, as `digests` was told.
    """

    def __init__(self, path: str | Path, digests: Sequence[int], error: type[SaejaxError], *, block: int = BLOCK):
        super().__init__()
        self._block = block
        self._path, self._digests, self._error = Path(path), digests, error
        self._file, self._sound = open(path, "rb"), set()
        self._bytes = self._path.stat().st_size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def size(self) -> int:
        """Bytes of the file, as pyarrow asks for them."""
        return self._bytes

    def readinto(self, buffer) -> int:
        start = self._file.tell()
        self._check(start, min(start + len(buffer), self._bytes))
        self._file.seek(start)
        return self._file.readinto(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()

    def _check(self, start: int, stop: int) -> None:
        for block in range(start // self._block, -(-stop // self._block)):
            if block not in self._sound:
                self._file.seek(block * self._block)
                if block >= len(self._digests) or zlib.crc32(self._file.read(self._block)) != self._digests[block]:
                    raise self._error(f"{self._path}: altered since it was written, at bytes {block * self._block} to "
                                      f"{min((block + 1) * self._block, self._bytes)}; make it again")
                self._sound.add(block)
