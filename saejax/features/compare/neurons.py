"""Features against neurons: of each feature the highest Pearson correlation with any neuron of the layers before it, in one pass.

    r = (S_fg - S_f S_g / n) / sqrt((S_ff - S_f^2 / n) (S_gg - S_g^2 / n))       S: sums over the unmasked tokens

A neuron is a hidden unit of an MLP after its nonlinearity (`mlp.hook_post`); of a gated MLP its sign is arbitrary, so that the
largest |r| is kept as well. The sums are float32 with compensation, neurons shifted by their means over the first batch. Memory:
8 bytes for each pair of a feature and a neuron, whatever the number of tokens. Source: Templeton et al. 2024, "Features vs.
neurons".
"""

import functools
import io
import json
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from saejax.base import sharding
from saejax.base.errors import FeatureIndexError, SteeringError
from saejax.base.logs import Progress
from saejax.base.storage import disk_errors, is_writer, read_json, write_bytes, write_json
from saejax.features.effects.prompting import check_place
from saejax.features.index.corpus import Corpus
from saejax.features.index.reader import sae_fingerprint
from saejax.lm import LM, hookpoints
from saejax.lm.prompts import values
from saejax.sae.inference import SAE

LOW, LEAST_FIRED = 0.3, 30       # "low" as in the paper; a correlation over fewer firings says little
TABLE, SOURCE, PROGRESS = "neurons.parquet", "source.json", "progress.npz"
PAIR_BYTES, MOST_BYTES = 8, 1 << 30
_SUMS = ("f", "ff", "g", "gg", "fg")
_SCHEMA = pa.schema([("feature", pa.int32()), ("fired", pa.int64()), ("correlation", pa.float32()), ("layer", pa.int32()),
                     ("neuron", pa.int32()), ("absolute", pa.float32()), ("absolute_layer", pa.int32()),
                     ("absolute_neuron", pa.int32())])


@dataclass(frozen=True)
class Options:
    """features: how many, drawn at random (None: all, or as many as have sums of `MOST_BYTES`). batch: contexts at once; changes
    nothing but rounding. save_seconds: between two savings of the sums, which take as much room as in memory. about: tokens that
    are expected, for the progress bar.
    """

    features: int | None = None
    batch: int = 8
    save_seconds: float = 300.0
    about: int | None = None
    progress: bool = True


def preceding(lm_: LM, sae: SAE) -> tuple[str, ...]:
    """The hookpoints of all neurons before the (last) place that the SAE reads. Raises `SteeringError` where there are none."""
    order = hookpoints(lm_.cfg)
    found = tuple(name for name in order[:max(map(order.index, sae.cfg.hookpoints))] if name.endswith("mlp.hook_post"))
    if not found:
        raise SteeringError(f"{sae.cfg.hookpoint}: no neurons before it to compare features with")
    return found


def correlate(path: str | Path, sae: SAE, lm_: LM, corpus: Corpus, options: Options = Options()) -> pa.Table:
    """The table `path/neurons.parquet`, a row a feature: made, gone on with, or as it is there.

    `correlation` is the highest r and `layer`, `neuron` where; `absolute` the r of largest size. NaN: the feature never fired.
    Raises `FeatureIndexError` where the directory holds that of something else, `SteeringError` where the SAE does not fit.
    """
    check_place(lm_, sae)
    path, names = Path(path), preceding(lm_, sae)
    chosen = _chosen(sae.cfg.d_sae, len(names) * lm_.cfg.d_mlp, options.features)
    source = {"sae": sae_fingerprint(sae), "model": lm_.digest, "corpus": corpus.digest, "features": len(chosen),
              "schema_version": 1}
    if (path / SOURCE).is_file() and read_json(path / SOURCE, FeatureIndexError) != source:
        raise FeatureIndexError(f"{path}: holds the neurons of another checkpoint, model, text or number of features; choose "
                                "another directory")
    if (path / TABLE).is_file():
        return pq.read_table(path / TABLE)
    if is_writer():
        write_json(path / SOURCE, source)
    table = _table(_sums(path, sae, lm_, corpus, names, chosen, options), chosen, len(names))
    if is_writer():
        buffer = io.BytesIO()
        pq.write_table(table.replace_schema_metadata({"saejax": json.dumps(source)}), buffer, compression="zstd")
        write_bytes(path / TABLE, buffer.getvalue())
        (path / PROGRESS).unlink(missing_ok=True)
    return table


