"""The token store: the rows of tokens of a text, made once, read in any order.

    tokens.json               everything below but the rows and their checksums, written last; its presence means "complete"
    spec.json                 what decides the rows; a folder made for another spec is refused
    part-00007.i32, .json     the parts of the text and their records (`parts`)
    repeated.i64              numbers of the contexts that are exactly like an earlier one, where `config.text.mask` asks for them

Rows are numbered over all parts (`numbering`): context c is the same row of tokens whoever made the store and however much was
added to it since.
"""

import functools
import hashlib
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from saejax.base.errors import StoreCorruptError, StoreError
from saejax.base.keys import Keys
from saejax.base.storage import file_sha256, json_bytes, read_json
from saejax.base.verified import BLOCK
from saejax.config import TextOptions
from saejax.data import manifest, packing, parts, permutation, text
from saejax.data.numbering import Numbering
from saejax.data.packing import Masking
from saejax.data.parts import AGAIN, Part
from saejax.data.sources import Sources
from saejax.lm import Tokenizer

MANIFEST, SPEC, REPEATED = "tokens.json", "spec.json", "repeated.i64"
KIND, SCHEMA_VERSION = "saejax-token-store", 2
_CONTEXTS = 4096  # read at once where all are

Rows = Callable[[np.ndarray], np.ndarray]  # int64 [N] rows of a part -> int32 [N, T]


def spec_of(options: TextOptions, tokenizer: Tokenizer, sources: Sources, *, seed: int, split: str) -> dict:
    """Everything that decides the rows of a token store, but for how many there are. Plain JSON."""
    return {"text": text.describe(options, sources, seed), "split": split, "tokenizer": tokenizer.digest,
            "context": options.context, **versions()}


def versions() -> dict:
    """What of this program decides which rows a text becomes, and their numbers."""
    return {"parts": parts.PARTS, "packing_version": packing.VERSION, "order_version": permutation.VERSION}


def spec_digest(spec: dict) -> str:
    """SHA-256 of a spec in canonical JSON."""
    return manifest.self_digest(spec)


def dropped_of(rests: Part) -> int:
    """Tokens that fill no row, even with those that the other parts had left."""
    return len(rests.rest) if rests.finished else 0


