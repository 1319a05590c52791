"""`saejax.load`: one door for releases, runs, checkpoint steps and the files of other libraries, told apart by content."""

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh, SingleDeviceSharding

from saejax.base import sharding
from saejax.base.assets import provenance
from saejax.base.errors import CheckpointCorruptError, CheckpointError, FormatError
from saejax.base.logs import say
from saejax.base.records import MADE_ELSEWHERE, RunPaths
from saejax.base.storage import bucket_trouble
from saejax.config import Config, read_config
from saejax.config.recipes import WITH_K
from saejax.formats import dictionary_learning, gemma_scope, goodfire, hub, openai, openmoss, saelens, saelens_read, sparsify
from saejax.formats.archives import open_torch
from saejax.formats.keys import counted, json_object, one_of
from saejax.formats.torch_files import torch_files
from saejax.sae.inference import SAE, SAEConfig, fold, folded_kind
from saejax.sae.normalization import Normalization
from saejax.train.checkpoint import CheckpointMeta, is_step, restore_params, steps_in

_DEPTH, _SEEN = 3, 1000  # of a folder of folders: how deep, how many are looked at


@dataclass(frozen=True)
class Format:
    """How a layout is recognised, read and, where it can be, written. needs: what it consists of, for messages."""

    recognise: Callable[[Path], bool]
    read: Callable[..., SAE]
    needs: str
    write: Callable[[Path, SAE], None] | None = None


def load(path: str | Path, mesh: Mesh | None = None, format: str = "auto", features: range | slice | None = None) -> SAE:
    """The SAE at `path`: a release, a run (newest checkpoint that verifies), a checkpoint step, files of SAELens, sparsify,
    dictionary_learning, Gemma Scope, OpenAI, OpenMOSS or Goodfire, or of a Hugging Face repository as "org/repo:path/in/repo"
    ("org/repo@revision:path").

    mesh: a ("data", "dict") mesh to split the dictionary over; None: one device. format: a name of `FORMATS`, or "auto".
    features: of a release only these neighbours, such as range(0, 4096), as an SAE of their own; only their bytes are read, and
    digests, which are of whole files, are not verified. Feature activations are those of the library that wrote the files. Raises
    `FormatError` when nothing fits, when more than one format does, or for anything in the files that is not understood;
    `CheckpointError` / `CheckpointCorruptError` when nothing of a run verifies. Nothing found in the path is executed.
    """
    if trouble := bucket_trouble(path):
        raise FormatError(trouble)
    source, path, revision = located(path)
    name = recognise(path) if format == "auto" else format
    if name not in FORMATS:
        raise FormatError(f"format={name!r} is not one of auto, {', '.join(FORMATS)}")
    if not path.exists():
        raise FormatError(f"{path}: does not exist")
    if not FORMATS[name].recognise(path):
        _refuse_many(path)
    reader = FORMATS[name].read
    extra = {"origin": source.origin} if source is not None and "origin" in inspect.signature(reader).parameters else {}
    if features is not None:
        if "features" not in inspect.signature(reader).parameters:
            raise FormatError(f"{path}: features={features}: only releases and files of SAELens are read in part, and this is of "
                              f"format {name}; load it whole, or write a release of it")
        extra["features"] = features
    sae = reader(path, mesh, **extra)
    if name not in OURS and "saejax_version" not in sae.cfg.metadata:
        sae.cfg.metadata.setdefault("source", {"format": name})
        say(f"{path}: {name}, {sae}")
    sae.writer, sae.source = saelens.write, str(path) if source is None else source.origin
    if source is not None:
        sae.cfg.metadata["hub"] = {"repo": source.repo, "path": source.path, "revision": revision}
    return sae


def located(path: str | Path) -> tuple[hub.Source | None, Path, str]:
    """(the place in a repository or None, where that is on this machine, its commit)"""
    source = hub.parse(path)
    return (None, Path(path), "") if source is None else (source, *hub.fetch(source))


def recognise(path: Path) -> str:
    """The name of the one format that fits what is at `path`. Raises `FormatError` for none or several."""
    path = Path(path)
    if not path.exists():
        raise FormatError(f"{path}: does not exist")
    fits = [name for name, known in FORMATS.items() if known.recognise(path)]
    if len(fits) > 1:
        raise FormatError(f"{path}: holds files of {' and of '.join(fits)}; say which with format=, or keep them in folders of "
                          "their own")
    if not fits:
        for file in torch_files(path)[:1]:
            open_torch(file)  # one that cannot be read says why itself
        _refuse_many(path)
        looked = "; ".join(f"{name} ({known.needs})" for name, known in FORMATS.items())
        raise FormatError(f"{path}: neither a release nor anything else that is known; looked for {looked}")
    return fits[0]


def _refuse_many(path: Path) -> None:
    """Raises `FormatError` for a folder of SAEs, at most three folders deep, and names them; not those inside a run."""
    found, level = [], [path] if path.is_dir() else []
    for _ in range(_DEPTH):
        level = [folder for above in level for folder in _folders(above)][:_SEEN]
        fitting = [folder for folder in level if any(known.recognise(folder) for known in FORMATS.values())]
        found += fitting
        level = [folder for folder in level if folder not in fitting]
    if found:
        raise FormatError(f"{path}: no SAE itself, but it holds {len(found)} in folders of their own; give {path}{os.sep} and "
                          f"{one_of([str(folder.relative_to(path)) for folder in found])}")


