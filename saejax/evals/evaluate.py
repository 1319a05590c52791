"""`evaluate`: one pass over held-out text, reconstruction and splicing together; and the cache of its results."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from saejax.base.distributed import gathered
from saejax.base.errors import FormatError, SaejaxError
from saejax.base.logs import Progress
from saejax.base.records import OUTLIER_FACTOR, ActivationStats, RunPaths, TokenBatch
from saejax.base.storage import is_writer, read_json, text_sha256, write_json
from saejax.config import Config, EvalOptions
from saejax.data.store import Store
from saejax.data.text import Text
from saejax.data.token_store import TokenStore
from saejax.data.tokens import in_memory
from saejax.evals import splice
from saejax.evals.reconstruction import Reconstruction
from saejax.lm import LM, Decoder, make_mesh, place, width_of
from saejax.sae.inference import SAE

SCHEMA_VERSION = 1
KIND = "saejax-evaluation"
PER_LAYER = ("fvu", "explained_variance", "normalized_mse", "mse", "cosine")
PER_LAYER += tuple(f"{name}_no_outliers" for name in PER_LAYER)
_CONTEXTS = 16  # of a store that are measured at once


def evaluate(sae: SAE, lm_: LM, text: Text, stats: Mapping[str, ActivationStats], options: EvalOptions, *,
             batch_contexts: int = 16, progress: bool = True) -> dict:
    """`evaluate_all` of one SAE."""
    return evaluate_all([sae], lm_, text, [stats], options, batch_contexts=batch_contexts, progress=progress)[0]


def evaluate_all(saes: Sequence[SAE], lm_: LM, text: Text, stats: Sequence[Mapping[str, ActivationStats]],
                 options: EvalOptions, *, batch_contexts: int = 16, progress: bool = True) -> list[dict]:
    """Everything measured of each SAE on `options.contexts` contexts of the held-out part of a text, as plain JSON.

    The figures are those of `Reconstruction.result` and `SpliceSums.result`, at the hookpoints that an SAE reconstructs; those
    of a crosscoder are replaced together, its reconstruction figures are means over them and each has its own under `layers`.
    What does not depend on the SAE, the language model computes once for all of them. stats: of each one's hookpoints on other
    text, as the training store's; the mean serves mean ablation, the median norm the outlier bound (10 x). Cross-entropy and KL
    come with outlier tokens only: every token after an outlier reads it, so that what the model loses "without" it is no part of
    a sum. batch_contexts: in one forward pass, on all devices of a process. Activations are the language model's own, not rounded
    to bfloat16. On a mesh over several processes each runs the language model on its share of the contexts. Raises
    `HookpointError` / `FormatError` when SAE and model do not fit, `TextError` when no text is held out, `NonFiniteError`.
    """
    each = [_One(sae, lm_, own) for sae, own in zip(saes, stats, strict=True)]
    hookpoints = tuple(dict.fromkeys(name for sae in saes for name in sae.cfg.hookpoints + sae.cfg.targets))
    made = in_memory(text.options, lm_.tokenizer, options.contexts, seed=text.seed, split="heldout")
    contexts, share = min(made.contexts, options.contexts), _Share.of(saes)
    model, rows = _everywhere(lm_.model, batch_contexts)
    with Progress("evaluate", contexts * made.context, enabled=progress) as bar:
        for first in range(0, contexts, batch_contexts * share.of_all):
            batch = _batch(made, first + batch_contexts * share.number, contexts, batch_contexts)
            tokens_BT = jax.device_put(batch.tokens_BT, rows)
            clean = splice.prefix(model, tokens_BT, hookpoints=hookpoints)
            splicer = splice.Splicer(model, batch, tokens_BT, clean)
            for one in each:
                one.add(splicer, clean, batch)
            bar.advance(min(contexts - first, batch_contexts * share.of_all) * made.context)
    return [{"schema_version": SCHEMA_VERSION, "kind": KIND, "model": lm_.name, "model_digest": lm_.digest,
             "hookpoint": one.sae.cfg.hookpoint, "contexts": contexts, "context": made.context, **one.result(share)}
            for one in each]


class _One:
    """An SAE that is measured."""

    def __init__(self, sae: SAE, lm_: LM, stats: Mapping[str, ActivationStats]):
        width = sum(width_of(lm_.cfg, hookpoint) for hookpoint in sae.cfg.hookpoints)
        if width != sae.cfg.d_in:
            raise FormatError(f"the SAE expects activations of width {sae.cfg.d_in}, {sae.cfg.hookpoint} of {lm_.name} has "
                              f"{width}; evaluate it with the model it was trained on")
        self.sae, self._figures = sae, _figures(sae, stats)
        self._means = {name: stats[name].mean_D for name in sae.cfg.targets}
        self._sums, self._masked = splice.SpliceSums(), 0

    def add(self, splicer: splice.Splicer, clean: dict, batch: TokenBatch) -> None:
        splicer.add(self._sums, _reconstruct(self.sae, clean, batch.keep_BT, self._figures), self._means)
        self._masked += int(batch.lengths_B.sum() - batch.keep_BT.sum())

    def result(self, share: "_Share") -> dict:
        masked, sums = share.together(self._masked, self._sums, self._figures)
        return {"masked_tokens": masked, "outlier_factor": OUTLIER_FACTOR, **_over_layers(self._figures), **sums.result()}


def _everywhere(model: Decoder, rows: int) -> tuple[Decoder, NamedSharding]:
    """The language model on all devices of this process, or where it is split already, and how batches of rows lie there."""
    placed = next(iter(model.whole.values()))[...].sharding
    mesh = placed.mesh if isinstance(placed, NamedSharding) and placed.mesh.size > 1 else make_mesh(rows=rows)
    rows_at = NamedSharding(mesh, PartitionSpec("data"))
    return (model if placed.device_set == set(mesh.devices.flat) else place(model, mesh)), rows_at


def evaluate_rows(sae: SAE, store: Store, options: EvalOptions, *, progress: bool = True) -> dict:
    """The figures of `Reconstruction.result` on `options.contexts` contexts of a store, evenly spread: where no model and no
    text is known. Nothing is spliced; `measured_on` says whether these are rows that it was trained on. Raises `StoreError`,
    `NonFiniteError`.
    """
    hookpoints = tuple(dict.fromkeys(sae.cfg.hookpoints + sae.cfg.targets))
    measured = _figures(sae, {name: store.stats(name) for name in sae.cfg.targets})
    chosen = np.unique(np.linspace(0, store.n_contexts - 1, options.contexts).astype(int))
    own = sae.cfg.metadata.get("training", {}).get("store_digest") == store.digest
    share, T, masked = _Share.of([sae]), store.context, 0
    with Progress("evaluate", len(chosen) * T, enabled=progress) as bar:
        for first in range(0, len(chosen), _CONTEXTS * share.of_all):
            mine = chosen[first + _CONTEXTS * share.number:][:_CONTEXTS].tolist()
            keep_BT = np.stack([store.keep(n * T, n * T + T) for n in mine] or [np.zeros(T, bool)])
            rows = {name: np.stack([store.read(name, n * T, n * T + T).astype(np.float32) for n in mine]
                                   or [np.zeros((T, store.width(name)), np.float32)]) for name in hookpoints}
            masked += len(mine) * T - int(keep_BT.sum())
            more = (0, _CONTEXTS - len(keep_BT))
            _reconstruct(sae, {name: np.pad(x_BTD, (more, (0, 0), (0, 0))) for name, x_BTD in rows.items()},
                         np.pad(keep_BT, (more, (0, 0))), measured)
            bar.advance(min(len(chosen) - first, _CONTEXTS * share.of_all) * T)
    masked, _ = share.together(masked, splice.SpliceSums(), measured)
    return {"schema_version": SCHEMA_VERSION, "kind": KIND, "model": store.spec.model, "model_digest": store.spec.model_digest,
            "measured_on": f"rows of {'the training' if own else 'a'} store", "hookpoint": sae.cfg.hookpoint,
            "contexts": len(chosen), "context": store.context, "masked_tokens": masked, "outlier_factor": OUTLIER_FACTOR,
            **_over_layers(measured)}


def _figures(sae: SAE, stats: Mapping[str, ActivationStats]) -> dict[str, Reconstruction]:
    return {name: Reconstruction(stats[name].mean_D, OUTLIER_FACTOR * stats[name].median_norm)
            for name in sae.cfg.targets}


@dataclass(frozen=True)
class _Share:
    """Which part of the batches this process measures: one of as many as the SAEs' meshes have processes."""

    number: int = 0
    of_all: int = 1

    @classmethod
    def of(cls, saes: Sequence[SAE]) -> "_Share":
        several = any(sae.mesh is not None and sae.mesh.is_multi_process for sae in saes)
        return cls(jax.process_index(), jax.process_count()) if several else cls()

    def together(self, masked: int, sums: splice.SpliceSums,
                 measured: dict[str, Reconstruction]) -> tuple[int, splice.SpliceSums]:
        """What all processes have measured, in each of them."""
        if self.of_all == 1:
            return masked, sums
        parts = gathered({"masked": masked, "splice": asdict(sums), "layers": {n: one.sums() for n, one in measured.items()}})
        for name, figures in measured.items():
            figures.become([part["layers"][name] for part in parts])
        return sum(part["masked"] for part in parts), splice.SpliceSums.together([part["splice"] for part in parts])


