"""Text -> tokens -> language model with taps -> activation store.

Tokens come first, in the folder `text` of the store (`tokens`): every process makes its share of them, and then any row is read
by its number. Shards are functions of these numbers. Process p of P writes shards p, p + P, ...; every byte of the store is the
same for any P, and an interrupted harvest writes the shards that are missing.

The device works on batch i + 1 while the host copies batch i into the buffer of a shard, and a thread writes the shard before;
two shards are in memory.
"""

import math
import re
from collections import deque
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
from saejax.base.distributed import check_agreement
from saejax.base.errors import ConfigError, Preempted, StoreError
from saejax.base.logs import Progress, say
from saejax.base.preemption import Preemption
from saejax.base.records import UNKNOWN
from saejax.base.storage import barrier, decided, is_writer, patient, together
from saejax.config import Config
from saejax.data import sources as src
from saejax.data import text, token_store, tokens
from saejax.data.manifest import StoreSpec, contexts_of_shard
from saejax.data.shards import chunk_rows_of
from saejax.data.sources import Sources
from saejax.data.store import SPEC, TEXT, Store, finished_shards, is_complete, model_name, read_spec
from saejax.data.token_store import TokenStore
from saejax.data.verify import mend
from saejax.data.writer import StoreWriter
from saejax.lm import LM, Files

_SAME_DATA = "all of them need the same model, text and store: give paths that they share, or copies that are equal"


