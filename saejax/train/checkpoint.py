"""Checkpoints of the whole state: orbax for the arrays, JSON for the integers, a fingerprint for every leaf.

orbax does not notice a flipped bit in array data, and casts silently when dtypes differ: each leaf's mesh-independent
fingerprint is therefore stored beside the arrays and compared after every restore. This is the only module that knows orbax.
"""

import contextlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from saejax.base import lease, sharding
from saejax.base.errors import CheckpointCorruptError, CheckpointError
from saejax.base.fingerprints import fingerprints
from saejax.base.logs import say
from saejax.base.records import StreamState
from saejax.base.storage import barrier, disk_errors, is_writer, plain_path, text_sha256
from saejax.sae import SAEParams, SAESpec, from_tensors, param_shapes, param_shardings, tensors
from saejax.sae.normalization import Normalization
from saejax.train import determinism

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class RunCounters:
    """The integers of a run's state that live on the host."""

    stream: StreamState
    tokens_seen: int
    resamples: int


@dataclass(frozen=True)
class CheckpointMeta:
    """The JSON side of a checkpoint. data: hookpoints, store digest, normalisation convention, order of the stream. machine:
    what wrote it (`determinism.machine`); empty in checkpoints from before it was recorded.
    """

    spec: SAESpec
    data: dict[str, str | list[str]]
    counters: RunCounters
    fingerprints: dict[str, str]
    machine: dict[str, str] = field(default_factory=dict)


def _said_once(record: logging.LogRecord) -> bool:
    """orbax logs tracebacks of errors that are raised anyway, and leaves sibling tasks to complain: a user is to see one line.
    What it only warns of is shown: nothing else says that data was left out.
    """
    error = record.exc_info[1] if record.exc_info else None
    from_orbax = "orbax" in record.pathname
    return not (from_orbax and (error is not None or record.levelno != logging.WARNING)) and "OCDBT" not in str(error)


for _logger in ("absl", "asyncio"):
    logging.getLogger(_logger).addFilter(_said_once)


def _without_late_answers(shown: Callable) -> Callable:
    """A hook for what cannot be raised that leaves out what tensorstore's threads say after a failed save: the error of one array
    ended the event loop, and the other arrays, done later, find it closed. The save's own error is raised in any case.
    """
    def hook(unraisable):
        trace = unraisable.exc_traceback
        from_outside = trace is not None and trace.tb_frame.f_code.co_name == "call_soon_threadsafe"
        if not (from_outside and str(unraisable.exc_value) == "Event loop is closed"):
            shown(unraisable)

    return hook


sys.unraisablehook = _without_late_answers(sys.unraisablehook)


def _registry():
    handler = ocp.PyTreeCheckpointHandler(use_compression=False)  # zstd saves 7 % of float weights and costs 2.5 x the time
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for args in (ocp.args.PyTreeSave, ocp.args.PyTreeRestore):
        registry.add("state", args, handler)
    json_handler = ocp.JsonCheckpointHandler()
    for args in (ocp.args.JsonSave, ocp.args.JsonRestore):
        registry.add("meta", args, json_handler)
    return registry


