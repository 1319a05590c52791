"""Text -> token store. Tokens are made once, before anything else; what needs them asks for rows by their number.

Process p of P makes parts p, p + P, ... of the text and tokenises their documents only. The files of a part depend neither on P
nor on interruptions, nor on how often a store was made larger.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from saejax.base import lease
from saejax.base.errors import StoreError, TextError
from saejax.base.logs import say
from saejax.base.records import TokenBatch
from saejax.base.storage import barrier, decided, disk_errors, file_sha256, is_writer, patient, together, write_bytes, write_json
from saejax.config import TextOptions
from saejax.data import manifest, parts
from saejax.data import sources as src
from saejax.data.numbering import Numbering, rows_needed
from saejax.data.packing import Packing
from saejax.data.parts import FilePart, Part
from saejax.data.sources import Sources
from saejax.data.token_store import (
    KIND,
    MANIFEST,
    REPEATED,
    SCHEMA_VERSION,
    SPEC,
    TokenStore,
    dropped_of,
    is_complete,
    read_spec,
    spec_digest,
    spec_file,
    spec_of,
)
from saejax.lm import Tokenizer


def build(path: str | Path, options: TextOptions, tokenizer: Tokenizer, contexts: int, *, seed: int, split: str = "train",
          sources: Sources | None = None, advance: Callable[[int], object] = lambda _: None) -> TokenStore:
    """The token store in a folder with at least `contexts` contexts, or with all that the text has. Every process calls it.

    One that is there is opened, or grows where it has fewer. One that was interrupted goes on. advance: is told how many tokens
    were made since it was told before; what it raises stops the work between two documents.

    Raises `StoreError` (the folder belongs to another text, tokenizer, context or version; lists the differences),
    `StoreCorruptError`, `TextError` (nothing in the split, less than one context), `DiskError`, `LeaseError`.
    """
    import jax
    process, n_processes = jax.process_index(), jax.process_count()
    with lease.writing(path):
        with together("saejax_tokens_begin"):
            writer = TokenWriter(path, options, tokenizer, seed=seed, split=split, sources=sources)
            if is_writer():
                writer.begin()
        with together("saejax_tokens_same"):
            writer.check()
        while True:
            with together("saejax_tokens_planned"):  # nobody goes on before the records have been read
                rows = writer.rows_wanted(contexts) if is_writer() else 0
            if not (rows := decided(rows)):
                break
            with together("saejax_tokens_made"):
                for tokens in writer.extend(rows, process, n_processes):
                    advance(tokens)
        with together("saejax_tokens_finished"):
            if is_writer() and not is_complete(path):
                writer.finish()
        barrier("saejax_tokens")
    return patient(lambda: TokenStore.open(path), StoreError)


def in_memory(options: TextOptions, tokenizer: Tokenizer, contexts: int, *, seed: int, split: str = "train",
              sources: Sources | None = None) -> TokenStore:
    """The same rows under the same numbers, in memory and without a file: for a few. Raises `TextError`."""
    sources = sources or src.resolve(options)
    packing = Packing(options, tokenizer, split)
    made = [Part(number, packing) for number in range(parts.PARTS)]
    while rows := rows_needed([p.rows for p in made], [p.finished for p in made], contexts):
        for _ in parts.extend(made, rows, packing, sources, seed):
            pass
    rests = Part(parts.PARTS, packing)
    parts.of_rests(rests, made)
    store = TokenStore.of_parts(spec_of(options, tokenizer, sources, seed=seed, split=split), packing.masking, [*made, rests])
    if store.contexts == 0:
        raise _nothing(packing, sources, made)
    return store


def token_batches(options: TextOptions, tokenizer: Tokenizer, batch: int, *, seed: int, split: str = "train",
                  max_contexts: int | None = None, sources: Sources | None = None) -> Iterator[TokenBatch]:
    """Batches of `batch` contexts (the last may be shorter), at most `max_contexts` in all, made in memory. Raises `TextError`.
    """
    most = 2**62 if max_contexts is None else max_contexts
    store = in_memory(options, tokenizer, most, seed=seed, split=split, sources=sources)
    last = min(store.contexts, most)
    for first in range(0, last, batch):
        numbers = np.arange(first, min(first + batch, last), dtype=np.int64)
        tokens_BT = store.read(numbers)
        yield TokenBatch(tokens_BT, store.keep(tokens_BT, numbers), numbers, store.lengths(tokens_BT))


class TokenWriter:
    """Fills the folder of a token store. Any number of processes may make different parts of it.

    `begin` comes first, in one process; then, as long as `rows_wanted` says how many rows each part needs, `extend` in all of
    them; then `finish` in one.
    """

    def __init__(self, path: str | Path, options: TextOptions, tokenizer: Tokenizer, *, seed: int, split: str = "train",
                 sources: Sources | None = None):
        self.path, self._seed = Path(path), seed
        self._sources = sources or src.resolve(options)
        self._packing = Packing(options, tokenizer, split)
        self.spec = spec_of(options, tokenizer, self._sources, seed=seed, split=split)
        self._digest = spec_digest(self.spec)

    def begin(self) -> None:
        """Writes `spec.json`. A folder for another spec is taken over as long as there are no rows in it. Raises `StoreError`."""
        with disk_errors(self.path):
            there = list(self.path.iterdir()) if self.path.exists() else []
            if not (self.path / SPEC).is_file():
                if any(SPEC not in file.name and file.name != lease.FILE for file in there):
                    raise StoreError(f"{self.path}: is not empty and not a token store; choose another folder")
            elif read_spec(self.path) != self.spec:
                if any(file.suffix == ".i32" and file.stat().st_size for file in there):
                    self.check()
                for file in there:
                    if file.name.startswith("part-"):
                        file.unlink()
            else:
                return
        write_json(self.path / SPEC, spec_file(self.spec))

    def check(self) -> None:
        """Raises `StoreError` with all differences where the folder is for another spec."""
        if different := manifest.differences(read_spec(self.path), self.spec):
            raise StoreError(f"{self.path}: holds the tokens of another config ({'; '.join(different)}); choose another folder "
                             "or delete this one")

    def rows_wanted(self, contexts: int) -> int:
        """How many rows every part has to have for this many contexts; 0 where they have them, or the text has no more."""
        made = self._parts()
        return rows_needed([p.rows for p in made], [p.finished for p in made], contexts)

    def extend(self, rows: int, process: int = 0, n_processes: int = 1) -> Iterator[int]:
        """Makes this process's parts as long as `rows`. Yields the number of tokens made since the time before."""
        lease.confirm()
        with disk_errors(self.path):
            (self.path / MANIFEST).unlink(missing_ok=True)  # it speaks of shorter parts
        return parts.extend(self._parts(process, n_processes), rows, self._packing, self._sources, self._seed)

    def finish(self) -> None:
        """Writes `tokens.json`. Raises `TextError` where there is not one context."""
        made, rests = self._parts(), FilePart(parts.PARTS, self._packing, self.path, self._digest)
        parts.of_rests(rests, made)
        every, dropped = [*made, rests], dropped_of(rests)
        contexts = Numbering([p.rows for p in made], [p.finished for p in made]).contexts + rests.rows
        if contexts == 0:
            raise _nothing(self._packing, self._sources, made)
        if rests.finished:
            say(f"tokens: the text ended after {contexts} contexts of {self._packing.context} tokens; {dropped} tokens that fill "
                "no context dropped")
        rests.save(last=True)
        of_parts = {"rows": [p.rows for p in every], "finished": [p.finished for p in every],
                    "records": [file_sha256(parts.record_file(self.path, p.number)) for p in every]}
        masking = self._packing.masking
        numbers = TokenStore.of_files(self.path, self.spec, masking, **of_parts, dropped=dropped).repeated
        if len(numbers):
            say(f"tokens: {len(numbers)} of {contexts} contexts are exactly like an earlier one and masked")
            write_bytes(self.path / REPEATED, numbers.astype("<i8").tobytes())
        values = {"kind": KIND, "schema_version": SCHEMA_VERSION, "spec": self.spec, **of_parts, "dropped": dropped,
                  "masking": masking.to_json(), "repeated": len(numbers),
                  "repeated_sha256": hashlib.sha256(numbers.astype("<i8")).hexdigest()}
        for leftover in self.path.glob(".*.tmp-*"):
            leftover.unlink(missing_ok=True)
        lease.confirm()
        write_json(self.path / MANIFEST, {**values, "sha256": manifest.self_digest(values)})

    def _parts(self, process: int = 0, n_processes: int = 1) -> list[FilePart]:
        return [FilePart(number, self._packing, self.path, self._digest) for number in range(process, parts.PARTS, n_processes)]


def _nothing(packing: Packing, sources: Sources, made: Sequence[Part]) -> TextError:
    """Why there is not one context."""
    where = f"config.text.source: {', '.join(sources.names)}"
    documents, left = sum(part.documents for part in made), sum(len(part.rest) for part in made)
    if documents == 0:
        return TextError(f"{where}: no documents")
    if not any(part.used for part in made):
        return TextError(f"{where}: none of {documents} documents has text in the {packing.split!r} split; change "
                         "config.text.holdout or add documents (one text file is one document)")
    return TextError(f"{where}: the {packing.split!r} split has {left + packing.context - packing.payload} tokens, one context "
                     f"needs {packing.context}; add text or lower config.text.context")