def shares(table: pa.Table) -> dict:
    """Of the features that fired often enough: how many, and the shares with highest r, and with largest |r|, at most `LOW`."""
    enough = table["fired"].to_numpy() >= LEAST_FIRED
    found = {name: np.abs(table[name].to_numpy()[enough]) if name == "absolute" else table[name].to_numpy()[enough]
             for name in ("correlation", "absolute")}
    return {"features": int(enough.sum()), "left_out": int((~enough).sum())} | {
        name: float((value <= LOW).mean()) if len(value) else None for name, value in found.items()}


def parts(table: pa.Table) -> dict[str, list[dict]]:
    """`shares` of parts of the features that fired often enough.

    fired: quarters by how often they fired, equal in number, the rarest first, with `least` and `most` firings. layer: by where
    the neuron of highest r is; absolute_layer: by where that of largest |r| is.
    """
    table = table.filter(pc.greater_equal(table["fired"], LEAST_FIRED))
    order = np.argsort(table["fired"].to_numpy(), kind="stable")
    quarters = [table.take(rows) for rows in np.array_split(order, 4) if len(rows)]
    found = {"fired": [{"least": q["fired"][0].as_py(), "most": q["fired"][-1].as_py(), **_named(q, "correlation", "absolute")}
                       for q in quarters]}
    for name, wanted in (("layer", "correlation"), ("absolute_layer", "absolute")):
        layers = table[name].to_numpy()
        found[name] = [{"layer": layer, **_named(table.filter(pa.array(layers == layer)), wanted)}
                       for layer in np.unique(layers).tolist()]
    return found


def _named(table: pa.Table, *names: str) -> dict:
    found = shares(table)
    return {name: found[name] for name in ("features", *names)}


