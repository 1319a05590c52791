"""The story of an index: tokens, states of all features, examples, their surroundings, tables, manifest.

The corpus is read twice: what the examples are is known at the end of the first pass, and what a feature does at the tokens
around them is taken in the second. Both passes save where they stand every so many rows or seconds; an interrupted build goes on
there and ends in the same files.
"""

import dataclasses
import functools
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from saejax.base import lease, sharding
from saejax.base.errors import FeatureIndexError, FormatError, NonFiniteError
from saejax.base.logs import Progress
from saejax.base.records import UNKNOWN
from saejax.base.storage import barrier, decided, is_writer, read_json, write_json
from saejax.features.index import accumulate, neighbours, saved, tables
from saejax.features.index.corpus import Corpus, Tokens
from saejax.features.index.examples import BEFORE, INTERVALS, WINDOW, Examples, choose
from saejax.features.index.lookup import Lookup
from saejax.features.index.reader import (
    FEATURES,
    KIND,
    MANIFEST,
    SCHEMA_VERSION,
    FeatureIndex,
    check_belongs,
    read_manifest,
    sae_fingerprint,
)
from saejax.features.index.saved import SavedState
from saejax.features.index.source import check_part
from saejax.features.index.windows import Windows
from saejax.lm import LM
from saejax.sae.inference import SAE

PROGRESS = "progress"
_BLOCK = 4096  # features whose examples are chosen at once


@dataclass(frozen=True)
class BuildOptions:
    """rows: of a batch, about. save_rows, save_seconds: between two savings at most, but for the batch under way. None of them
    changes the index (`total` in its last bits). neighbours: whose neighbours by decoder it has (`neighbours.CHOICES`).
    """

    rows: int = accumulate.ROWS
    save_rows: int = 1 << 20
    save_seconds: float = 600.0
    neighbours: str = neighbours.AUTO
    progress: bool = True


def build(path: str | Path, sae: SAE, corpus: Corpus, lm_: LM, options: BuildOptions = BuildOptions()) -> FeatureIndex:
    """Builds the index of an SAE over a corpus at `path`, or opens the one that is there; every process must call it.

    Raises `FeatureIndexError` when the directory holds an index of something else, `FormatError` when SAE and corpus differ in
    width, `NonFiniteError` for rows that are not finite.
    """
    path = Path(path)
    sae = sae if sae.mesh is not None else SAE(sae.params, sae.cfg, sharding.single_device_mesh())
    sharding.check_features(sae.cfg.d_sae, sae.mesh)
    corpus = _of_model(corpus, lm_)
    source = {"sae": _describe(sae), "corpus": corpus.describe(),
              "settings": {"window": min(WINDOW, corpus.context), "before": BEFORE, "intervals": INTERVALS}}
    near = neighbours.resolved(options.neighbours, sae.cfg.d_sae)
    if (path / MANIFEST).is_file():
        return _reopened(path, source, sae, lm_, None if options.neighbours == neighbours.AUTO else near)
    with lease.writing(path):
        _write(path, source, sae, corpus, lm_, dataclasses.replace(options, neighbours=near))
    return FeatureIndex.open(path, sae=sae, lm_=lm_)


def _write(path: Path, source: dict, sae: SAE, corpus: Corpus, lm_: LM, options: BuildOptions) -> None:
    _claim(path, source)
    tokens = Tokens.write(path, corpus)
    made = _Passes(path / PROGRESS, source, sae, corpus, tokens, options)
    state = _states(made)
    examples = _examples(state, options.progress)
    windows = _surroundings(made, examples)
    found, near = tables.Found(state, examples, windows, tokens, source), options.neighbours
    parts = tables.write_parts(path / PROGRESS, sae, lm_, found, near, progress=options.progress)
    if is_writer():
        totals = tables.write(path, parts, lm_.tokenizer.token_bytes.pieces, found)
        lease.confirm()
        values = {"kind": KIND, "schema_version": SCHEMA_VERSION, **source, "totals": totals}
        values["settings"] = source["settings"] | {"neighbours": near}
        tables.write_manifest(path, values, progress=options.progress)
    barrier("saejax_index_written")
    if is_writer():
        shutil.rmtree(path / PROGRESS)


def is_index(path: Path) -> bool:
    """True for the directory of an index, finished or not."""
    return (Path(path) / MANIFEST).is_file() and (Path(path) / FEATURES).is_file() or (Path(path) / PROGRESS).is_dir()