class Checkpoints:
    """The checkpoints of one run directory: `save` them, list their `steps`, `restore` one that verifies."""

    def __init__(self, directory: Path, *, keep: int = 2, keep_every_steps: int | None = None):
        self.directory = Path(directory)
        with disk_errors(directory):
            if is_writer():
                self.directory.mkdir(parents=True, exist_ok=True)
            barrier("checkpoints-directory")
            self._open = contextlib.ExitStack()
            self._manager = ocp.CheckpointManager(
                self._open.enter_context(plain_path(self.directory)), handler_registry=_registry(),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep, keep_period=keep_every_steps, cleanup_tmp_directories=True,
                    step_prefix=None, async_options=ocp.AsyncOptions(timeout_secs=3600)))

    def save(self, step: int, state, spec: SAESpec, data: dict[str, str | list[str]], counters: RunCounters) -> None:
        """Starts an asynchronous save; blocks only while the state is copied to the host. An existing step is left alone.

        data: what the SAE is trained on (hookpoints, digest of the store, normalisation convention).
        """
        if step in self._manager.all_steps():
            return
        meta = {"schema_version": SCHEMA_VERSION, "kind": "saejax-checkpoint", "spec": asdict(spec), "data": data,
                "counters": asdict(counters), "fingerprints": fingerprints(state), "machine": determinism.machine()}
        with disk_errors(self.directory):
            items = ocp.args.Composite(state=ocp.args.PyTreeSave(_on_disk(state)),
                                       meta=ocp.args.JsonSave({**meta, "digest": _digest(meta)}))
            lease.confirm()
            if not self._manager.save(step, args=items, force=True):
                raise CheckpointError(f"{self.directory}: step {step} was not saved; a newer step is there already")

    def wait(self) -> None:
        """Blocks until the last save is on disk; raises what went wrong in the background."""
        with disk_errors(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()
        self._open.close()

    def restore(self, step: int, abstract_state):
        """(state, CheckpointMeta) of a step; None when it does not verify: it is renamed to `corrupt-<step>` and named."""
        try:
            return restore_step(self.directory / str(step), abstract_state)
        except CheckpointCorruptError as error:
            self._quarantine(step)
            say(f"{error}; moved to {self.directory.name}/corrupt-{step}, falling back to an older checkpoint")
        return None

    def steps(self) -> list[int]:
        """Finished steps, oldest first, whether or not they verify.

        Raises `CheckpointError` when only such are left that did not: a run never starts over beside the remains of its
        checkpoints.
        """
        steps = sorted(self._manager.all_steps())
        aside = [] if steps else sorted(path.name for path in self.directory.glob("corrupt-*"))
        if aside:
            raise CheckpointError(f"{self.directory}: none of the checkpoints verifies ({', '.join(aside)}); repair one and move "
                                  "it back to its step number, delete them all to start at step 0, or choose another "
                                  "config.run_dir")
        return steps

    def _quarantine(self, step: int) -> None:
        barrier(f"quarantine-{step}")
        if is_writer():
            target, n = self.directory / f"corrupt-{step}", 1
            while target.exists():
                target, n = self.directory / f"corrupt-{step}.{n}", n + 1
            os.rename(self.directory / str(step), target)
        barrier(f"quarantined-{step}")
        self._manager.reload()


def steps_in(directory: Path) -> list[int]:
    """Step numbers of the checkpoints in a directory, oldest first, whether or not they verify."""
    if not Path(directory).is_dir():
        return []
    return sorted(int(p.name) for p in Path(directory).iterdir() if p.is_dir() and re.fullmatch(r"\d+", p.name))


def is_step(path: Path) -> bool:
    """True for the directory of one checkpoint step, whole or damaged: either of its two parts is there."""
    return (Path(path) / "state").is_dir() or (Path(path) / "meta").is_dir()


@contextlib.contextmanager
def _corrupt(what: str):
    """Errors of reading -> `CheckpointCorruptError`, except those that say nothing about the bytes.

    orbax and tensorstore raise many classes for damage; out of memory, on the host or a device, passes through.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        if _no_answer(error):
            raise CheckpointError(f"{what}: could not be read ({_first_line(error)}); give this user access to it, or try "
                                  "again once the storage answers") from error
        raise CheckpointCorruptError(f"{what}: not readable ({_first_line(error)})") from error


def _no_answer(error: Exception) -> bool:
    """True when the storage refused or failed; tensorstore's errors are `ValueError`s that begin with the name of a status."""
    if isinstance(error, OSError):
        return not isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError))
    return re.match(r"(PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|CANCELLED|ABORTED):",
                    str(error)) is not None


def read_meta(step_dir: Path) -> CheckpointMeta:
    """The JSON item of a checkpoint step.

    Raises `CheckpointCorruptError` when it is unreadable, `CheckpointError` for a newer schema or where access is denied.
    """
    step_dir = Path(step_dir)
    with _corrupt(f"{step_dir}/meta"):
        with plain_path(step_dir) as place, ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            meta = reader.restore(place / "meta")
        version, kind, digest = meta["schema_version"], meta["kind"], meta.pop("digest")
    if kind != "saejax-checkpoint" or version != SCHEMA_VERSION:
        raise CheckpointError(f"{step_dir}: {kind} schema version {version}, this saejax reads {SCHEMA_VERSION}; use the saejax "
                              "that wrote it")
    if digest != _digest(meta):
        raise CheckpointCorruptError(f"{step_dir}/meta: altered (its digest does not match)")
    c = meta["counters"]
    return CheckpointMeta(
        spec=SAESpec(**meta["spec"] | {"layers": tuple(meta["spec"]["layers"])}), data=meta["data"],
        fingerprints=meta["fingerprints"], machine=meta.get("machine", {}),
        counters=RunCounters(stream=_stream_state(c["stream"]), tokens_seen=c["tokens_seen"], resamples=c["resamples"]))


def _stream_state(values: dict) -> StreamState:
    return StreamState(values["seed"], tuple(tuple(lane) for lane in values["lanes"]))


def machine_of(step_dir: Path) -> dict[str, str]:
    """What wrote a checkpoint step; empty where that is not known, or nothing readable is there."""
    try:
        return read_meta(step_dir).machine
    except CheckpointError:
        return {}


def _digest(meta: dict) -> str:
    return text_sha256(json.dumps(meta, sort_keys=True))


