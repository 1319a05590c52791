"""The tables of an index, written block by block of features, and its manifest."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saejax.base.logs import Progress
from saejax.base.storage import disk_errors, write_json
from saejax.base.verified import digests
from saejax.features.index import bits, logits
from saejax.features.index.corpus import Tokens
from saejax.features.index.examples import Examples, interval_counts, top_tokens
from saejax.features.index.neighbours import Coactivation, nearest
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
from saejax.features.index.state import LOG_BINS, FeatureState
from saejax.features.index.windows import Windows
from saejax.lm import LM
from saejax.lm.token_text import text_of
from saejax.sae.inference import SAE

NEAR, LOGITS = 10, 10
LOG10_EDGES = tuple(-7 + 0.5 * i for i in range(15))  # of the density histogram, as evaluation has it


@dataclass(frozen=True)
class Found:
    """Examples of all features and the activations around them."""

    examples: Examples
    windows: Windows


def blocks(sae: SAE, lm_: LM, *, progress: bool) -> Iterator[tuple[int, int, dict]]:
    """(first, last, columns) of blocks of 256 features: what dictionary and model alone say of them. All collectives of writing
    the tables are in here, so every process goes through it to its end, in step.
    """
    with Progress("index, tables", sae.cfg.d_sae, unit="feature", enabled=progress) as bar:
        for first in range(0, sae.cfg.d_sae, GROUP):
            last = min(first + GROUP, sae.cfg.d_sae)
            yield first, last, _weights(sae, first, last) | _logits(lm_, sae, first, last) | _cosines(sae, first, last)
            bar.advance(last - first)


def write(path: Path, dictionary: Iterable[tuple[int, int, dict]], vocabulary: list[bytes], state: FeatureState, found: Found,
          tokens: Tokens) -> dict:
    """Writes `features.parquet`, `examples.parquet` and `vocabulary.parquet`; returns the totals of the manifest. In memory: 256
    features. dictionary: `blocks`.
    """
    examples, windows = found.examples, found.windows
    rows = int(tokens.keep_NT.sum())
    pairs = Coactivation(state.sketch, state.fired, rows)
    tokens_N = tokens.tokens_NT.reshape(-1)
    borders = np.searchsorted(examples.feature, np.arange(0, len(state.max) + GROUP, GROUP))
    with disk_errors(path), _writer(path / FEATURES, FEATURE_SCHEMA) as features_file, \
            _writer(path / EXAMPLES, example_schema(windows.window)) as examples_file:
        for number, (first, last, columns) in enumerate(dictionary):
            block = jax.tree.map(lambda x, a=first, b=last: np.asarray(x[a:b]), state)
            columns |= _activity(block, first, rows) | _tokens(block, tokens_N, first) | _together(pairs, first, last)
            features_file.write_table(pa.table(columns, schema=FEATURE_SCHEMA), row_group_size=GROUP)
            part = slice(borders[number], borders[number + 1])
            examples_file.write_table(_examples(examples, windows, part), row_group_size=1 << 30)
        words = pa.table({"text": [*map(text_of, vocabulary)], "bytes": vocabulary})
        pq.write_table(words, path / f".{VOCABULARY}.tmp", compression="zstd")
    for name in (FEATURES, EXAMPLES, VOCABULARY):
        (path / f".{name}.tmp").rename(path / name)
    return _totals(state, tokens, rows, len(examples.row))


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


def _weights(sae: SAE, first: int, last: int) -> dict:
    decoder, encoder, bias = (logits.rows_of(sae, x, first, last) for x in (sae.params.W_dec, sae.params.W_enc, sae.params.b_enc))
    return {"decoder_norm": np.linalg.norm(decoder, axis=1).astype(np.float32),
            "encoder_norm": np.linalg.norm(encoder, axis=1).astype(np.float32), "bias": bias}


def _tokens(block: FeatureState, tokens_N: np.ndarray, first: int) -> dict:
    found = top_tokens(block, tokens_N, first)
    return {name: [[entry[i] for entry in feature] for feature in found]
            for i, name in enumerate(("token_ids", "token_shares", "token_means"))}


def _logits(lm_: LM, sae: SAE, first: int, last: int) -> dict:
    found = logits.logit_effects(lm_, sae, first, last, LOGITS)
    if found is None:
        return {"logit_ids": [[]] * (last - first), "logit_effects": [[]] * (last - first)}
    return {"logit_ids": list(found[0]), "logit_effects": list(found[1])}


def _cosines(sae: SAE, first: int, last: int) -> dict:
    queries = logits.rows_of(sae, sae.params.W_dec, first, last)
    ids, cosines = nearest(sae.params.W_dec, queries, NEAR, sae.mesh, own=np.arange(first, last))
    return {"cosine_ids": list(ids), "cosine_scores": list(cosines)}


def _together(pairs: Coactivation, first: int, last: int) -> dict:
    together = pairs.of(first, last, NEAR)
    return {name: [[entry[i] for entry in feature] for feature in together]
            for i, name in enumerate(("firing_ids", "firing_scores", "firing_support"))}


def _examples(examples: Examples, windows: Windows, part: slice) -> pa.Table:
    schema = example_schema(windows.window)
    acts = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(windows.acts[part]).reshape(-1)), windows.window)
    return pa.table({"feature": examples.feature[part], "interval": examples.interval[part], "value": examples.value[part],
                     "context": windows.context_E[part], "position": windows.position_E[part].astype(np.int32),
                     "start": windows.start_E[part].astype(np.int32), "acts": acts}, schema=schema)


def _totals(state: FeatureState, tokens: Tokens, rows: int, examples: int) -> dict:
    fired = np.asarray(state.fired, np.int64)
    share = np.log10(np.clip(fired[fired > 0] / max(rows, 1), 10.0 ** LOG10_EDGES[0], 1.0))
    return {"contexts": len(tokens.tokens_NT), "rows": tokens.tokens_NT.size, "kept_rows": rows, "examples": examples,
            "alive": int((fired > 0).sum()), "dead": int((fired == 0).sum()), "l0": float(fired.sum() / max(rows, 1)),
            "density_histogram": {"log10_edges": list(LOG10_EDGES),
                                  "counts": np.histogram(share, LOG10_EDGES)[0].tolist(), "never": int((fired == 0).sum())}}
