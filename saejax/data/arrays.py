"""An activation store from rows that exist already: those of another pipeline, or synthetic ones. No language model,
no text."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from saejax.base.errors import StoreError
from saejax.base.storage import text_sha256
from saejax.data.manifest import StoreSpec
from saejax.data.store import Store, is_complete
from saejax.data.writer import StoreWriter

MODEL = "rows"


def write_rows(path: str | Path, batches: Iterable[np.ndarray], rows: int, widths: Mapping[str, int], *,
               model: str = MODEL, source: dict | None = None, context: int = 128, shard_contexts: int = 512,
               chunk_rows: int = 256, mask_first: bool = False) -> Store:
    """A finished store of `rows` activation rows, from batches [n, W] of any lengths; memory: one shard and one batch.

    widths: of the hookpoints, whose columns lie side by side in a batch. Rows are kept in the given order, rounded to bfloat16;
    row r is "token" r % context of "context" r // context, every token id is 0. model: what `config.lm.model` must say to train
    on it. source: JSON that names where the rows come from, kept in the store. mask_first: the first row of each context is
    masked, as a harvest masks BOS. Raises `StoreError` (layout that does not fit, other width, fewer or more rows than announced,
    a finished store at `path`), `NonFiniteError` and `DiskError`.
    """
    path = Path(path)
    if rows <= 0 or rows % context or shard_contexts * context % chunk_rows:
        raise StoreError(f"{path}: {rows} rows in contexts of {context} and shards of {shard_contexts} contexts with "
                         f"chunks of {chunk_rows} rows; the context must divide the rows and the chunk the shard")
    if is_complete(path):
        raise StoreError(f"{path}: is a finished store already; open it, or choose another directory")
    spec = StoreSpec(model=model, model_digest=text_sha256(model), lm_dtype="float32",
                     tokenizer_digest=text_sha256("none"), text={"context": context, **(source or {})},
                     hookpoints=tuple(widths.items()), context=context,
                     shard_contexts=shard_contexts, chunk_rows=chunk_rows, mask_special=mask_first,
                     target_contexts=rows // context)
    writer, written = StoreWriter(path, spec), 0
    borders = np.cumsum(list(widths.values()))
    for shard, x_ND in enumerate(_shards(path, batches, int(borders[-1]), spec.shard_rows)):
        written += len(x_ND)
        if written > rows or len(x_ND) % context:
            break
        keep_NT = np.ones((len(x_ND) // context, context), np.uint8)
        keep_NT[:, 0] = not mask_first
        values = dict(zip(widths, np.split(x_ND, borders[:-1], axis=1), strict=True))
        writer.write_shard(shard, values, np.zeros_like(keep_NT, np.int32), keep_NT, {"rows": written})
    if written != rows:
        found = f"more than {rows}" if written > rows else str(written)
        raise StoreError(f"{path}: the batches hold {found} rows, {rows} were announced; delete the directory and pass "
                         "the right number")
    return writer.finalize(rows // context)


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