def harvest(config: Config, lm_: LM | None = None, *, repair: bool = False) -> Store:
    """Makes the activation store of a config, or opens it when it is there; every process must call it.

    A complete store that matches is opened at once. A partial one is finished, byte for byte as if never interrupted; one of the
    same config with fewer tokens grows: its shards stay, but for a last one that was not full. Several hookpoints take one pass;
    layers above the highest are not computed. repair: every byte that is there is checked first, and shards that do not verify
    are written again.

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
    if repair:
        with lease.writing(path), together("saejax_harvest_repair"):
            if is_writer():
                _mend(path)
    if decided(is_complete(path)) and (store := _open_matching(path, config, sources, lm_)) is not None:
        return store
    lm_ = lm_ or lm.load(config.lm.model, revision=config.lm.revision, dtype=config.lm.dtype, mesh=lm_mesh(config))
    spec = store_spec(config, lm_, sources)
    check_agreement({f"the store's {key}": value for key, value in spec.to_json().items()}, _SAME_DATA)
    with lease.writing(path):
        writer = StoreWriter(path, spec)
        tokens = _tokens(path / TEXT, config, lm_, spec.target_contexts, sources)
        n_contexts = min(tokens.contexts, spec.target_contexts)
        _fill(writer, tokens, n_contexts, _Capture(lm_, config), config)
        barrier("saejax_harvest_written")
        with together("saejax_harvest_final"):
            if is_writer():
                patient(lambda: writer.finalize(n_contexts), StoreError)
    return patient(lambda: Store.open(path), StoreError)


def store_spec(config: Config, lm_: LM | Files, sources: Sources | None = None) -> StoreSpec:
    """The `StoreSpec` of a config. Raises `HookpointError` for a hookpoint that the model does not have."""
    h = config.harvest
    widths = tuple((name, lm.width_of(lm_.cfg, name)) for name in dict.fromkeys(h.hookpoints))
    return StoreSpec(model_digest=lm_.digest, tokenizer_digest=lm_.tokenizer.digest, hookpoints=widths,
                     **_cheap_part(config, dict(widths), sources or src.resolve(config.text)))


def _cheap_part(config: Config, widths: dict[str, int], sources: Sources) -> dict:
    """The fields of the spec that need no language model but the widths of the hookpoints."""
    context = config.text.context
    shard_contexts = contexts_of_shard(config.harvest.shard_bytes, context, sum(widths.values()))
    return {"model": model_name(config.lm.model), "lm_dtype": config.lm.dtype,
            "text": text.describe(config.text, sources, config.seed_of_data) | token_store.versions(),
            "context": context, "shard_contexts": shard_contexts, "chunk_rows": chunk_rows_of(context * shard_contexts),
            "target_contexts": math.ceil(config.harvest.tokens / context)}


def _pinned(config: Config) -> bool:
    """True where the name alone says which weights these are: a preset, or a hub revision that is a commit.

    Of a local file or directory it does not: `lm.load` ignores the revision there.
    """
    if config.lm.model in assets.MODELS:
        return True
    path = Path(config.lm.model).expanduser()
    local = path.suffix == ".gguf" or path.exists()
    return not local and bool(re.fullmatch(r"[0-9a-f]{40}", config.lm.revision or ""))


def _mend(path: Path) -> None:
    bad = mend(path)
    if bad:
        say(f"{path}: {', '.join(bad[:8])}{f' and {len(bad) - 8} more' if len(bad) > 8 else ''} did not verify and "
            f"{'is' if len(bad) == 1 else 'are'} written again")
    else:
        say(f"{path}: all that is there verifies")


def _open_matching(path: Path, config: Config, sources: Sources, lm_: LM | None) -> Store | None:
    """The finished store of a config; None where it has fewer contexts and is to grow. Raises `StoreError`."""
    store = patient(lambda: Store.open(path), StoreError)
    if lm_ is not None or not _pinned(config):
        wanted = store_spec(config, lm_ or lm.files(config.lm.model, config.lm.revision), sources)
    else:
        widths = dict(store.spec.hookpoints)
        names = dict.fromkeys(config.harvest.hookpoints)
        wanted = StoreSpec(model_digest=store.spec.model_digest, tokenizer_digest=store.spec.tokenizer_digest,
                           hookpoints=tuple((name, widths.get(name, 0)) for name in names),
                           **_cheap_part(config, {name: widths.get(name, 0) for name in names}, sources))
    if store.spec.grows_to(wanted):
        say(f"{path}: grows from {store.spec.target_contexts:,} to {wanted.target_contexts:,} contexts")
        return None
    check_agreement({"the store": store.digest}, _SAME_DATA)
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


def _tokens(path: Path, config: Config, lm_: LM, contexts: int, sources: Sources) -> TokenStore:
    """The tokens to harvest from, made where they are not there. Raises `Preempted` in all processes where one is to stop."""
    with Preemption() as preemption, Progress("tokens", contexts * config.text.context, enabled=config.log.progress) as bar:
        stop = Preempted(f"{path}: stopped on request; start the same command again to go on")

        def advance(made: int) -> None:
            bar.advance(made)
            if preemption.requested():
                raise stop

        made = tokens.build(path, config.text, lm_.tokenizer, contexts, seed=config.seed_of_data, sources=sources,
                            advance=advance)
        if preemption.meet():
            raise stop
        return made


@dataclass(frozen=True)
class _Shard:
    """A shard to harvest: its number, and the contexts that it consists of."""

    number: int
    tokens_NT: np.ndarray
    keep_NT: np.ndarray

    @property
    def contexts(self) -> int:
        return len(self.tokens_NT)


def _fill(writer: StoreWriter, tokens: TokenStore, n_contexts: int, capture: _Capture, config: Config) -> None:
    """Writes this process's missing shards of a store of so many contexts."""
    spec, process, n_processes = writer.spec, jax.process_index(), jax.process_count()
    mine = set(writer.missing_shards(process, n_processes, contexts=n_contexts))
    title = "harvest" if n_processes == 1 else f"harvest (process 1 of {n_processes})"
    rows = sum(spec.contexts_of(shard, n_contexts) for shard in mine) * spec.context
    with ThreadPoolExecutor(1) as disk_pool, Preemption() as preemption, \
            Progress(title, rows, enabled=config.log.progress) as bar:
        pipeline = _Pipeline(writer, capture, disk_pool, bar, preemption)
        for shard in range(spec.shards(n_contexts)):
            if preemption.requested(shard):
                pipeline.drain()
                raise _stopped(writer)
            if shard in mine:
                first = shard * spec.shard_contexts
                numbers = np.arange(first, first + spec.contexts_of(shard, n_contexts))
                tokens_NT = tokens.read(numbers)
                pipeline.run(_Shard(shard, tokens_NT, tokens.keep(tokens_NT, numbers)))
        pipeline.drain()


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
                                              shard.keep_NT)

    def _finish(self) -> None:
        """Waits for the shard before: its buffer is the next to be filled, and none is written behind one that failed."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None
