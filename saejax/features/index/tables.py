"""The tables of an index, written block by block of features and saved in parts, and its manifest."""

import contextlib
import functools
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saejax.base import lease, sharding
from saejax.base.errors import FeatureIndexError
from saejax.base.logs import Progress
from saejax.base.storage import barrier, disk_errors, is_writer, replacing, write_json
from saejax.base.verified import digests
from saejax.features.index import bits, logits
from saejax.features.index.corpus import Tokens
from saejax.features.index.examples import Examples, interval_counts, top_tokens
from saejax.features.index.neighbours import Coactivation, chosen, nearest
from saejax.features.index.reader import (
    EXAMPLES,
    FEATURE_SCHEMA,
    FEATURES,
    FILES,
    GROUP,
    MANIFEST,
    VOCABULARY,
    example_schema,
    manifest_digest,
)
from saejax.features.index.saved import SavedState
from saejax.features.index.source import check_part
from saejax.features.index.state import LOG_BINS, FeatureState
from saejax.features.index.windows import Windows
from saejax.lm import LM
from saejax.lm.token_text import text_of
from saejax.sae.inference import SAE

NEAR, LOGITS = 10, 10
_SOURCE = b"saejax.source"  # of a part: what it was made from
PART = 65_536  # features of a part, which an interrupted build need not make again
LOG10_EDGES = tuple(-7 + 0.5 * i for i in range(15))  # of the density histogram, as evaluation has it


@dataclass(frozen=True)
class Found:
    """What the passes have found: the state of all features, examples, the activations around them, the tokens of all, and from
    what.
    """

    state: SavedState
    examples: Examples
    windows: Windows
    tokens: Tokens
    source: dict

    @functools.cached_property
    def rows(self) -> int:
        """Unmasked ones."""
        return int(self.tokens.keep_NT.sum())