def _describe(sae: SAE) -> dict:
    c = sae.cfg
    return {"fingerprint": sae_fingerprint(sae), "kind": c.kind, "k": c.k, "shape": c.spec.shape, "d_in": c.d_in,
            "d_sae": c.d_sae, "hookpoints": list(c.hookpoints), "targets": list(c.targets), "model": Path(c.model).name}


def _of_model(corpus: Corpus, lm_: LM) -> Corpus:
    """The corpus, made with this model. One that does not say its model takes this one's name, if it has all token ids."""
    if corpus.model_digest == UNKNOWN:
        largest = max(int(tokens_NT.max()) for tokens_NT, _ in corpus.make())
        if largest >= lm_.cfg.vocab_size:
            raise FeatureIndexError(f"the corpus holds token id {largest}, {lm_.name} has 0 to {lm_.cfg.vocab_size - 1}; give "
                                    "the model whose activations these are")
        return dataclasses.replace(corpus, model_digest=lm_.digest, tokenizer_digest=lm_.tokenizer.digest)
    for what, ours, theirs in (("language model", lm_.digest, corpus.model_digest),
                               ("tokenizer", lm_.tokenizer.digest, corpus.tokenizer_digest)):
        if ours != theirs:
            raise FeatureIndexError(f"the corpus was made with another {what} (digest {theirs[:12]}, given {ours[:12]}); give "
                                    "the config.lm.model that the store was harvested with")
    return corpus


def _reopened(path: Path, source: dict, sae: SAE, lm_: LM, near: str | None) -> FeatureIndex:
    manifest = read_manifest(path)
    check_belongs(path, manifest, sae, lm_)
    if manifest["corpus"]["digest"] != source["corpus"]["digest"]:
        raise FeatureIndexError(f"{path}: was built over another corpus ({manifest['corpus']['kind']}); choose another "
                                "directory, or build it anew (rebuild)")
    has = manifest["settings"].get("neighbours", neighbours.ALL)
    if near not in (None, has):
        raise FeatureIndexError(f"{path}: was built with neighbours={has}; choose another directory, or build it anew (rebuild)")
    return FeatureIndex.open(path, sae=sae, lm_=lm_)


def _claim(path: Path, source: dict) -> None:
    """Makes the directory this build's, or refuses one that another build has begun."""
    file = path / PROGRESS / "source.json"
    if file.is_file():
        check_part(file, read_json(file, FeatureIndexError), source)
    elif is_writer():
        if path.is_dir() and any(file for file in path.iterdir() if not file.name.startswith(lease.FILE)):
            raise FeatureIndexError(f"{path}: is not empty and holds no index; choose another directory")
        write_json(file, source)
    barrier("saejax_index_claimed")


@dataclass(frozen=True)
class _Batch:
    """Whole contexts on the mesh; `keep` is False at masked tokens and in what was added to fill the shape."""

    first: int        # context
    contexts: int     # real ones
    x_BD: jax.Array
    keep_B: jax.Array


def _batches(sae: SAE, corpus: Corpus, tokens: Tokens, size: int, first: int) -> Iterator[_Batch]:
    """Batches of `size` contexts from context `first` on; the next is read while the device works on one."""
    total, T = len(tokens.tokens_NT), corpus.context
    x_where, keep_where = sharding.sharding(sae.mesh, "rows", "d_in"), sharding.sharding(sae.mesh, "rows")

    def read(start: int) -> _Batch:
        stop = min(start + size, total)
        x_BD = corpus.activations(start * T, stop * T, np.asarray(tokens.tokens_NT[start:stop]))
        keep_B = np.asarray(tokens.keep_NT[start:stop]).reshape(-1)
        if x_BD.shape[1] != sae.cfg.d_in:
            raise FormatError(f"the SAE expects activations of width {sae.cfg.d_in}, the corpus has {x_BD.shape[1]}")
        _check_finite(x_BD, keep_B, start, T)
        room = (start + size - stop) * T
        x_BD, keep_B = np.pad(x_BD, ((0, room), (0, 0))), np.pad(keep_B, (0, room))
        return _Batch(start, stop - start, sharding.place(x_BD, x_where), sharding.place(keep_B, keep_where))

    starts = range(first, total, size)
    with ThreadPoolExecutor(1, "saejax-index") as pool:
        following = pool.submit(read, starts[0]) if starts else None
        for start in starts:
            batch = following.result()
            following = pool.submit(read, start + size) if start + size < total else None
            yield batch


