"""`saejax.load`: one door for a release, a run directory and a checkpoint step; all three give identical values."""

from pathlib import Path

import jax
from jax.sharding import Mesh, SingleDeviceSharding

from saejax import sharding
from saejax.config import Config
from saejax.errors import CheckpointCorruptError, CheckpointError, FormatError
from saejax.formats import saelens
from saejax.logs import say
from saejax.recipes import WITH_K
from saejax.records import RunPaths, read_config
from saejax.sae.inference import SAE, SAEConfig, fold, folded_kind
from saejax.sae.normalization import Normalization
from saejax.train.checkpoint import CheckpointMeta, is_step, restore_params, steps_in


def load(path: str | Path, mesh: Mesh | None = None) -> SAE:
    """The SAE at `path`: a release directory, a run directory (newest checkpoint that verifies) or one checkpoint step.

    mesh: a ("data", "dict") mesh to split the dictionary over; None: one device. Raises `FormatError` when `path` is none of
    these, `CheckpointError` / `CheckpointCorruptError` when nothing there verifies. Nothing found in the path is executed.
    """
    path = Path(path)
    if saelens.is_release(path):
        return saelens.read(path, mesh)
    if is_step(path):
        return from_checkpoint(path, mesh)
    if RunPaths(path).config.is_file():
        return _newest(path, mesh)[1]
    raise FormatError(f"{path}: neither a release (cfg.json + sae_weights.safetensors), nor a run (config.json + checkpoints/), "
                      "nor a checkpoint step (meta/ + state/)" if path.exists() else f"{path}: does not exist")


def newest_step(run: Path, mesh: Mesh | None = None) -> Path:
    """The newest checkpoint step of a run whose parameters verify; nothing is renamed. Raises `CheckpointError` for none."""
    return _newest(run, mesh)[0]


def _newest(run: Path, mesh: Mesh | None) -> tuple[Path, SAE]:
    directory = RunPaths(Path(run)).checkpoints
    for step in reversed(steps_in(directory)):
        try:
            return directory / str(step), from_checkpoint(directory / str(step), mesh)
        except CheckpointCorruptError as error:
            say(f"{error}; trying an older checkpoint")
    raise CheckpointError(f"{directory}: no checkpoint that verifies; train first (saejax train --config=...)")


def from_checkpoint(step_dir: Path, mesh: Mesh | None = None, *, as_jumprelu: bool = False) -> SAE:
    """The SAE of one checkpoint step, verified, normalisation folded.

    as_jumprelu: a topk SAE with the one threshold at which as many features fire on average, instead of the k largest of each
    row.
    """
    where = mesh or sharding.single_device_mesh()
    params, normalization, meta = restore_params(step_dir, where, as_jumprelu=as_jumprelu)
    kind = folded_kind(meta.spec.kind, params)
    config = read_config(RunPaths(Path(step_dir).absolute().parent.parent).config)
    with jax.set_mesh(where):
        params = jax.jit(fold, static_argnums=0)(meta.spec, params, normalization)
    if mesh is None:
        params = jax.device_put(params, SingleDeviceSharding(where.devices.flat[0]))
    return SAE(params, _describe(kind, config, meta, normalization), mesh)


def _describe(kind: str, config: Config, meta: CheckpointMeta, normalization: Normalization) -> SAEConfig:
    spec = meta.spec
    read, written = (part.scale for part in normalization.parts(spec))
    firsts = [sum(spec.layers[:n]) for n in range(max(1, len(spec.layers)))]
    scales = [float(read[first]) for first in firsts] + ([float(written[0])] if spec.d_out is not None else [])
    metadata = {"text": {"context": config.text.context, "bos": config.text.bos, "source": list(config.text.source)},
                "lm": {"model": config.lm.model, "revision": config.lm.revision, "dtype": config.lm.dtype},
                "training": {"tokens": meta.counters.tokens_seen, "scales": scales, "center": config.sae.center,
                             "kind": spec.kind, "k": spec.k, **meta.data}, "units": "raw"}
    return SAEConfig(kind=kind, d_in=spec.d_in, d_sae=spec.d_sae, k=spec.k if kind in WITH_K else 0, pre_bias=spec.pre_bias,
                     hookpoints=config.sae.sources, target=config.sae.target, d_out=spec.d_out, skip=spec.skip,
                     layers=spec.layers, model=config.lm.model, metadata=metadata)