def restore_step(step_dir: Path, abstract_state):
    """(state, meta) of one step, placed as `abstract_state` says (any mesh) and verified leaf by leaf."""
    return _restore(Path(step_dir), abstract_state, partial=False)


def restore_scalar(step_dir: Path, name: str, mesh: Mesh) -> int:
    """One integer of the state of a step, verified; nothing else is read."""
    abstract = {name: jax.ShapeDtypeStruct((), "int32", sharding=sharding.sharding(mesh))}
    with jax.set_mesh(mesh):
        return int(_restore(Path(step_dir), abstract, partial=True)[0][name])


def restore_params(step_dir: Path, mesh: Mesh) -> tuple[SAEParams, Normalization, CheckpointMeta]:
    """(params, normalization, meta) of one step on any mesh, verified; optimizer state is not read.

    Parameters are their running mean where the run keeps one (`train.ema`). batchtopk: `per_feature["threshold"]` is the
    run's threshold, equal for all features.
    """
    meta = read_meta(step_dir)
    spec, which = meta.spec, "ema" if any(leaf.startswith("ema.") for leaf in meta.fingerprints) else "params"
    threshold = spec.kind == "batchtopk"
    sharding.check_features(spec.d_sae, mesh)
    shapes = tensors(param_shapes(spec))
    places = tensors(param_shardings(mesh, shapes))
    abstract = {name: jax.ShapeDtypeStruct(shape, "float32", sharding=places[name]) for name, shape in shapes.items()}
    row = jax.ShapeDtypeStruct((spec.d_in + (spec.d_out or 0),), "float32", sharding=sharding.sharding(mesh))
    with jax.set_mesh(mesh):
        wanted = {which: from_tensors(abstract), "normalization": Normalization(row, row)}
        if threshold:
            wanted["moving"] = {"threshold": jax.ShapeDtypeStruct((), "float32", sharding=sharding.sharding(mesh))}
        tree, meta = _restore(Path(step_dir), wanted, partial=True)
        params = tree[which]
        if threshold:
            equal_F = jax.jit(lambda value, b_enc: jax.numpy.zeros_like(b_enc) + value)(tree["moving"]["threshold"], params.b_enc)
            params = params.replace(per_feature={"threshold": equal_F})
    return params, tree["normalization"], meta


def _restore(step_dir: Path, abstract, partial: bool):
    meta = read_meta(step_dir)
    _check_tree(step_dir, abstract, meta, partial)
    with _corrupt(f"{step_dir}/state"):
        with plain_path(step_dir) as place, ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as reader:
            item = _on_disk(abstract)
            found = _by_path(reader.restore(place / "state", args=ocp.args.PyTreeRestore(
                item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=partial)))
    tree = jax.tree.unflatten(jax.tree.structure(abstract), [found[path] for path in _by_path(abstract)])
    found = fingerprints(tree)
    bad = sorted(leaf for leaf in found if found[leaf] != meta.fingerprints.get(leaf))
    if bad:
        raise CheckpointCorruptError(f"{step_dir}: fingerprints do not match for {', '.join(bad)}")
    return tree, meta


def _check_tree(step_dir: Path, abstract, meta: CheckpointMeta, partial: bool) -> None:
    """Leaf names, shapes and dtypes before anything is allocated: orbax would cast silently.

    A sound checkpoint of another state (its own list of fingerprints names other leaves) is an error, not corruption.
    """
    with plain_path(step_dir) as place, _corrupt(f"{step_dir}/state: metadata"):
        tree = ocp.PyTreeCheckpointHandler().metadata(place / "state").tree
        saved = {_path(p): (tuple(m.shape), str(jax.numpy.dtype(m.dtype)))
                 for p, m in jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda m: hasattr(m, "shape"))[0]}
    wanted = {path: (tuple(s.shape), str(s.dtype)) for path, s in _by_path(abstract).items()}
    wrong = [f"{k}: saved {saved.get(k, 'nothing')}, expected {wanted.get(k, 'nothing')}"
             for k in sorted(wanted if partial else saved.keys() | wanted.keys()) if saved.get(k) != wanted.get(k)]
    if wrong:
        kind = CheckpointCorruptError if meta.fingerprints.keys() >= wanted.keys() else CheckpointError
        raise kind(f"{step_dir}: does not fit the run's state ({'; '.join(wrong)})")


def _path(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _on_disk(tree):
    """Dataclasses as dicts without their empty parts: what a kind does not have leaves no trace in its checkpoints."""
    def plain(node):
        if not is_dataclass(node):
            return node
        values = {f.name: getattr(node, f.name) for f in fields(node)}
        return {name: _on_disk(value) for name, value in values.items()
                if value is not None and not (isinstance(value, dict) and not value)}

    return jax.tree.map(plain, tree, is_leaf=is_dataclass)


def _by_path(tree) -> dict:
    return {_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
