"""Tokens -> language model with taps -> activation store.

The device works on batch i + 1 while the host copies batch i into the buffer of a shard, and a thread writes the
shard before; two shards are in memory. Process p of P writes shards p, p + P, ...; all of them pack the same text, so
that a row's number, and with it every byte of the store, does not depend on P. An interrupted harvest goes on at the
first missing shard: the text continues from the state in the record of the shard before.
"""

import math
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from saejax import lm
from saejax.base import assets, lease
from saejax.base.errors import ConfigError, StoreError
from saejax.base.logs import Progress, say
from saejax.base.preemption import Preempted, Preemption
from saejax.base.records import UNKNOWN
from saejax.base.storage import barrier, is_writer, together
from saejax.config import Config
from saejax.data import sources as src
from saejax.data import text
from saejax.data.manifest import StoreSpec
from saejax.data.shards import chunk_rows_of
from saejax.data.sources import Sources
from saejax.data.store import SPEC, Store, finished_shards, is_complete, model_name, read_spec
from saejax.data.text import PackedText, TextState
from saejax.data.writer import StoreWriter
from saejax.lm import LM, Files


def harvest(config: Config, lm_: LM | None = None) -> Store:
    """Makes the activation store of a config, or opens it when it is there; every process must call it.

    A complete store that matches is opened at once. A partial one is finished, byte for byte as if never interrupted.
    Several hookpoints take one pass; layers above the highest are not computed.

    Raises `StoreError` (the directory belongs to another config; lists the differences; or to activations made
    elsewhere), `ConfigError` (no model), `HookpointError`, `TextError`,
    `NonFiniteError` (rows named, their shard not written), `DiskError`, `LeaseError` (another job writes this store),
    `Preempted` after SIGTERM or Ctrl-C (whole shards are kept).
    """
    path = Path(config.harvest.store)
    if (path / SPEC).is_file() and read_spec(path).made_elsewhere:
        raise StoreError(f"{path}: holds activations made elsewhere, there is nothing to harvest; train on them (saejax train), "
                         "or choose another config.harvest.store")
    if config.lm.model == UNKNOWN:
        raise ConfigError("config.lm.model: 'unknown' is for activations made elsewhere; name the model to harvest from")
    sources = src.resolve(config.text)
    if is_complete(path):
        return _open_matching(path, config, sources, lm_)
    lm_ = lm_ or lm.load(config.lm.model, revision=config.lm.revision, dtype=config.lm.dtype, mesh=lm_mesh(config))
    spec = store_spec(config, lm_, sources)
    with lease.writing(path):
        writer = StoreWriter(path, spec)
        packed = PackedText(config.text, lm_.tokenizer, seed=config.seed_of_data, sources=sources)
        n_contexts = _fill(writer, packed, _Capture(lm_, config), config)
        barrier("saejax_harvest_written")
        with together("saejax_harvest_final"):
            if is_writer():
                writer.finalize(n_contexts)
    return Store.open(path)


def store_spec(config: Config, lm_: LM | Files, sources: Sources | None = None) -> StoreSpec:
    """The `StoreSpec` of a config. Raises `HookpointError` for a hookpoint that the model does not have."""
    h = config.harvest
    widths = tuple((name, lm.width_of(lm_.cfg, name)) for name in dict.fromkeys(h.hookpoints))
    return StoreSpec(model_digest=lm_.digest, tokenizer_digest=lm_.tokenizer.digest, hookpoints=widths,
                     **_cheap_part(config, sources or src.resolve(config.text)))


def _cheap_part(config: Config, sources: Sources) -> dict:
    """The fields of the spec that need no language model."""
    h = config.harvest
    shards = math.ceil(h.tokens / (config.text.context * h.shard_contexts))
    return {"model": model_name(config.lm.model), "lm_dtype": config.lm.dtype,
            "text": text.describe(config.text, sources, config.seed_of_data),
            "context": config.text.context, "shard_contexts": h.shard_contexts,
            "chunk_rows": chunk_rows_of(config.text.context * h.shard_contexts),
            "target_contexts": shards * h.shard_contexts}


