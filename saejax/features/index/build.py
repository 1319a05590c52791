"""The story of an index: tokens, states of all features, examples, their surroundings, tables, manifest.

The corpus is read twice: what the examples are is known at the end of the first pass, and what a feature does at the tokens
around them is taken in the second. Both passes save where they stand every `save_rows` rows; an interrupted build goes on there
and ends in the same files.
"""

import dataclasses
import shutil
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
from saejax.base.storage import barrier, is_writer, read_json, replacing, text_sha256, write_json
from saejax.features.index import accumulate, neighbours, tables
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
from saejax.features.index.state import FIELDS, FeatureState
from saejax.features.index.windows import Windows
from saejax.lm import LM
from saejax.sae.inference import SAE

PROGRESS = "progress"
_BLOCK = 4096  # features whose examples are chosen at once


@dataclass(frozen=True)
class BuildOptions:
    """rows: of a batch, about. save_rows: between two savings. Neither changes the index (`total` in its last bits). neighbours:
    whose neighbours by decoder it has (`neighbours.CHOICES`).
    """

    rows: int = accumulate.ROWS
    save_rows: int = 1 << 20
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
    state = _states(path, sae, corpus, tokens, options)
    examples = _examples(state, options.progress)
    windows = _surroundings(path, sae, corpus, tokens, examples, options)
    found, near = tables.Found(state, examples, windows, tokens), options.neighbours
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
    digest = text_sha256(repr(source))
    if file.is_file():
        if read_json(file, FeatureIndexError).get("digest") != digest:
            raise FeatureIndexError(f"{path}: holds the unfinished index of another checkpoint, model or corpus; delete it, or "
                                    "choose another directory")
    elif is_writer():
        if path.is_dir() and any(file for file in path.iterdir() if not file.name.startswith(lease.FILE)):
            raise FeatureIndexError(f"{path}: is not empty and holds no index; choose another directory")
        write_json(file, {"digest": digest})
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


def _states(path: Path, sae: SAE, corpus: Corpus, tokens: Tokens, options: BuildOptions) -> FeatureState:
    """First pass. The state of all features, as host arrays: those that were saved at last."""
    T, mesh = corpus.context, sae.mesh
    done, saved = _saved_state(path)
    total, unsaved = len(tokens.tokens_NT), 0
    if saved is not None and done == total:
        return saved
    size = accumulate.batch_contexts(sae, T, total, options.rows)
    step = accumulate.make_step(sae, T, size)
    state = accumulate.empty_state(sae.cfg.d_sae, mesh) if saved is None else FeatureState(**{
        name: sharding.place(value, sharding.sharding(mesh, "features", *[None] * (value.ndim - 1)))
        for name, value in ((name, getattr(saved, name)) for name in FIELDS)})
    with Progress("index, pass 1", total * T, initial=done * T, enabled=options.progress) as bar, jax.set_mesh(mesh):
        for batch in _batches(sae, corpus, tokens, size, done):
            saved, state = None, step(state, sae.params, batch.x_BD, batch.keep_B, np.uint32(batch.first * T))
            done, unsaved = batch.first + batch.contexts, unsaved + batch.contexts * T
            if unsaved >= options.save_rows or done == total:
                saved, unsaved = _save_state(path, state, done), 0
            bar.advance(batch.contexts * T)
    return saved


def _save_state(path: Path, state: FeatureState, contexts: int) -> FeatureState:
    """One file, by rename: counts and place cannot disagree. The state passes through the host whole (1.9 KB a feature), and is
    returned as it lies there.
    """
    state = jax.tree.map(sharding.to_host, state)
    if is_writer():
        lease.confirm()
        with replacing(path / PROGRESS / "state.npz") as file:
            np.savez(file, contexts=np.int64(contexts), **{name: getattr(state, name) for name in FIELDS})
    return state


def _saved_state(path: Path) -> tuple[int, FeatureState | None]:
    """(contexts done, state as host arrays), from where an interrupted first pass stood."""
    file = path / PROGRESS / "state.npz"
    if not file.is_file():
        return 0, None
    try:
        with np.load(file, allow_pickle=False) as saved:
            return int(saved["contexts"]), FeatureState(**{name: saved[name] for name in FIELDS})
    except (OSError, ValueError, KeyError) as error:
        raise FeatureIndexError(f"{file}: not readable ({' '.join(str(error).split())[:200]}); delete it to begin "
                                "again") from error


def _examples(state: FeatureState, progress: bool) -> Examples:
    parts = []
    with Progress("index, examples", len(state.max), unit="feature", enabled=progress) as bar:
        for first in range(0, len(state.max), _BLOCK):
            block = jax.tree.map(lambda x, a=first: x[a:a + _BLOCK], state)
            parts.append(choose(block, first))
            bar.advance(len(block.max))
    return Examples(*(np.concatenate([getattr(p, name) for p in parts]) for name in Examples.__dataclass_fields__))


def _surroundings(path: Path, sae: SAE, corpus: Corpus, tokens: Tokens, examples: Examples, options: BuildOptions) -> Windows:
    """Second pass: the activations around every example."""
    T = corpus.context
    windows = Windows.open(path / PROGRESS, examples, T)
    size = accumulate.batch_contexts(sae, T, len(tokens.tokens_NT), options.rows)
    lookup = Lookup.of(sae, windows.window)
    total, unsaved = len(tokens.tokens_NT), 0
    with Progress("index, pass 2", total * T, initial=windows.done * T, enabled=options.progress) as bar, jax.set_mesh(sae.mesh):
        for batch in _batches(sae, corpus, tokens, size, windows.done):
            windows.fill(lookup, sae, batch.x_BD, batch.keep_B, batch.first, batch.first + batch.contexts)
            unsaved += batch.contexts * T
            if unsaved >= options.save_rows or windows.done == total:
                windows.save()
                unsaved = 0
            bar.advance(batch.contexts * T)
    return windows