def _check_finite(x_BD: np.ndarray, keep_B: np.ndarray, start: int, context: int) -> None:
    exponents = np.uint16(0x7F80)
    bad_B = ((x_BD.view(np.uint16) & exponents) == exponents).any(1) if x_BD.dtype == ml_dtypes.bfloat16 else \
        ~np.isfinite(x_BD).all(1)
    bad = np.flatnonzero(bad_B & keep_B)
    if bad.size:
        place = divmod(int(bad[0]), context)
        raise NonFiniteError(f"{bad.size} rows to index have NaN or Inf, the first in context {start + place[0]} at token "
                             f"{place[1]}; harvest with config.lm.dtype='float32'")


@dataclass(frozen=True)
class _Passes:
    """What both passes over the corpus work with; progress: where they save."""

    progress: Path
    source: dict
    sae: SAE
    corpus: Corpus
    tokens: Tokens
    options: BuildOptions

    @functools.cached_property
    def batch(self) -> int:
        """Contexts of a batch."""
        return accumulate.batch_contexts(self.sae, self.corpus.context, len(self.tokens.tokens_NT), self.options.rows)

    def batches(self, name: str, done: int) -> Iterator[_Batch]:
        """From context `done` on; how far the work is is shown by that name."""
        total, T = len(self.tokens.tokens_NT), self.corpus.context
        with Progress(f"index, {name}", total * T, initial=done * T, enabled=self.options.progress) as bar:
            for batch in _batches(self.sae, self.corpus, self.tokens, self.batch, done):
                yield batch
                bar.advance(batch.contexts * T)


class Savings:
    """When a pass saves: every so many rows or seconds, whichever is first."""

    def __init__(self, rows: int, seconds: float):
        self._rows, self._seconds = rows, seconds
        self.begin()

    def begin(self) -> None:
        """Everything so far is saved."""
        self._unsaved, self._since = 0, time.monotonic()

    def due(self, rows: int) -> bool:
        """Whether to save after so many rows more: the same in every process, by the clock of one. A small collective."""
        self._unsaved += rows
        return self._unsaved >= self._rows or decided(time.monotonic() - self._since >= self._seconds)


def _states(made: _Passes) -> SavedState:
    """First pass: the state of all features, as it was saved at last."""
    T, sae, options, total = made.corpus.context, made.sae, made.options, len(made.tokens.tokens_NT)
    last = SavedState.open(made.progress, made.source)
    if last is not None and last.contexts == total:
        return last
    step = accumulate.make_step(sae, T, made.batch)
    state = accumulate.empty_state(sae.cfg.d_sae, sae.mesh) if last is None else last.placed(sae.mesh)
    savings = Savings(options.save_rows, options.save_seconds)
    for batch in made.batches("pass 1", 0 if last is None else last.contexts):
        with jax.set_mesh(sae.mesh):
            state = step(state, sae.params, batch.x_BD, batch.keep_B, np.uint32(batch.first * T))
        jax.block_until_ready(state)  # else batches pile up on the device, and the clock says nothing
        done = batch.first + batch.contexts
        if savings.due(batch.contexts * T) or done == total:
            last = saved.save(made.progress, state, done, made.source)
            savings.begin()
    return last


def _examples(state: SavedState, progress: bool) -> Examples:
    parts = []
    with Progress("index, examples", state.features, unit="feature", enabled=progress) as bar:
        for first in range(0, state.features, _BLOCK):
            stop = min(first + _BLOCK, state.features)
            parts.append(choose(state.block(first, stop), first))
            bar.advance(stop - first)
    return Examples(*(np.concatenate([getattr(p, name) for p in parts]) for name in Examples.__dataclass_fields__))


def _surroundings(made: _Passes, examples: Examples) -> Windows:
    """Second pass: the activations around every example."""
    T, options, total = made.corpus.context, made.options, len(made.tokens.tokens_NT)
    windows = Windows.open(made.progress, examples, T, made.source)
    lookup, savings = Lookup.of(made.sae, windows.window), Savings(options.save_rows, options.save_seconds)
    for batch in made.batches("pass 2", windows.done):
        with jax.set_mesh(made.sae.mesh):
            windows.fill(lookup, made.sae, batch.x_BD, batch.keep_B, batch.first, batch.first + batch.contexts)
        if savings.due(batch.contexts * T) or windows.done == total:
            windows.save()
            savings.begin()
    return windows