def _folders(path: Path) -> list[Path]:
    """Those in a folder, in the order of people who count; none in one that cannot be read."""
    try:
        return sorted((folder for folder in path.iterdir() if folder.is_dir()), key=lambda folder: counted(folder.name))
    except OSError:
        return []


def newest(run: Path, mesh: Mesh | None = None) -> tuple[Path, SAE]:
    """The newest checkpoint step of a run whose parameters verify, and its SAE; nothing is renamed. Raises `CheckpointError` for
    none.
    """
    directory = RunPaths(Path(run)).checkpoints
    for step in reversed(steps_in(directory)):
        try:
            return directory / str(step), from_checkpoint(directory / str(step), mesh)
        except CheckpointCorruptError as error:
            say(f"{error}; trying an older checkpoint")
    raise CheckpointError(f"{directory}: no checkpoint that verifies; train first (saejax train)")


def from_checkpoint(step_dir: Path, mesh: Mesh | None = None, *, threshold: float | None = None) -> SAE:
    """The SAE of one checkpoint step, verified, normalisation folded.

    threshold: a topk SAE keeps what exceeds it, in units of the normalised data, instead of the k largest of each row.
    """
    where = mesh or sharding.single_device_mesh()
    params, normalization, meta = restore_params(step_dir, where)
    if threshold is not None and meta.spec.kind == "topk":
        with jax.set_mesh(where):
            params = params.replace(per_feature={"threshold": jax.numpy.full_like(params.b_enc, threshold)})
    kind = folded_kind(meta.spec.kind, params)
    config = read_config(RunPaths(Path(step_dir).absolute().parent.parent).config)
    with jax.set_mesh(where):
        params = jax.jit(fold, static_argnums=0, donate_argnums=1)(meta.spec, params, normalization)
    if mesh is None:
        params = jax.device_put(params, SingleDeviceSharding(where.devices.flat[0]))
    return SAE(params, _describe(kind, config, meta, normalization), mesh)


def _describe(kind: str, config: Config, meta: CheckpointMeta, normalization: Normalization) -> SAEConfig:
    spec = meta.spec
    read, written = (part.scale for part in normalization.parts(spec))
    firsts = [sum(spec.layers[:n]) for n in range(max(1, len(spec.layers)))]
    scales = [float(read[first]) for first in firsts] + ([float(written[0])] if spec.d_out is not None else [])
    text, lm = {"context": config.text.context}, {"model": config.lm.model}
    if not meta.data.get(MADE_ELSEWHERE):  # whose text the config does not know
        text |= {"bos": config.text.bos, "packing": config.text.packing, "source": list(config.text.source)}
        lm = {**provenance(config.lm.model), "revision": config.lm.revision, "dtype": config.lm.dtype}
    metadata = {"text": text, "lm": lm,
                "training": {"tokens": meta.counters.tokens_seen, "scales": scales, "center": config.sae.center,
                             "kind": spec.kind, "k": spec.k, **meta.data}, "units": "raw"}
    return SAEConfig(kind=kind, d_in=spec.d_in, d_sae=spec.d_sae, k=spec.k if kind in WITH_K else 0, pre_bias=spec.pre_bias,
                     hookpoints=config.sae.sources, target=config.sae.target, d_out=spec.d_out, skip=spec.skip,
                     layers=spec.layers, model=config.lm.model, metadata=metadata)


def _is_run(path: Path) -> bool:
    """A config.json of saejax, or one that cannot be read beside checkpoints of saejax."""
    file = RunPaths(path).config
    if not file.is_file():
        return False
    values = json_object(file)
    return "run_dir" in values if values else bool(steps_in(RunPaths(path).checkpoints))


def _read_run(path: Path, mesh: Mesh | None) -> SAE:
    return newest(path, mesh)[1]


OURS = ("run", "checkpoint")
FORMATS = {
    "run": Format(_is_run, _read_run, "config.json + checkpoints/"),
    "checkpoint": Format(is_step, from_checkpoint, "meta/ + state/"),
    "saelens": Format(saelens.is_release, saelens_read.read, f"{saelens.CONFIG} + {saelens.WEIGHTS}",
                      functools.partial(saelens.write, single=True)),
    "sparsify": Format(sparsify.recognise, sparsify.read, sparsify.NEEDS, sparsify.write),
    "gemma_scope": Format(gemma_scope.recognise, gemma_scope.read, gemma_scope.NEEDS, gemma_scope.write),
    "dictionary_learning": Format(dictionary_learning.recognise, dictionary_learning.read, dictionary_learning.NEEDS,
                                  dictionary_learning.write),
    "openmoss": Format(openmoss.recognise, openmoss.read, openmoss.NEEDS),
    "openai": Format(openai.recognise, openai.read, openai.NEEDS),
    "goodfire": Format(goodfire.recognise, goodfire.read, goodfire.NEEDS),
}
