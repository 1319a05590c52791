"""What a path or a name stands for: its subject, or those of a sweep."""

import dataclasses
from pathlib import Path

from saejax.base.errors import CheckpointError, ConfigError, FormatError
from saejax.base.records import RunPaths
from saejax.base.storage import bucket_trouble
from saejax.config import Config
from saejax.formats import hub, loading
from saejax.runs.layout import located, run_of, saved_config
from saejax.runs.subject import AUTO, Given, Subject
from saejax.train.checkpoint import is_step


def open_all(source: str | Path, given: Given | None = None, config: Config | None = None) -> list[Subject]:
    """What a path or name stands for: one subject, or those of all SAEs of a sweep. config: of the same run, with evaluation, log
    and meshes as they are wanted now. Nothing is read yet but configs. Raises `FormatError`, `CheckpointError`, `ConfigError`.
    """
    given = given or Given()
    if trouble := bucket_trouble(source):
        raise FormatError(trouble)
    if given.format == AUTO and (isinstance(source, Path) or hub.parse(source) is None):
        path = Path(source)
        kind = loading.recognise(path)
        if kind in loading.OURS:
            run = run_of(path) if kind == "checkpoint" else path
            if run is None or not RunPaths(run).config.is_file():
                raise CheckpointError(f"{path}: no config.json two levels up; keep the checkpoint inside its run directory")
            return [_of_run(place, given, found) for found, place in located(path, config)]
        run = run_of(path)
        if run is not None:  # a release in its run
            return [Subject(path, given, saved_config(run))]
        return [Subject(path, given)]
    return [Subject(source, given)]


def _of_run(place: Path, given: Given, config: Config) -> Subject:
    return Subject(place, given, config, place if is_step(place) else None)


def open_subject(source: str | Path, **given) -> Subject:
    """What `source` stands for, its parts opened when they are asked for: a run, a checkpoint step, a release, the files of
    SAELens, sparsify, dictionary_learning, Gemma Scope, OpenAI, OpenMOSS or Goodfire, or "org/repo:path" of the Hugging Face hub.

    given: `model`, `hookpoint`, `text`, `context`, `index`, `store`, `mesh`, `format`, see `Given`. Raises `FormatError` where
    nothing or more than one format fits, `ConfigError` for a sweep, whose SAEs are opened one by one.
    """
    if not isinstance(source, str | Path):
        raise ConfigError(f"{type(source).__name__}: expected a path or a name")
    unknown = given.keys() - {field.name for field in dataclasses.fields(Given)}
    if unknown:
        raise ConfigError(f"{sorted(unknown)[0]}=...: expected some of {', '.join(f.name for f in dataclasses.fields(Given))}")
    found = open_all(source, Given(**given))
    if len(found) > 1:
        raise ConfigError(f"{source}: a sweep of {len(found)} SAEs; open one of {', '.join(str(s.source) for s in found)}")
    return found[0]
