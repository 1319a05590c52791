"""`evaluate`: one pass over held-out text, reconstruction and splicing together; and the cache of its results."""

import json
from dataclasses import asdict

import numpy as np

from saejax import sharding
from saejax.config import Config
from saejax.data.text import token_batches
from saejax.errors import FormatError, SaejaxError
from saejax.evals import splice
from saejax.evals.reconstruction import Reconstruction
from saejax.lm import LM, width_of
from saejax.logs import Progress
from saejax.records import OUTLIER_FACTOR, ActivationStats, RunPaths, TokenBatch
from saejax.sae.inference import SAE
from saejax.storage import is_writer, read_json, text_sha256, write_json

SCHEMA_VERSION = 1
KIND = "saejax-evaluation"
_ACTS_ELEMENTS = 1 << 25  # feature activations held at once: 128 MiB


def evaluate(config: Config, sae: SAE, lm_: LM, stats: ActivationStats) -> dict:
    """Everything measured on `eval.contexts` contexts of held-out text, as plain JSON.

    The figures are those of `Reconstruction.result` and `SpliceSums.result`. stats: those of the training store; the
    mean serves mean ablation, the median norm the outlier bound (10 x). Text is packed and masked as it was for the
    harvest. Activations are the language model's own, not rounded to bfloat16. Raises `HookpointError` / `FormatError`
    when SAE and model do not fit, `TextError` when no text is held out, `NonFiniteError`.
    """
    hookpoint = sae.cfg.hookpoint
    width = width_of(lm_.cfg, hookpoint)
    if width != sae.cfg.d_in:
        raise FormatError(f"the SAE expects activations of width {sae.cfg.d_in}, {hookpoint} of {lm_.name} has {width};"
                          " evaluate it with the model it was trained on (config.lm.model)")
    recon = Reconstruction(sae.cfg.d_sae, stats.mean_D, OUTLIER_FACTOR * stats.median_norm)
    sums = splice.SpliceSums()
    contexts = masked = 0
    total = config.eval.contexts * config.text.context
    with Progress("evaluate", total, enabled=config.log.progress) as bar:
        for batch in token_batches(config.text, lm_.tokenizer, config.eval.batch_contexts, seed=config.seed,
                                   split="heldout", mask_special=config.harvest.mask_special,
                                   max_contexts=config.eval.contexts):
            rows = len(batch.tokens_BT)
            tokens_BT, keep_BT = _padded(batch, config.eval.batch_contexts)
            x_BTD = splice.prefix(lm_.model, tokens_BT, hookpoint=hookpoint)
            recon_BTD = _reconstruct(sae, x_BTD, keep_BT, recon)
            sums.add(lm_.model, hookpoint, tokens_BT, keep_BT, x_BTD, recon_BTD, stats.mean_D, rows)
            contexts, masked = contexts + rows, masked + int((~batch.keep_BT).sum())
            bar.advance(rows * config.text.context)
    return {"schema_version": SCHEMA_VERSION, "kind": KIND, "model": lm_.name, "model_digest": lm_.digest,
            "hookpoint": hookpoint, "contexts": contexts, "context": config.text.context, "masked_tokens": masked,
            "outlier_factor": OUTLIER_FACTOR, **recon.result(), **sums.result()}


def _padded(batch: TokenBatch, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of `rows` rows: one shape, so that nothing is compiled twice. Added rows are masked."""
    pad = ((0, rows - len(batch.tokens_BT)), (0, 0))
    return np.pad(batch.tokens_BT, pad, mode="edge"), np.pad(batch.keep_BT, pad, constant_values=False)


def _reconstruct(sae: SAE, x_BTD, keep_BT: np.ndarray, into: Reconstruction):
    """Reconstruction `[B, T, D]` of a batch, measured on the way; pieces bound the memory for feature activations."""
    flat_ND, keep_N = x_BTD.reshape(-1, sae.cfg.d_in), keep_BT.reshape(-1)
    piece = max(1, min(len(keep_N), _ACTS_ELEMENTS // sae.cfg.d_sae))
    if sae.mesh is not None:
        flat_ND = np.asarray(flat_ND)
    parts = []
    for start in range(0, len(keep_N), piece):
        x_ND = flat_ND[start:start + piece]
        recon_ND, acts_NF = sae.reconstruct(x_ND)
        if sae.mesh is not None:
            recon_ND = sharding.to_host(recon_ND)
        into.add(x_ND, recon_ND, acts_NF, keep_N[start:start + piece])
        parts.append(recon_ND)
    whole = parts[0] if len(parts) == 1 else np.concatenate([np.asarray(p) for p in parts])
    return whole.reshape(x_BTD.shape)


def cache_key(config: Config, step: int) -> dict:
    """What a cached evaluation depends on: the checkpoint step, and every option that decides text and model."""
    lm_options = {key: value for key, value in asdict(config.lm).items() if key != "mesh"}
    relevant = {"text": asdict(config.text), "lm": lm_options, "hookpoint": config.sae.hookpoint,
                "seed": config.seed, "mask_special": config.harvest.mask_special}
    options = text_sha256(json.dumps(relevant, sort_keys=True))
    return {"step": step, "contexts": config.eval.contexts, "options": options}


def cached(paths: RunPaths, key: dict) -> dict | None:
    """The result stored under `key` in `eval.json`, or None. Raises `SaejaxError` for a newer schema."""
    return next((e["result"] for e in _entries(paths) if e["key"] == key), None)


def remember(paths: RunPaths, key: dict, result: dict) -> None:
    """Adds a result to `eval.json` (one process writes)."""
    if is_writer():
        entries = [e for e in _entries(paths) if e["key"] != key]
        write_json(paths.evaluation, {"schema_version": SCHEMA_VERSION, "kind": KIND,
                                      "entries": [*entries, {"key": key, "result": result}]})


def _entries(paths: RunPaths) -> list[dict]:
    if not paths.evaluation.is_file():
        return []
    values = read_json(paths.evaluation)
    if not isinstance(values, dict) or values.get("kind") != KIND or not isinstance(values.get("entries"), list):
        raise SaejaxError(f"{paths.evaluation}: not an evaluation file; delete it and evaluate again")
    if values.get("schema_version") != SCHEMA_VERSION:
        raise SaejaxError(f"{paths.evaluation}: schema version {values.get('schema_version')!r}, this saejax reads "
                          f"{SCHEMA_VERSION}; use the saejax that wrote it, or delete it")
    return [e for e in values["entries"] if isinstance(e, dict) and {"key", "result"} <= e.keys()]


def evaluated_steps(paths: RunPaths) -> list[int]:
    """Checkpoint steps that `eval.json` has results for."""
    return sorted({e["key"]["step"] for e in _entries(paths) if isinstance(e["key"], dict) and "step" in e["key"]})