def write_parts(folder: Path, sae: SAE, lm_: LM, found: Found, near: str, *, progress: bool) -> list[Path]:
    """The rows of `features.parquet` in files of `PART` features each; those that are there are left as they are. near: whose
    neighbours by decoder are in them (`neighbours.CHOICES`). All collectives of writing the tables are in here, so every process
    goes through it to its end, in step; one writes.
    """
    F, schema = sae.cfg.d_sae, FEATURE_SCHEMA.with_metadata({_SOURCE: json.dumps(found.source)})
    files = [folder / f"features_{near}" / f"{first // PART:05d}.parquet" for first in range(0, F, PART)]
    left = [first for first, file in zip(range(0, F, PART), files, strict=True) if not _made(file, found.source)]
    barrier("saejax_index_parts")  # all have seen what is left
    if not left:
        return files
    with Progress("index, tables", F, initial=F - sum(min(PART, F - first) for first in left), unit="feature",
                  enabled=progress) as bar:
        weights, chosen_F = _weights(sae), chosen(near, found.state.fired)
        together = Coactivation(found.state.column("sketch"), found.state.fired, found.rows) if is_writer() else None
        for first in left:
            last = min(first + PART, F)
            nearest_ = _Nearest.of(sae, chosen_F, first, last)
            blocks = _blocks(sae, lm_, first, last, weights, nearest_, bar)
            if is_writer():
                lease.confirm()
                with replacing(files[first // PART]) as file, pq.ParquetWriter(file, schema, compression="zstd") as part:
                    for a, b, columns in blocks:
                        part.write_table(pa.table(columns | _seen(found, together, a, b), schema=FEATURE_SCHEMA), GROUP)
            else:
                for _ in blocks:  # the collectives of the one that writes
                    pass
    return files


def _blocks(sae: SAE, lm_: LM, first: int, last: int, weights: dict, nearest_: "_Nearest",
            bar: Progress) -> Iterator[tuple[int, int, dict]]:
    """(first, last, columns) of blocks of 256 features: what dictionary and model alone say of them."""
    for a in range(first, last, GROUP):
        b = min(a + GROUP, last)
        yield a, b, {name: value[a:b] for name, value in weights.items()} | _logits(lm_, sae, a, b) | nearest_.columns(a, b)
        bar.advance(b - a)


def _seen(found: Found, together: Coactivation, first: int, last: int) -> dict:
    """What the corpus says of features first .. last - 1."""
    block = found.state.block(first, last)
    return _activity(block, first, found.rows) | _tokens(block, found.tokens.tokens_NT.reshape(-1), first) | \
        _together(together, first, last)


def write(path: Path, parts: list[Path], vocabulary: list[bytes], found: Found) -> dict:
    """Writes `features.parquet`, `examples.parquet` and `vocabulary.parquet`; returns the totals of the manifest. In memory: 256
    features. parts: `write_parts`.
    """
    examples, windows = found.examples, found.windows
    borders = np.searchsorted(examples.feature, np.arange(0, found.state.features + GROUP, GROUP))
    with disk_errors(path), _writer(path / FEATURES, FEATURE_SCHEMA) as features_file, \
            _writer(path / EXAMPLES, example_schema(windows.window)) as examples_file:
        for rows in itertools.chain.from_iterable(map(_row_groups, parts)):
            features_file.write_table(rows, row_group_size=GROUP)
        for part in itertools.starmap(slice, itertools.pairwise(borders)):
            examples_file.write_table(_examples(examples, windows, part), row_group_size=1 << 30)
        words = pa.table({"text": [*map(text_of, vocabulary)], "bytes": vocabulary})
        pq.write_table(words, path / f".{VOCABULARY}.tmp", compression="zstd")
    for name in (FEATURES, EXAMPLES, VOCABULARY):
        (path / f".{name}.tmp").rename(path / name)
    return _totals(found.state, found.tokens, found.rows, len(examples.row))


def _made(part: Path, source: dict) -> bool:
    """Whether a part is there. Raises `FeatureIndexError` for one of an index of something else."""
    if not part.is_file():
        return False
    with _reading(part):
        noted = (pq.read_schema(part).metadata or {}).get(_SOURCE, b"{}")
    check_part(part, json.loads(noted), source)
    return True


def _row_groups(part: Path) -> Iterator[pa.Table]:
    with _reading(part):
        file = pq.ParquetFile(part)
        for group in range(file.num_row_groups):
            yield file.read_row_group(group)


@contextlib.contextmanager
def _reading(part: Path):
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise FeatureIndexError(f"{part}: not readable ({' '.join(str(error).split())[:200]}); delete it, and run saejax "
                                "features again") from error


def write_manifest(path: Path, values: dict, *, progress: bool) -> None:
    """Digests of the files, and the manifest over them: an index is there when this is."""
    with Progress("index, digests", sum((path / name).stat().st_size for name in FILES), unit="B", enabled=progress) as bar:
        files = {name: digests(path / name, bar.advance) for name in FILES}
    values = values | {"files": files}
    write_json(path / MANIFEST, values | {"sha256": manifest_digest(values)})


def _writer(file: Path, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(file.with_name(f".{file.name}.tmp"), schema, compression="zstd")


def _activity(block: FeatureState, first: int, rows: int) -> dict:
    fired = np.asarray(block.fired, np.int64)
    total = np.asarray(block.total, np.float64) + np.asarray(block.total_low, np.float64)
    top = np.asarray(bits.code(np.asarray(block.max)))
    edges = bits.code_edge(top[:, None] + 1 - np.arange(LOG_BINS))  # upper end of every bin; the last goes down to 0
    whole = 2.0 ** (np.asarray(bits.exponent(np.asarray(block.max)), np.float64) - 126)
    return {"feature": np.arange(first, first + len(fired), dtype=np.int32), "fired": fired, "density": fired / max(rows, 1),
            "mean": np.divide(total, fired, out=np.zeros(len(fired)), where=fired > 0), "max": block.max,
            "log_edges": list(edges), "log_counts": list(np.asarray(block.log_hist, np.int64)),
            "linear_width": whole / block.lin_hist.shape[1], "linear_counts": list(np.asarray(block.lin_hist, np.int64)),
            "interval_counts": list(interval_counts(block).astype(np.float32))}


def _weights(sae: SAE) -> dict[str, np.ndarray]:
    """Numbers of all features that their weights alone give."""
    with jax.set_mesh(sae.mesh):
        norms = jax.jit(lambda W: jnp.linalg.norm(W.astype(jnp.float32), axis=1))
        found = {"decoder_norm": norms(sae.params.W_dec), "encoder_norm": norms(sae.params.W_enc), "bias": sae.params.b_enc}
        return {name: sharding.to_host(value) for name, value in found.items()}


def _tokens(block: FeatureState, tokens_N: np.ndarray, first: int) -> dict:
    count_F, *columns = top_tokens(block, tokens_N, first)
    names = "token_ids", "token_shares", "token_means"
    return {name: _lists(count_F, column) for name, column in zip(names, columns, strict=True)}


def _lists(count_F: np.ndarray, values: np.ndarray) -> pa.ListArray:
    """Of each feature so many of the values, one behind the other."""
    of = pa.int32() if values.dtype.kind == "i" else pa.float32()
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(count_F)]), pa.int32()),
                                    pa.array(values.reshape(-1)).cast(of, safe=False))


