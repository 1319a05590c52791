"""An activation store from rows that exist already: those of another pipeline (`store_of`), or synthetic ones (`write_rows`).

Such a store holds what its maker says and no more: model and digests are "unknown" unless they are given, and without token ids
`Store.has_tokens` is False. Training needs none of them; what does refuses.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from saejax import lm
from saejax.base import lease
from saejax.base.errors import NonFiniteError, StoreError
from saejax.base.logs import Progress
from saejax.base.records import UNKNOWN
from saejax.base.storage import safe_name
from saejax.data.manifest import StoreSpec
from saejax.data.shards import chunk_rows_of
from saejax.data.store import Store, is_complete, model_name
from saejax.data.writer import StoreWriter
from saejax.lm import LM

CONTEXT = 128
_SHARD_ROWS = 65_536
_PIECE = 4096  # rows converted at once
_NAMED = 5

Rows = np.ndarray | str | Path
Shard = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]  # acts by hookpoint, tokens [N, T], keep [N, T]


def store_of(activations: Mapping[str, Rows | Sequence[Rows]], path: str | Path, *, model: str | LM = UNKNOWN,
             tokens: Rows | Sequence[Rows] | None = None, context: int | None = None, mask_first: bool | None = None) -> Store:
    """Activations made elsewhere as a finished activation store at `path`, which `saejax train` reads.

    activations: {hookpoint: rows [N, D] or [contexts, T, D] of floats}, arrays or `.npy` files, which are memory-mapped; or a
    list of these, one behind the other. Raw values, rounded to bfloat16; all hookpoints have the same rows. model: the language
    model they are of, by name or loaded (then its digests are kept, and special tokens are masked). tokens: ids [N] or
    [contexts, T], in the same form. context: T of rows that come flat (128); the last context is filled up with masked rows.
    mask_first: the first token of each context is not trained on (where rows or ids come in contexts, unless told otherwise).

    Memory: one shard of 65,536 rows. Raises one `StoreError` that lists what does not fit (shape, dtype, file, number of rows, a
    finished store at `path`), `NonFiniteError` (names the rows), `HookpointError`, `LeaseError`, `DiskError`.
    """
    path = Path(path)
    problems: list[str] = []
    if not isinstance(activations, Mapping) or not activations:
        raise StoreError(f"{path}: expected activations as {{hookpoint: rows}}, got {type(activations).__name__}")
    columns = {name: _Column.of(name, rows, problems, floats=True) for name, rows in activations.items()}
    ids = None if tokens is None else _Column.of("tokens", tokens, problems, floats=False)
    if problems:
        raise StoreError(f"{path}: {'; '.join(problems)}")
    every = [*columns.values(), *([] if ids is None else [ids])]
    context_rows = _context(path, every, context)
    in_contexts = any(column.context for column in every)
    _check_model(path, model, columns, ids)
    special = np.array(sorted(model.tokenizer.special_ids) if isinstance(model, LM) and ids is not None else [], np.int32)
    mask = ["first"] * (in_contexts if mask_first is None else mask_first) + ["special"] * bool(len(special))
    source = {"sources": sorted({file for column in every for file in column.files}), "mask": mask}
    spec = _spec(model, {name: column.width for name, column in columns.items()}, source, context=context_rows,
                 rows=every[0].rows, shard_contexts=max(1, _SHARD_ROWS // context_rows), tokens=ids is not None)
    shards = (_shard(path, spec, columns, ids, special, first) for first in range(0, every[0].rows, spec.shard_rows))
    return _write(path, spec, shards)


@dataclass(frozen=True)
class _Column:
    """Arrays one behind the other: the rows of a hookpoint, or token ids. context: T where they come in contexts, else 0."""

    parts: tuple[np.ndarray, ...]
    context: int
    width: int
    files: tuple[str, ...]

    @classmethod
    def of(cls, name: str, given: Rows | Sequence[Rows], problems: list[str], *, floats: bool) -> "_Column | None":
        """Opens and checks; what is wrong goes to `problems`, and None comes back."""
        before = len(problems)
        one = isinstance(given, str | Path) or hasattr(given, "shape")
        parts = [_opened(name, part, problems) for part in ([given] if one else given)]
        if len(problems) > before or not parts:
            problems += [] if len(problems) > before else [f"{name}: no arrays"]
            return None
        first, flat = parts[0], 2 if floats else 1
        wanted = "[N, D] or [contexts, T, D]" if floats else "[N] or [contexts, T]"
        for x in parts:
            right = np.issubdtype(x.dtype, np.floating) or x.dtype == ml_dtypes.bfloat16 if floats else \
                np.issubdtype(x.dtype, np.integer)
            if not right:
                problems.append(f"{name}: dtype {x.dtype} is no {'float' if floats else 'integer'}")
            if x.ndim not in (flat, flat + 1) or 0 in x.shape or x.shape[1:] != first.shape[1:]:
                other = f" like the first one, {first.shape}" if len(parts) > 1 else ""
                problems.append(f"{name}: shape {x.shape}, expected {wanted}{other}")
        if len(problems) > before:
            return None
        files = tuple(Path(part).name for part in ([given] if one else given) if isinstance(part, str | Path))
        return cls(tuple(parts), first.shape[1] if first.ndim == flat + 1 else 0, first.shape[-1] if floats else 1, files)

    @property
    def rows(self) -> int:
        return sum(map(len, self.parts)) * (self.context or 1)

    def read(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Rows start..stop-1 in pieces, [n, width] of activations or [n, 1] of ids."""
        first = 0
        for part in self.parts:
            unit = self.context or 1
            step = max(1, _PIECE // unit)
            low, high = max(start // unit - first, 0), min(stop // unit - first, len(part))
            for a in range(low, high, step):
                yield np.asarray(part[a:min(a + step, high)]).reshape(-1, self.width)
            first += len(part)


def _opened(name: str, given: Rows, problems: list[str]) -> np.ndarray | None:
    file = isinstance(given, str | Path)
    try:
        found = np.load(given, mmap_mode="r", allow_pickle=False) if file else np.asarray(given)
        if isinstance(found, np.ndarray):
            return found
        reason = "several arrays in one file"
    except (OSError, ValueError, EOFError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:150]
    what = f"{given} is no readable .npy file" if file else f"{type(given).__name__} is no array"
    problems.append(f"{name}: {what} ({reason})")
    return None


def _context(path: Path, columns: list[_Column], given: int | None) -> int:
    found = {column.context for column in columns if column.context} | ({given} if given is not None else set())
    if len(found) > 1 or given is not None and given < 1:
        raise StoreError(f"{path}: contexts of {' and of '.join(map(str, sorted(found)))} tokens; give one length, at least 1")
    context = found.pop() if found else CONTEXT
    if len(rows := {column.rows for column in columns}) > 1:
        raise StoreError(f"{path}: activations and tokens are of {' and of '.join(f'{n:,}' for n in sorted(rows))} rows; each "
                         "row is one token, at every hookpoint")
    return context


def _check_model(path: Path, model: str | LM, columns: Mapping[str, _Column], ids: _Column | None) -> None:
    if not isinstance(model, LM):
        for name in columns:
            safe_name(name, StoreError)
        return
    for name, column in columns.items():
        lm.check_hookpoint(model.cfg, name)
        if (width := lm.width_of(model.cfg, name)) != column.width:
            raise StoreError(f"{path}: {name} is {width} wide in {model.name}, the rows are {column.width}; give the model and "
                             "the hookpoint that they are of")
    for part in ids.parts if ids is not None else ():
        if part.min() < 0 or part.max() >= model.cfg.vocab_size:
            raise StoreError(f"{path}: tokens hold ids {part.min()} to {part.max()}, {model.name} has 0 to "
                             f"{model.cfg.vocab_size - 1}; give ids of its tokenizer")


def _shard(path: Path, spec: StoreSpec, columns: Mapping[str, _Column], ids: _Column | None, special: np.ndarray,
           first: int) -> Shard:
    """The shard that begins at row `first`."""
    rows = next(iter(columns.values())).rows
    stop = min(first + spec.shard_rows, rows)
    contexts = -(-(stop - first) // spec.context)
    room = contexts * spec.context
    acts = {}
    for name, column in columns.items():
        acts[name], at = np.zeros((room, column.width), ml_dtypes.bfloat16), 0
        for piece in column.read(first, stop):
            with np.errstate(over="ignore"):
                here = acts[name][at:at + len(piece)] = piece.astype(ml_dtypes.bfloat16)
            bad = np.flatnonzero(~np.isfinite(here.astype(np.float32)).all(axis=1))
            if bad.size:
                named = ", ".join(str(first + at + int(row)) for row in bad[:_NAMED])
                more = " and more" if bad.size > _NAMED else ""
                raise NonFiniteError(f"{path}: {name}: rows {named}{more} hold NaN, Inf or more than bfloat16 can; leave them "
                                     "out, or look where they come from")
            at += len(piece)
    tokens_N = np.zeros(room, np.int32)
    if ids is not None:
        tokens_N[:stop - first] = np.concatenate(list(ids.read(first, stop)))[:, 0]
    keep_NT = ~np.isin(tokens_N, special).reshape(contexts, spec.context)
    keep_NT.reshape(-1)[stop - first:] = False
    keep_NT[:, :"first" in spec.text["mask"]] = False
    return acts, tokens_N.reshape(contexts, spec.context), keep_NT


def write_rows(path: str | Path, batches: Iterable[np.ndarray], rows: int, widths: Mapping[str, int], *, model: str = UNKNOWN,
               source: dict | None = None, context: int = CONTEXT, shard_contexts: int = 512, chunk_rows: int | None = None,
               mask_first: bool = False) -> Store:
    """A finished store of `rows` activation rows, from batches [n, W] of any lengths; memory: one shard and one batch.

    widths: of the hookpoints, whose columns lie side by side in a batch. Rows are kept in the given order, rounded to bfloat16;
    row r is "token" r % context of "context" r // context. model: what `config.lm.model` must say to train on it. source: JSON
    that names where the rows come from, kept in the store. mask_first: the first row of each context is masked, as a harvest
    masks it. Raises `StoreError` (layout that does not fit, other width, fewer or more rows than announced, a finished store at
    `path`), `NonFiniteError` and `DiskError`.
    """
    path, chunk_rows = Path(path), chunk_rows or chunk_rows_of(shard_contexts * context)
    if rows <= 0 or rows % context or shard_contexts * context % chunk_rows:
        raise StoreError(f"{path}: {rows} rows in contexts of {context} and shards of {shard_contexts} contexts with "
                         f"chunks of {chunk_rows} rows; the context must divide the rows and the chunk the shard")
    spec = _spec(model, widths, {"context": context, **(source or {}), "mask": ["first"] * mask_first}, context=context,
                 rows=rows, shard_contexts=shard_contexts, chunk_rows=chunk_rows)
    return _write(path, spec, _announced(path, batches, rows, spec))


def _announced(path: Path, batches: Iterable[np.ndarray], rows: int, spec: StoreSpec) -> Iterator[Shard]:
    """The shards of so many rows. Raises `StoreError` where there are more or fewer."""
    written, borders = 0, np.cumsum([width for _, width in spec.hookpoints])
    for x_ND in _shards(path, batches, int(borders[-1]), spec.shard_rows):
        written += len(x_ND)
        if written > rows or len(x_ND) % spec.context:
            break
        keep_NT = np.ones((len(x_ND) // spec.context, spec.context), bool)
        keep_NT[:, :"first" in spec.text["mask"]] = False
        names = [name for name, _ in spec.hookpoints]
        yield (dict(zip(names, np.split(x_ND, borders[:-1], axis=1), strict=True)), np.zeros_like(keep_NT, np.int32), keep_NT)
    if written != rows:
        found = f"more than {rows}" if written > rows else str(written)
        raise StoreError(f"{path}: the batches hold {found} rows, {rows} were announced; delete the directory and pass "
                         "the right number")


def _spec(model: str | LM, widths: Mapping[str, int], source: dict, *, context: int, rows: int, shard_contexts: int,
          chunk_rows: int | None = None, tokens: bool = False) -> StoreSpec:
    known = isinstance(model, LM)
    return StoreSpec(model=model.name if known else model_name(model), model_digest=model.digest if known else UNKNOWN,
                     lm_dtype=UNKNOWN, tokenizer_digest=model.tokenizer.digest if known else UNKNOWN,
                     text={**source, "tokens": tokens}, hookpoints=tuple(widths.items()), context=context,
                     shard_contexts=shard_contexts, chunk_rows=chunk_rows or chunk_rows_of(shard_contexts * context),
                     target_contexts=-(-rows // context))


def _write(path: Path, spec: StoreSpec, shards: Iterable[Shard]) -> Store:
    if is_complete(path):
        raise StoreError(f"{path}: is a finished store already; open it, or choose another directory")
    with lease.writing(path), Progress("store", spec.target_contexts * spec.context, unit="row") as bar:
        writer = StoreWriter(path, spec)
        for number, (acts, tokens_NT, keep_NT) in enumerate(shards):
            writer.write_shard(number, acts, tokens_NT, keep_NT)
            bar.advance(keep_NT.size)
        return writer.finalize(spec.target_contexts)


def _shards(path: Path, batches: Iterable[np.ndarray], width: int, shard_rows: int) -> Iterator[np.ndarray]:
    """The same rows as bfloat16, cut into whole shards; the last one may be shorter."""
    held, n = [], 0
    for batch in batches:
        x_ND = np.asarray(batch)
        if x_ND.ndim != 2 or x_ND.shape[1] != width:
            raise StoreError(f"{path}: a batch of shape {x_ND.shape}, expected [n, {width}]; pass rows of one width")
        x_ND = x_ND.astype(ml_dtypes.bfloat16, copy=False)
        while len(x_ND):
            part = x_ND[:shard_rows - n]
            held.append(part)
            n, x_ND = n + len(part), x_ND[len(part):]
            if n == shard_rows:
                yield np.concatenate(held)
                held, n = [], 0
    if n:
        yield np.concatenate(held)