def _chosen(d_sae: int, neurons: int, wanted: int | None) -> np.ndarray:
    most = max(1, MOST_BYTES // (PAIR_BYTES * neurons)) if wanted is None else wanted
    return np.arange(d_sae) if most >= d_sae else np.sort(np.random.default_rng(0).choice(d_sae, most, replace=False))


def _sums(path: Path, sae: SAE, lm_: LM, corpus: Corpus, names: tuple[str, ...], chosen: np.ndarray, options: Options) -> dict:
    """The sums of the whole corpus, on the host, and `n`."""
    sums, done, n = _saved(path / PROGRESS)
    saved, T = time.monotonic(), corpus.context
    with Progress("neurons", options.about, initial=done * T, enabled=options.progress) as bar:
        for contexts, tokens_BT, keep_BT in _batches(corpus, options.batch, done):
            f_RF, g_RN = _rows(lm_, sae, names, chosen, tokens_BT)
            keep_R = keep_BT.reshape(-1)
            sums = _step(_nothing(f_RF, g_RN, keep_R) if sums is None else sums, f_RF, g_RN, keep_R)
            done, n = done + contexts, n + int(keep_R.sum())
            bar.advance(contexts * T)
            if time.monotonic() - saved > options.save_seconds:
                _save(path / PROGRESS, sums, done, n)
                saved = time.monotonic()
    if sums is None:
        raise FeatureIndexError(f"{path}: the text has no whole context of {T} tokens; give more text")
    return {name: np.asarray(value) for name, value in sums.items()} | {"n": n}


def _batches(corpus: Corpus, size: int, done: int):
    """(contexts, tokens, keep) [size, T], the last filled up with masked contexts; without the first `done` contexts."""
    left, waiting = done, []
    for tokens_NT, keep_NT in corpus.make():
        skipped = min(left, len(tokens_NT))
        left -= skipped
        waiting += zip(tokens_NT[skipped:], keep_NT[skipped:], strict=True)
        while len(waiting) >= size:
            yield size, *(np.stack(column) for column in zip(*waiting[:size], strict=True))
            waiting = waiting[size:]
    if waiting:
        room = ((0, size - len(waiting)), (0, 0))
        yield len(waiting), *(np.pad(np.stack(column), room) for column in zip(*waiting, strict=True))


def _rows(lm_: LM, sae: SAE, names: tuple[str, ...], chosen: np.ndarray, tokens_BT: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """(activations [R, F], neurons [R, N]) of all tokens."""
    found = values(lm_.model, tokens_BT, tuple({*sae.cfg.hookpoints, *names}))
    x_BTD = jnp.concatenate([found[name] for name in sae.cfg.hookpoints], axis=-1)
    acts_BTF = sae.encode(x_BTD)
    if sae.mesh is not None:
        with jax.set_mesh(sae.mesh):
            acts_BTF = sharding.to_host(acts_BTF.at[..., chosen].get(out_sharding=jax.P()))
    elif len(chosen) < sae.cfg.d_sae:
        acts_BTF = acts_BTF[..., chosen]
    g_BTN = jnp.concatenate([found[name] for name in names], axis=-1)
    return jnp.asarray(acts_BTF).reshape(-1, len(chosen)), g_BTN.reshape(-1, g_BTN.shape[-1])


def _nothing(f_RF: jax.Array, g_RN: jax.Array, keep_R: np.ndarray) -> dict:
    """Sums of no rows; the neurons' shift is their mean over these."""
    F, N = f_RF.shape[1], g_RN.shape[1]
    shape = {"f": (F,), "ff": (F,), "g": (N,), "gg": (N,), "fg": (F, N)}
    zeros = {f"{name}{low}": jnp.zeros(shape[name]) for name in _SUMS for low in ("", "_low")}
    return {"fired": jnp.zeros(F, jnp.uint32), "shift": (g_RN * keep_R[:, None]).sum(0) / max(1, keep_R.sum()), **zeros}


@functools.partial(jax.jit, donate_argnums=0)
def _step(sums: dict, f_RF, g_RN, keep_R) -> dict:
    f_RF = jnp.where(keep_R[:, None], f_RF, 0.0)
    g_RN = jnp.where(keep_R[:, None], g_RN - sums["shift"], 0.0)
    new = {"f": f_RF.sum(0), "ff": (f_RF**2).sum(0), "g": g_RN.sum(0), "gg": (g_RN**2).sum(0),
           "fg": jnp.einsum("rf,rn->fn", f_RF, g_RN, precision="highest")}
    out = {"fired": sums["fired"] + (f_RF > 0).sum(0, dtype=jnp.uint32), "shift": sums["shift"]}
    for name, value in new.items():  # Kahan: what a sum rounds off is added to the next batch
        value = value + sums[f"{name}_low"]
        out[name] = sums[name] + value
        out[f"{name}_low"] = value - (out[name] - sums[name])
    return out


def _save(file: Path, sums: dict, done: int, n: int) -> None:
    if is_writer():
        part = file.with_name(f".{file.name}.tmp")
        with disk_errors(file), open(part, "wb") as f:
            np.savez(f, contexts=np.int64(done), n=np.int64(n), **{name: np.asarray(value) for name, value in sums.items()})
        part.rename(file)


def _saved(file: Path) -> tuple[dict | None, int, int]:
    """(sums, contexts, unmasked tokens) where an interrupted pass stood."""
    if not file.is_file():
        return None, 0, 0
    try:
        with np.load(file, allow_pickle=False) as saved:
            names = ("fired", "shift", *_SUMS, *(f"{name}_low" for name in _SUMS))
            return {name: jnp.asarray(saved[name]) for name in names}, int(saved["contexts"]), int(saved["n"])
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FeatureIndexError(f"{file}: not readable ({reason}); delete it to begin again") from error


def _table(sums: dict, chosen: np.ndarray, layers: int) -> pa.Table:
    """float64 from the sums, 256 features at once."""
    n = float(sums["n"])
    whole = {name: sums[name].astype(np.float64) + sums[f"{name}_low"] for name in _SUMS if name != "fg"}
    spread_F, spread_N = (np.maximum(whole[a + a] - whole[a] ** 2 / n, 0) for a in "fg")
    columns = {name: [] for name in _SCHEMA.names[2:]}
    for start in range(0, len(chosen), 256):
        part = slice(start, start + 256)
        cross = sums["fg"][part].astype(np.float64) + sums["fg_low"][part] - np.outer(whole["f"][part], whole["g"]) / n
        scale = np.sqrt(np.outer(spread_F[part], spread_N))
        r_FN = np.clip(np.divide(cross, scale, out=np.zeros_like(cross), where=scale > 0), -1, 1)
        for name, by in (("", r_FN), ("absolute", np.abs(r_FN))):
            best = by.argmax(1)
            columns[name or "correlation"].append(np.take_along_axis(r_FN, best[:, None], 1)[:, 0])
            layer, neuron = np.divmod(best, r_FN.shape[1] // layers)
            columns[f"{name}_layer".strip("_")].append(layer)
            columns[f"{name}_neuron".strip("_")].append(neuron)
    found = {name: np.concatenate(value) for name, value in columns.items()}
    dead = sums["fired"] == 0
    for name in ("correlation", "absolute"):
        found[name] = np.where(dead, np.nan, found[name]).astype(np.float32)
    found |= {name: value.astype(np.int32) for name, value in found.items() if name.endswith(("layer", "neuron"))}
    return pa.table({"feature": chosen.astype(np.int32), "fired": sums["fired"].astype(np.int64), **found}, schema=_SCHEMA)