def _pinned(config: Config) -> bool:
    """True where the name alone says which weights these are: a preset, or a hub revision that is a commit.

    Of a local file or directory it does not: `lm.load` ignores the revision there.
    """
    if config.lm.model in assets.MODELS:
        return True
    path = Path(config.lm.model).expanduser()
    local = path.suffix == ".gguf" or path.exists()
    return not local and bool(re.fullmatch(r"[0-9a-f]{40}", config.lm.revision or ""))


def _open_matching(path: Path, config: Config, sources: Sources, lm_: LM | None) -> Store:
    store = Store.open(path)
    if lm_ is not None or not _pinned(config):
        wanted = store_spec(config, lm_ or lm.files(config.lm.model, config.lm.revision), sources)
    else:
        widths = dict(store.spec.hookpoints)
        names = dict.fromkeys(config.harvest.hookpoints)
        wanted = StoreSpec(model_digest=store.spec.model_digest, tokenizer_digest=store.spec.tokenizer_digest,
                           hookpoints=tuple((name, widths.get(name, 0)) for name in names),
                           **_cheap_part(config, sources))
    differences = store.spec.differences(wanted)
    if differences:
        raise StoreError(f"{path}: was harvested with another config ({'; '.join(differences)}); choose another "
                         "config.harvest.store or delete this one")
    return store


def lm_mesh(config: Config) -> Mesh:
    """The mesh of `config.lm.model_parallel` over this process's devices. Raises `LMError` when it does not fit them."""
    return lm.make_mesh(model=config.lm.model_parallel, rows=config.lm.batch_contexts)


class _Capture:
    """The compiled forward pass up to the highest hookpoint, on the language model's mesh."""

    def __init__(self, lm_: LM, config: Config):
        self.names, self.batch = tuple(dict.fromkeys(config.harvest.hookpoints)), config.lm.batch_contexts
        mesh = lm_mesh(config)
        self._rows = NamedSharding(mesh, PartitionSpec("data"))
        self._model = lm.place(lm_.model, mesh)
        # Rounding on the device halves what crosses to the host.
        self._run = jax.jit(self._forward, out_shardings=self._rows)

    def _forward(self, model: lm.Decoder, tokens_BT: jax.Array) -> dict[str, jax.Array]:
        return {name: x.astype(jnp.bfloat16) for name, x in lm.capture(model, tokens_BT, self.names).items()}

    def __call__(self, tokens_NT: np.ndarray) -> dict[str, jax.Array]:
        """bfloat16 [batch, T, D] per hookpoint of up to `batch` contexts, padded; dispatched, not waited for."""
        tokens_BT = np.zeros((self.batch, tokens_NT.shape[1]), np.int32)
        tokens_BT[:len(tokens_NT)] = tokens_NT
        return self._run(self._model, jax.device_put(tokens_BT, self._rows))


@dataclass(frozen=True)
class _Shard:
    """What this process does about one shard: nothing but count it (`tokens_NT` is None), or harvest it."""

    number: int
    contexts: int
    tokens_NT: np.ndarray | None = None
    keep_NT: np.ndarray | None = None
    text_state: dict | None = None


def _shards(writer: StoreWriter, packed: PackedText, process: int, n_processes: int) -> Iterator[_Shard]:
    """Every shard of the store in order, up to the end of the text."""
    full = writer.spec.shard_contexts
    for number in range(writer.spec.target_shards):
        record = writer.record(number)
        if record is not None:
            state = TextState(**record.text_state)
            if state != packed.state:
                packed.seek(state)
            shard = _Shard(number, record.contexts)
        else:
            tokens_NT = packed.take(full)
            shard = _Shard(number, len(tokens_NT))
            if number % n_processes == process and len(tokens_NT):
                shard = _Shard(number, len(tokens_NT), tokens_NT, packed.keep(tokens_NT), packed.state.to_json())
        yield shard
        if shard.contexts < full:
            return


