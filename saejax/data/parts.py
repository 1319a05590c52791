"""The parts of a text: which documents belong to each, the rows they make, and their files.

Document i of the shuffled order belongs to part i mod `PARTS`. A part packs its documents one behind the other, from the first
on. It takes whole documents until it has as many rows as are wanted. So its rows depend on nothing else: not on who makes it, how
often it was interrupted, or how many documents are read at once. What the parts have left when all of their text has ended is
packed once more, in their order, as part number `PARTS`: its rows come behind all others.

    part-00007.i32     its rows, int32 [rows, context], one behind the other
    part-00007.json    its record: rows, where it stands in its documents, the tokens that fill no row yet, checksums of the rows

Rows are appended first and the record replaced then: what the file holds beyond its record is cut off.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from saejax.base import lease
from saejax.base.errors import StoreCorruptError
from saejax.base.keys import Keys
from saejax.base.storage import disk_errors, read_json, write_json
from saejax.base.verified import BLOCK, continued
from saejax.data import sources as src
from saejax.data.packing import Packing
from saejax.data.sources import Document, Sources

PARTS = 64
AGAIN = "delete this token store and make it again"
_KEPT = 1 << 20  # bytes of rows that a part keeps in memory before it writes them
_DOCUMENTS = 256  # read and tokenised at once


class Part:
    """A part in memory. `rows` of it are made; its document number `documents` comes next; `finished`: there is no other.

    `rest` are tokens that fill no row, or none yet. `used`: documents with text in the split. `read` documents and `tokens` of
    them have been added here.
    """

    def __init__(self, number: int, packing: Packing):
        self.number, self._packing = number, packing
        self.rows = self.documents = self.used = self.read = self.tokens = 0
        self.finished = False
        self.rest = np.empty(0, np.int32)
        self._fresh: list[np.ndarray] = []

    @property
    def next(self) -> int:
        """The position in the shuffled order of the document that comes next."""
        return self.number + PARTS * self.documents

    def wants(self, rows: int) -> bool:
        """Whether it has fewer rows and may get more."""
        return self.rows < rows and not self.finished

    def add(self, piece: np.ndarray | None) -> None:
        """The next document: its tokens, None where it has none in this split."""
        self.documents += 1
        self.read += 1
        if piece is None:
            return
        self.used += 1
        self.tokens += len(piece)
        tokens = np.concatenate([self.rest, piece])
        whole = len(tokens) // self._packing.payload * self._packing.payload
        if whole:
            self._fresh.append(self._packing.rows(tokens[:whole]))
            self.rows += len(self._fresh[-1])
        self.rest = tokens[whole:].copy()

    def end(self) -> None:
        """There are no more documents."""
        self.finished = True

    def array(self) -> np.ndarray:
        """int32 [rows, context] of the rows that are in memory."""
        return np.concatenate([np.empty((0, self._packing.context), np.int32), *self._fresh])

    def save(self, *, last: bool) -> None:
        """Writes what is new; nothing for a part that stays in memory. last: also where it is little."""


def of_rests(part: Part, parts: Sequence[Part]) -> None:
    """Fills one part more with what all the others have left when their text has ended, in their order."""
    if not part.finished and all(other.finished for other in parts):
        part.add(np.concatenate([other.rest for other in parts]))
        part.end()


class FilePart(Part):
    """A part in the files of a folder, going on from its record. Raises `StoreCorruptError`, and `DiskError` where it writes."""

    def __init__(self, number: int, packing: Packing, folder: Path, spec_sha256: str):
        super().__init__(number, packing)
        self._file, self._record, self._spec = rows_file(folder, number), record_file(folder, number), spec_sha256
        self._blocks, self._written, self._saved = [], 0, None
        if self._record.is_file():
            self._go_on(read_record(self._record, packing.context, spec_sha256))

    def _go_on(self, record: dict) -> None:
        self.rows, self.documents, self.used = record["rows"], record["documents"], record["used"]
        self.finished = record["finished"]
        self.rest = np.array(record["rest"], np.int32)
        self._blocks, self._written, self._saved = record["blocks"], record["rows"] * self._packing.context * 4, record
        check_size(self._file, self._written)

    def save(self, *, last: bool) -> None:
        size = sum(rows.nbytes for rows in self._fresh)
        if size < _KEPT and not last:
            return
        data = b"".join(rows.astype("<i4", copy=False).tobytes() for rows in self._fresh)
        blocks = continued(self._blocks, self._written, data)
        record = {"rows": self.rows, "documents": self.documents, "used": self.used, "finished": self.finished,
                  "rest": self.rest.tolist(), "blocks": blocks, "spec_sha256": self._spec}
        if record == self._saved:
            return
        lease.confirm()
        with disk_errors(self._file), open(self._file, "ab") as file:
            file.truncate(self._written)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        write_json(self._record, record)
        self._blocks, self._written, self._saved, self._fresh = blocks, self._written + len(data), record, []


def rows_file(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.i32"


def record_file(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.json"


def read_record(path: Path, context: int, spec_sha256: str) -> dict:
    """The record of a part. Raises `StoreCorruptError`."""
    f = Keys(read_json(path, StoreCorruptError), path, StoreCorruptError)
    if f.hex("spec_sha256") != spec_sha256:
        raise StoreCorruptError(f"{path}: belongs to another token store; {AGAIN}")
    blocks = -(-f.count("rows") * context * 4 // BLOCK)
    for key in ("documents", "used"):
        f.count(key)
    f.get("finished", bool)
    f.checked("rest", None, _are_counts, "not a list of token ids", [])
    f.checked("blocks", None, lambda value: _are_counts(value) and len(value) == blocks, f"not {blocks} checksums", [])
    f.refuse_unread()
    return f.values


def _are_counts(value) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def check_size(path: Path, least: int) -> None:
    """Raises `StoreCorruptError` where a file is missing or has not all the bytes that its record names."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise StoreCorruptError(f"{path}: missing; {AGAIN}") from error
    if size < least:
        raise StoreCorruptError(f"{path}: {size} bytes, its record says {least}; {AGAIN}")