def _batch(made: TokenStore, first: int, last: int, rows: int) -> TokenBatch:
    """`rows` contexts from number `first` on: one shape, so that nothing is compiled twice. Those from `last` on are masked."""
    numbers = np.arange(first, min(first + rows, last), dtype=np.int64)
    tokens_BT = made.read(numbers)
    keep_BT, lengths_B, room = made.keep(tokens_BT, numbers), made.lengths(tokens_BT), rows - len(numbers)
    return TokenBatch(np.pad(tokens_BT, ((0, room), (0, 0))), np.pad(keep_BT, ((0, room), (0, 0))), numbers,
                      np.pad(lengths_B, (0, room)))


def _reconstruct(sae: SAE, clean: dict, keep_BT: np.ndarray, into: dict[str, Reconstruction]) -> dict:
    """Reconstructions `[B, T, D]` of a batch by hookpoint, measured on the way."""
    keep_N = keep_BT.reshape(-1)
    flat = {name: x_BTD.reshape(len(keep_N), -1) for name, x_BTD in clean.items()}
    read = [flat[name] for name in sae.cfg.hookpoints]
    found = sae.measure(read[0] if len(read) == 1 else jnp.concatenate(read, axis=-1), keep_N)
    parts, first = {}, 0
    for name, figures in into.items():
        last = first + flat[name].shape[-1]
        recon_ND = found.recon_BD if found.recon_BD.shape[1] == last - first else found.recon_BD[:, first:last]
        if isinstance(flat[name], jax.Array):
            recon_ND = jax.device_put(recon_ND, flat[name].sharding)
        figures.add(flat[name], recon_ND, found.l0_B, found.fired_F, keep_N)
        parts[name], first = recon_ND.reshape(clean[name].shape), last
    return parts