class TokenStore:
    """Rows of tokens by number. Every value that is read is checked; one that was altered is a `StoreCorruptError` that names the
    file. `contexts`: how many rows of `context` tokens; `dropped`: tokens that filled no row; `spec`: what decides the rows.
    `repeated`: numbers of the contexts that are masked for being like an earlier one. `path` and `digest` are those of the folder
    and of its `tokens.json`, None in memory.
    """

    def __init__(self, spec: dict, masking: Masking, rows: Sequence[int], finished: Sequence[bool], read: Sequence[Rows], *,
                 dropped: int, repeated: Callable[[], np.ndarray] | None = None, path: Path | None = None,
                 digest: str | None = None):
        """rows, finished, read: of every part, and last of what these had left. repeated: None where they are looked for here."""
        self.spec, self.path, self.digest, self.dropped = spec, path, digest, dropped
        self.context: int = spec["context"]
        self._masking, self._numbering, self._rows = masking, Numbering(rows[:-1], finished[:-1]), read
        self.contexts = self._numbering.contexts + rows[-1]
        self._find_repeated = repeated or self._look_for_repeated

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else repr(str(self.path))
        return f"TokenStore({where}, {self.contexts:,} contexts of {self.context} tokens)"[:150]

    @classmethod
    def open(cls, path: str | Path) -> "TokenStore":
        """Opens a finished token store, without a look at the text. Reads the records and no rows.

        Raises `StoreError` (no token store, not finished, another schema) or `StoreCorruptError` (naming the file).
        """
        path = Path(path)
        if not is_complete(path):
            raise StoreError(_unfinished(path))
        f = _keys(path / MANIFEST)
        if f.hex("sha256") != manifest.self_digest(f.values):
            raise StoreCorruptError(f"{path / MANIFEST}: altered since it was written (its digest does not verify); {AGAIN}")
        spec = _checked_spec(f)
        found = {key: f.get(key, list) for key in ("rows", "finished", "records")}
        if {len(values) for values in found.values()} != {spec["parts"] + 1}:
            f.refuse(f"rows, finished or records are not of {spec['parts']} parts and their rests")
        repeated = functools.partial(_read_repeated, path / REPEATED, f.count("repeated"), f.hex("repeated_sha256"))
        return cls.of_files(path, spec, Masking.of_json(f.section("masking")), **found, dropped=f.count("dropped"),
                            repeated=repeated, digest=f.values["sha256"])

    @classmethod
    def of_files(cls, path: Path, spec: dict, masking: Masking, *, rows: Sequence[int], finished: Sequence[bool],
                 records: Sequence[str], **more) -> "TokenStore":
        """A token store of the parts in a folder; records: SHA-256 of theirs. more: arguments of a `TokenStore`."""
        digest = spec_digest(spec)
        read = [_file_rows(path, number, sha256, spec["context"], of_part, digest)
                for number, (sha256, of_part) in enumerate(zip(records, rows, strict=True))]
        return cls(spec, masking, rows, finished, read, path=path, **more)

    @classmethod
    def of_parts(cls, spec: dict, masking: Masking, made: Sequence[Part]) -> "TokenStore":
        """A token store of parts that are in memory, the one of their rests behind them."""
        return cls(spec, masking, [p.rows for p in made], [p.finished for p in made],
                   [part.array().__getitem__ for part in made], dropped=dropped_of(made[-1]))

    def read(self, first, stop: int | None = None) -> np.ndarray:
        """int32 [N, T] of the contexts `first` to `stop` - 1, or of the numbers `first` (an array) in their order.

        Raises `IndexError` for a number that there is not, `StoreCorruptError`.
        """
        numbers = np.asarray(first if stop is None else np.arange(first, stop), np.int64)
        out = np.empty((len(numbers), self.context), np.int32)
        if numbers.size and not (0 <= numbers.min() and numbers.max() < self.contexts):
            raise IndexError(f"contexts {numbers.min()} to {numbers.max()} are not all in [0, {self.contexts})")
        which, rows = np.full(len(numbers), len(self._rows) - 1), numbers - self._numbering.contexts
        dealt = rows < 0
        which[dealt], rows[dealt] = self._numbering(numbers[dealt])
        for part in np.unique(which):
            here = which == part
            out[here] = self._rows[part](rows[here])
        return out

    def keep(self, tokens_NT: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """bool [N, T] of the contexts with these numbers: False at what is masked (`config.text.mask`) or fills a row up."""
        keep_NT = self._masking.keep(tokens_NT)
        if len(self.repeated):
            keep_NT[np.isin(numbers, self.repeated)] = False
        return keep_NT

    @functools.cached_property
    def repeated(self) -> np.ndarray:
        """int64, in order."""
        return self._find_repeated()

    def _look_for_repeated(self) -> np.ndarray:
        """Compares SHA-256 of all contexts, of which 16 bytes each are kept in memory."""
        if "repeated" not in self.spec["text"]["mask"]:
            return np.empty(0, np.int64)
        digests_N = np.empty(self.contexts, "V16")
        for start in range(0, self.contexts, _CONTEXTS):
            rows = self.read(start, min(start + _CONTEXTS, self.contexts))
            digests_N[start:start + len(rows)] = np.frombuffer(
                b"".join(hashlib.sha256(row).digest()[:16] for row in rows), "V16")
        _, first = np.unique(digests_N, return_index=True)
        repeated = np.ones(self.contexts, bool)
        repeated[first] = False
        return np.flatnonzero(repeated)

    def lengths(self, tokens: np.ndarray) -> np.ndarray:
        """int [...] of rows [..., T]: the tokens that are text; the others fill the row up."""
        return self._masking.lengths(tokens)

    def verify(self) -> None:
        """Reads every row, and `spec.json`. Raises `StoreCorruptError`."""
        if self.path is not None and (self.path / SPEC).read_bytes() != json_bytes(spec_file(self.spec)):
            raise StoreCorruptError(f"{self.path / SPEC}: altered, it does not say what {MANIFEST} says; {AGAIN}")
        for start in range(0, self.contexts, _CONTEXTS):
            self.read(start, min(start + _CONTEXTS, self.contexts))
        self.repeated  # noqa: B018 - reads and checks the file


def _read_repeated(path: Path, count: int, sha256: str) -> np.ndarray:
    try:
        data = path.read_bytes() if count else b""
    except OSError as error:
        raise StoreCorruptError(f"{path}: missing; {AGAIN}") from error
    if len(data) != 8 * count or hashlib.sha256(data).hexdigest() != sha256:
        raise StoreCorruptError(f"{path}: altered since {MANIFEST} was written; {AGAIN}")
    return np.frombuffer(data, "<i8")


class _FileRows:
    """The rows of a part in its file. A block of bytes is checked when a read touches it first. What was appended to the file
    since is not looked at.
    """

    def __init__(self, path: Path, context: int, rows: int, blocks: list[int]):
        self._path, self._context, self._blocks = path, context, blocks
        self._bytes = rows * context * 4
        self._sound = np.zeros(len(blocks), bool)
        self._map: np.ndarray | None = None

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        if self._map is None:
            parts.check_size(self._path, self._bytes)
            self._map = np.memmap(self._path, np.uint8, "r", shape=(self._bytes,))
        size = self._context * 4
        first, last = rows * size // BLOCK, ((rows + 1) * size - 1) // BLOCK
        touched = set(first.tolist()).union(*(range(a + 1, b + 1) for a, b in zip(first, last, strict=True) if b > a))
        for block in touched:
            if not self._sound[block]:
                self._check(block)
        return self._map.view("<i4").reshape(-1, self._context)[rows]

    def _check(self, block: int) -> None:
        start, stop = block * BLOCK, min((block + 1) * BLOCK, self._bytes)
        if zlib.crc32(self._map[start:stop]) != self._blocks[block]:
            raise StoreCorruptError(f"{self._path}: altered since it was written, at bytes {start} to {stop}; {AGAIN}")
        self._sound[block] = True


def _file_rows(path: Path, number: int, sha256: str, context: int, rows: int, digest: str) -> _FileRows:
    file = parts.record_file(path, number)
    if not file.is_file():
        raise StoreCorruptError(f"{file}: missing; {AGAIN}")
    if file_sha256(file) != sha256:
        raise StoreCorruptError(f"{file}: altered since {MANIFEST} was written; {AGAIN}")
    record = parts.read_record(file, context, digest)
    if record["rows"] != rows:
        raise StoreCorruptError(f"{file}: {record['rows']} rows, {MANIFEST} says {rows}; {AGAIN}")
    parts.check_size(parts.rows_file(path, number), rows * context * 4)
    return _FileRows(parts.rows_file(path, number), context, rows, record["blocks"])


def is_complete(path: str | Path) -> bool:
    """True where a token store is finished."""
    return (Path(path) / MANIFEST).is_file()


def spec_file(spec: dict) -> dict:
    """What `spec.json` holds."""
    return {"kind": KIND, "schema_version": SCHEMA_VERSION, "spec": spec}


def read_spec(path: Path) -> dict:
    """The spec a folder was made for, finished or not. Raises `StoreError`."""
    return _checked_spec(_keys(path / SPEC))


def _keys(file: Path) -> Keys:
    f = Keys(read_json(file, StoreCorruptError), file, StoreCorruptError)
    f.one_of("kind", (KIND,))
    if f.count("schema_version", least=1) != SCHEMA_VERSION:
        raise StoreError(f"{file}: schema version {f.values['schema_version']}, this saejax reads {SCHEMA_VERSION}; use the "
                         "saejax that wrote it")
    return f


def _checked_spec(f: Keys) -> dict:
    spec = f.section("spec")
    spec.get("text", dict), spec.get("split", str), spec.get("tokenizer", str)
    for key in ("context", "parts", "packing_version", "order_version"):
        spec.count(key, least=1)
    spec.refuse_unread()
    return spec.values


def _unfinished(path: Path) -> str:
    if not (path / SPEC).is_file():
        return f"{path}: no token store here; make it first"
    return f"{path / MANIFEST}: missing, so the token store is not finished; make it again, what is there is kept"