def extend(parts: Sequence[Part], rows: int, packing: Packing, sources: Sources, seed: int) -> Iterator[int]:
    """Adds documents to each of these parts until it has `rows` rows or its text has ended, and saves them. Yields the number of
    tokens that were made since the time before. Raises `TextError`, `DiskError`.
    """
    growing = [part for part in parts if part.wants(rows)]
    if not growing:
        return
    deal = _deal_stream if sources.streaming else _deal_map
    made = 0
    for dealt in deal(growing, rows, packing, sources, seed):
        pieces = iter(packing.pieces([document for _, documents in dealt for document in documents]))
        for part, documents in dealt:
            for piece in itertools.islice(pieces, len(documents)):
                if part.wants(rows):
                    part.add(piece)
        for part in growing:
            part.save(last=False)
        before, made = made, sum(part.tokens for part in growing)
        yield made - before
    for part in growing:
        part.save(last=True)


_Dealt = list[tuple[Part, list[Document | None]]]


def _deal_map(growing: Sequence[Part], rows: int, packing: Packing, sources: Sources, seed: int) -> Iterator[_Dealt]:
    """The documents that come next in each of these parts, no others: as many as it needs by the length of those before."""
    total, mine, most = src.count(sources), list(growing), 1
    while mine:
        room = max(1, _DOCUMENTS // len(mine))
        documents, tokens = sum(part.read for part in growing), sum(part.tokens for part in growing)
        most = min(room, 4 * most)
        wanted = [min(room, -(-(rows - part.rows) * packing.payload * documents // tokens)) if tokens else most for part in mine]
        positions = [np.arange(part.next, min(part.next + PARTS * n, total), PARTS) for part, n in zip(mine, wanted, strict=True)]
        found = iter(src.read_at(sources, seed, np.concatenate(positions)))
        yield [(part, list(itertools.islice(found, len(at)))) for part, at in zip(mine, positions, strict=True)]
        for part in mine:
            if part.wants(rows) and part.next >= total:
                part.end()
        mine = [part for part in mine if part.wants(rows)]


def _deal_stream(growing: Sequence[Part], rows: int, packing: Packing, sources: Sources, seed: int) -> Iterator[_Dealt]:
    """Every document from the first one on that one of these parts needs, dealt to its part where that is among them."""
    by_number = {part.number: part for part in growing}
    position = min(part.next for part in growing)
    for batch in src.read(sources, seed, position):
        dealt: dict[int, list[Document | None]] = {}
        for i, document in enumerate(batch, position):
            part = by_number.get(i % PARTS)
            if part is not None and part.wants(rows) and i >= part.next:
                dealt.setdefault(part.number, []).append(document)
        position += len(batch)
        yield [(by_number[number], documents) for number, documents in dealt.items()]
        if not any(part.wants(rows) for part in growing):
            return
    for part in growing:
        if part.wants(rows):
            part.end()
