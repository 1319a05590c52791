"""`saejax.load`: one door for a release, a run directory and a checkpoint step; all three give identical values."""

from pathlib import Path

import jax
from jax.sharding import Mesh, SingleDeviceSharding

from saejax import config as config_lib
from saejax import sharding
from saejax.config import Config
from saejax.errors import CheckpointCorruptError, CheckpointError, FormatError
from saejax.formats import saelens
from saejax.logs import say
from saejax.recipes import WITH_K
from saejax.records import RunPaths
from saejax.sae import SAEParams
from saejax.sae.inference import SAE, SAEConfig, fold, folded_kind
from saejax.storage import read_json
from saejax.train.checkpoint import CheckpointMeta, restore_params, steps_in


def load(path: str | Path, mesh: Mesh | None = None) -> SAE:
    """The SAE at `path`: a release directory, a run directory (newest checkpoint that verifies) or one checkpoint step.

    mesh: a ("data", "dict") mesh to split the dictionary over; None: one device. Raises `FormatError` when `path` is none of
    these, `CheckpointError` / `CheckpointCorruptError` when nothing there verifies. Nothing found in the path is executed.
    """
    path = Path(path)
    if saelens.is_release(path):
        return saelens.read(path, mesh)
    if (path / "meta").is_dir() and (path / "state").is_dir():
        return from_checkpoint(path, mesh)
    if RunPaths(path).config.is_file():
        return from_checkpoint(newest_step(path), mesh)
    raise FormatError(f"{path}: neither a release (cfg.json + sae_weights.safetensors), nor a run (config.json + checkpoints/), "
                      "nor a checkpoint step (meta/ + state/)" if path.exists() else f"{path}: does not exist")


def newest_step(run: Path) -> Path:
    """The newest checkpoint step of a run whose parameters verify; nothing is renamed. Raises `CheckpointError` for none."""
    directory = RunPaths(Path(run)).checkpoints
    for step in reversed(steps_in(directory)):
        try:
            restore_params(directory / str(step), sharding.single_device_mesh())
            return directory / str(step)
        except CheckpointCorruptError as error:
            say(f"{error}; trying an older checkpoint")
    raise CheckpointError(f"{directory}: no checkpoint that verifies; train first (saejax train --config=...)")


def from_checkpoint(step_dir: Path, mesh: Mesh | None = None) -> SAE:
    """The SAE of one checkpoint step, verified, normalisation folded."""
    where = mesh or sharding.single_device_mesh()
    params, meta = restore_params(step_dir, where)
    config_file = RunPaths(step_dir.parent.parent).config
    config = config_lib.from_json(read_json(config_file, CheckpointError), str(config_file))
    return folded(config, meta, params, where, keep_mesh=mesh is not None)


def folded(config: Config, meta: CheckpointMeta, params: SAEParams, mesh: Mesh, *, keep_mesh: bool = True) -> SAE:
    """The SAE in raw units from trained parameters on a mesh."""
    with jax.set_mesh(mesh):
        params = jax.jit(fold, static_argnums=0)(meta.spec, params, jax.numpy.float32(meta.scale))
    if not keep_mesh:
        device = SingleDeviceSharding(mesh.devices.flat[0])
        params = jax.tree.map(lambda x: jax.device_put(x, device), params)
    metadata = {"text": {"context": config.text.context, "bos": config.text.bos, "source": list(config.text.source)},
                "lm": {"model": config.lm.model, "revision": config.lm.revision, "dtype": config.lm.dtype},
                "training": {"tokens": meta.counters.tokens_seen, "scale": meta.scale, "kind": meta.spec.kind, "k": meta.spec.k,
                             **meta.data}, "units": "raw"}
    kind = folded_kind(meta.spec.kind)
    return SAE(params, SAEConfig(kind=kind, d_in=meta.spec.d_in, d_sae=meta.spec.d_sae,
                                 k=meta.spec.k if kind in WITH_K else 0,
                                 pre_bias=meta.spec.pre_bias, hookpoint=meta.data["hookpoint"], model=config.lm.model,
                                 metadata=metadata), mesh if keep_mesh else None)