def _over_layers(measured: dict[str, Reconstruction]) -> dict:
    """The figures of the one hookpoint; or means over several, the greatest number of outlier tokens, and each by itself."""
    layers = {name: figures.result() for name, figures in measured.items()}
    result = dict(next(iter(layers.values())))
    if len(layers) == 1:
        return result
    for key in PER_LAYER:
        values = [layer[key] for layer in layers.values()]
        result[key] = None if None in values else sum(values) / len(values)
    result["outlier_tokens"] = max(layer["outlier_tokens"] for layer in layers.values())
    return result | {"layers": {name: {key: layer[key] for key in ("outlier_tokens", *PER_LAYER)}
                                for name, layer in layers.items()}}


def cache_key(config: Config, step: int, digests: Mapping[str, str]) -> dict:
    """What a cached evaluation depends on: the checkpoint step, all options on text and model, and digests of the content behind
    the names: `checkpoint` (its arrays), `model`, `tokenizer`, `text`, `store` (whose mean and median the figures use).
    """
    relevant = {"text": asdict(config.text), "dtype": config.lm.dtype, "hookpoints": config.sae.hookpoints,
                "seed": config.seed_of_data}
    options = text_sha256(json.dumps(relevant, sort_keys=True))
    return {"step": step, "contexts": config.eval.contexts, "options": options, **digests}


def cached(file: Path, key: dict) -> dict | None:
    """The result stored under `key` in an `eval.json`, or None. Raises `SaejaxError` for a newer schema."""
    return next((e["result"] for e in _entries(file) if e["key"] == key), None)


def newest(file: Path, checkpoint: str) -> dict | None:
    """The result that was last stored of a checkpoint, whatever the text and the model are now; None where there is none."""
    return next((e["result"] for e in reversed(_entries(file)) if e["key"].get("checkpoint") == checkpoint), None)


def remember(file: Path, key: dict, result: dict) -> None:
    """Adds a result to an `eval.json` (one process writes)."""
    if is_writer():
        entries = [e for e in _entries(file) if e["key"] != key]
        write_json(file, {"schema_version": SCHEMA_VERSION, "kind": KIND, "entries": [*entries, {"key": key, "result": result}]})


def _entries(file: Path) -> list[dict]:
    if not file.is_file():
        return []
    values = read_json(file)
    if not isinstance(values, dict) or values.get("kind") != KIND or not isinstance(values.get("entries"), list):
        raise SaejaxError(f"{file}: not an evaluation file; delete it and evaluate again")
    if values.get("schema_version") != SCHEMA_VERSION:
        raise SaejaxError(f"{file}: schema version {values.get('schema_version')!r}, this saejax reads {SCHEMA_VERSION}; use the "
                          "saejax that wrote it, or delete it")
    return [e for e in values["entries"] if isinstance(e, dict) and {"key", "result"} <= e.keys()]


def evaluated_steps(paths: RunPaths) -> list[int]:
    """Checkpoint steps that `eval.json` has results for."""
    return sorted({e["key"]["step"] for e in _entries(paths.evaluation) if isinstance(e["key"], dict) and "step" in e["key"]})