def _one_ahead(items: Iterator[_Shard], pool: ThreadPoolExecutor) -> Iterator[_Shard]:
    """The items, the next one being made in a thread: tokenising must not keep the device waiting."""
    following = pool.submit(next, items, None)
    while (item := following.result()) is not None:
        following = pool.submit(next, items, None)
        yield item


def _fill(writer: StoreWriter, packed: PackedText, capture: _Capture, config: Config) -> int:
    """Writes this process's missing shards. Returns the number of contexts in the whole store."""
    spec, process, n_processes = writer.spec, jax.process_index(), jax.process_count()
    mine = len(writer.missing_shards(process, n_processes))
    title = "harvest" if n_processes == 1 else f"harvest (process 1 of {n_processes})"
    total = 0
    with ThreadPoolExecutor(1) as text_pool, ThreadPoolExecutor(1) as disk_pool, Preemption() as preemption, \
            Progress(title, mine * spec.shard_rows, enabled=config.log.progress) as bar:
        pipeline = _Pipeline(writer, capture, disk_pool, bar, preemption)
        for shard in _one_ahead(_shards(writer, packed, process, n_processes), text_pool):
            if preemption.requested(shard.number):
                pipeline.drain()
                raise _stopped(writer)
            total += shard.contexts
            if shard.tokens_NT is not None:
                pipeline.run(shard)
        pipeline.drain()
    if packed.dropped_tokens:
        say(f"harvest: the text ended after {total * spec.context} tokens; {packed.dropped_tokens} that fill no "
            "context dropped")
    return total


def _stopped(writer: StoreWriter) -> Preempted:
    there = len(finished_shards(writer.path))
    return Preempted(f"{writer.path}: stopped on request with {there} of {writer.spec.target_shards} shards written; start the "
                     "same command again to go on")


class _Pipeline:
    """Device, copy and disk at work at the same time, across the borders of shards, with two shards in host memory."""

    def __init__(self, writer: StoreWriter, capture: _Capture, pool: ThreadPoolExecutor, bar: Progress, preemption: Preemption):
        self._writer, self._capture, self._pool, self._bar, self._preemption = writer, capture, pool, bar, preemption
        self._buffers = [{name: np.empty((writer.spec.shard_contexts, writer.spec.context, width), ml_dtypes.bfloat16)
                          for name, width in writer.spec.hookpoints} for _ in range(2)]
        self._under_way: deque = deque()
        self._writing: Future | None = None

    def run(self, shard: _Shard) -> None:
        """Dispatches the batches of a shard; the one before the last dispatched is copied to the host meanwhile."""
        self._buffers.reverse()
        acts = {name: x[:shard.contexts] for name, x in self._buffers[0].items()}
        for start in range(0, shard.contexts, self._capture.batch):
            if self._preemption.asked_alone:  # a shard may take minutes; what is done of it is given up
                self._finish()
                raise _stopped(self._writer)
            tokens = shard.tokens_NT[start:start + self._capture.batch]
            self._under_way.append((shard, acts, start, len(tokens), self._capture(tokens)))
            if len(self._under_way) > 1:
                self._land()

    def drain(self) -> None:
        """Waits until everything is on the disk."""
        while self._under_way:
            self._land()
        self._finish()

    def _land(self) -> None:
        shard, acts, start, n, values = self._under_way.popleft()
        for name, x in values.items():
            acts[name][start:start + n] = np.asarray(x)[:n]
        self._bar.advance(n * shard.tokens_NT.shape[1])
        if start + n == shard.contexts:
            self._finish()
            self._writing = self._pool.submit(self._writer.write_shard, shard.number, acts, shard.tokens_NT,
                                              shard.keep_NT, shard.text_state)

    def _finish(self) -> None:
        """Waits for the shard before: its buffer is the next to be filled, and none is written behind one that failed."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None