def _logits(lm_: LM, sae: SAE, first: int, last: int) -> dict:
    found = logits.logit_effects(lm_, sae, first, last, LOGITS)
    if found is None:
        return {"logit_ids": [[]] * (last - first), "logit_effects": [[]] * (last - first)}
    return {"logit_ids": list(found[0]), "logit_effects": list(found[1])}


@dataclass(frozen=True)
class _Nearest:
    """Of the chosen features of a part the nearest by decoder: [S, NEAR] each."""

    number_S: np.ndarray
    ids: np.ndarray
    cosines: np.ndarray

    @classmethod
    def of(cls, sae: SAE, chosen_F: np.ndarray, first: int, last: int) -> "_Nearest":
        number_S = first + np.flatnonzero(chosen_F[first:last])
        near = [np.zeros((0, NEAR), np.int32)], [np.zeros((0, NEAR), np.float32)]
        for start in range(0, len(number_S), GROUP):
            mine = number_S[start:start + GROUP]
            queries = logits.rows_at(sae, sae.params.W_dec, np.resize(mine, GROUP))[:len(mine)]  # one shape, one compilation
            for column, found in zip(near, nearest(sae.params.W_dec, queries, NEAR, sae.mesh, own=mine), strict=True):
                column.append(found)
        return cls(number_S, *(np.concatenate(column[min(1, len(column) - 1):]) for column in near))

    def columns(self, first: int, last: int) -> dict:
        begin, end = np.searchsorted(self.number_S, (first, last))
        count_F = np.bincount(self.number_S[begin:end] - first, minlength=last - first) * self.ids.shape[1]
        return {"cosine_ids": _lists(count_F, self.ids[begin:end]), "cosine_scores": _lists(count_F, self.cosines[begin:end])}


def _together(pairs: Coactivation, first: int, last: int) -> dict:
    count_F, *columns = pairs.of(first, last, NEAR)
    names = "firing_ids", "firing_scores", "firing_support"
    return {name: _lists(count_F, column) for name, column in zip(names, columns, strict=True)}


def _examples(examples: Examples, windows: Windows, part: slice) -> pa.Table:
    schema = example_schema(windows.window)
    acts = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(windows.acts[part]).reshape(-1)), windows.window)
    return pa.table({"feature": examples.feature[part], "interval": examples.interval[part], "value": examples.value[part],
                     "context": windows.context_E[part], "position": windows.position_E[part].astype(np.int32),
                     "start": windows.start_E[part].astype(np.int32), "acts": acts}, schema=schema)


def _totals(state: SavedState, tokens: Tokens, rows: int, examples: int) -> dict:
    fired = np.asarray(state.fired, np.int64)
    share = np.log10(np.clip(fired[fired > 0] / max(rows, 1), 10.0 ** LOG10_EDGES[0], 1.0))
    return {"contexts": len(tokens.tokens_NT), "rows": tokens.tokens_NT.size, "kept_rows": rows, "examples": examples,
            "alive": int((fired > 0).sum()), "dead": int((fired == 0).sum()), "l0": float(fired.sum() / max(rows, 1)),
            "density_histogram": {"log10_edges": list(LOG10_EDGES),
                                  "counts": np.histogram(share, LOG10_EDGES)[0].tolist(), "never": int((fired == 0).sum())}}
