"""Where documents come from: presets, local files and hub datasets, all read through the `datasets` library.

A source is one of
- a preset of `saejax.base.assets` ("shakespeare"),
- a file, directory or glob: `.jsonl .json .parquet .arrow .csv` (also `.gz`, `.zst`) with a text column, or plain text, one
  document per file (`finding` says which files of a directory),
- a hub dataset `owner/name`, `owner/name:config`, `owner/name@revision` or `owner/name:config@revision`.
"""

import contextlib
import glob
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from saejax.base import assets
from saejax.base.errors import TextError
from saejax.base.known_files import sha256_of
from saejax.base.logs import one_line_of_retries
from saejax.base.storage import text_sha256
from saejax.config import TextOptions
from saejax.data import finding
from saejax.data.permutation import Permutation, derive_key

Document = str | list[int] | list[dict]  # text, token ids, a conversation

_DOCUMENT_ORDER = 3
_STREAM_BUFFER = 10_000
_BATCH = 256
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass
class Sources:
    """Resolved sources: what they are called, their digest, and the loaded datasets (one per file type or hub name).

    `digest` covers names and sha256 of the content of files in reading order, or name and commit of hub data, which are read at
    that commit whatever the hub holds by then.
    """

    names: list[str]
    digest: str
    _options: TextOptions
    _files: dict[str, list[Path]]
    _hub: list[tuple[str, str | None, str | None]]
    _loaded: list = field(default_factory=list)

    @property
    def streaming(self) -> bool:
        """Whether documents can only be read in order."""
        return self._options.streaming

    @property
    def revisions(self) -> dict[str, str]:
        """The commit at which each hub dataset is read, by its name."""
        return {f"{name}:{config}" if config else name: commit for name, config, commit in self._hub if commit}

    def datasets(self) -> list:
        """The datasets, loaded once, each checked to have a text column. Raises `TextError`."""
        if not self._loaded:
            local = [self._load(builder, ", ".join(sorted({f.name for f in files})[:3]),
                                data_files=[glob.escape(str(f)) for f in files],
                                **({"sample_by": "document"} if builder == "text" else {}))
                     for builder, files in self._files.items()]
            hub = [self._load(name, name, name=config, revision=revision) for name, config, revision in self._hub]
            self._loaded = local + hub
        return self._loaded

    def _load(self, builder: str, shown: str, **kwargs):
        import datasets
        split = "train" if "data_files" in kwargs else self._options.split
        quiet = datasets.utils.logging
        was_shown = quiet.is_progress_bar_enabled()
        datasets.disable_progress_bars()
        try:
            with _readable(shown), one_line_of_retries(shown):
                data = datasets.load_dataset(builder, split=split, streaming=self._options.streaming, **kwargs)
                return self._text_column(data, shown, plain=builder == "text")
        finally:
            if was_shown:
                datasets.enable_progress_bars()

    def _text_column(self, data, shown: str, plain: bool):
        wanted = "text" if plain else self._options.field
        columns = data.column_names if data.column_names is not None else list(next(iter(data.take(1)), {wanted: ""}))
        if wanted not in columns:
            raise TextError(f"config.text.field: {shown} has no column {wanted!r}; it has {', '.join(columns)}")
        data = data.select_columns([wanted])
        return data if wanted == "text" else data.rename_column(wanted, "text")


@contextlib.contextmanager
def _readable(shown: str) -> Iterator[None]:
    """Whatever goes wrong in the `datasets` library, a broken line or the network, as a one-line `TextError`."""
    try:
        yield
    except TextError:
        raise
    except Exception as e:
        reason = " ".join(str(e.__cause__ or e).split())[:200]
        raise TextError(f"config.text.source: {shown!r} cannot be read ({type(e).__name__}: {reason})") from e


def resolve(options: TextOptions) -> Sources:
    """Finds the sources and digests them, without reading documents. Raises `TextError` listing every bad source."""
    files: dict[str, list[Path]] = {}
    hub, names, parts, problems = [], [], [], []
    for source in options.source:
        try:
            found = finding.find(source, options.split)
        except TextError as e:
            problems.append(str(e))
            continue
        if isinstance(found, list):
            names.append(source if source in assets.TEXTS else Path(source).name)
            for path in found:
                files.setdefault(finding.builder(path), []).append(path)
        else:
            names.append(source)
            hub.append(found)
    if problems:
        raise TextError("; ".join(problems))
    for builder, paths in files.items():
        for path in paths:
            parts += [builder, path.name, sha256_of(path)]
    for i, (name, config, revision) in enumerate(hub):
        commit = _hub_commit(name, config, revision)
        parts += ["hub", name, config or "", commit, options.split]
        hub[i] = name, config, commit if _COMMIT.fullmatch(commit) else revision
    return Sources(names, text_sha256(*parts), options, files, hub)


def _hub_commit(name: str, config: str | None, revision: str | None) -> str:
    """The commit that the hub dataset stands at; `datasets` calls it the builder's hash."""
    import datasets
    try:
        with one_line_of_retries(name):
            return datasets.load_dataset_builder(name, config, revision=revision).hash
    except Exception as e:
        reason = " ".join(str(e).split())[:200]
        raise TextError(f"config.text.source: {name!r} is no preset ({', '.join(assets.TEXTS)}), no local file and not "
                        f"readable from the hub ({type(e).__name__}: {reason})") from e


def read(sources: Sources, seed: int, start: int = 0) -> Iterator[list[Document | None]]:
    """Batches of documents in shuffled order (or in reading order), from document `start` on.

    Map-style data use a keyed permutation of all documents: any start costs nothing. Streamed data use the library's
    shuffle buffer of 10,000 documents and skip `start` documents, which reads them but does not tokenise them.
    """
    options, parts = sources._options, sources.datasets()
    if options.streaming:
        return _read_stream(parts, options, seed, start, ", ".join(sources.names))
    return _read_map(parts, options, seed, start)


def _read_map(parts: list, options: TextOptions, seed: int, start: int) -> Iterator[list[Document | None]]:
    total = sum(map(len, parts))
    for a in range(start, total, _BATCH):
        yield _at(parts, options, seed, np.arange(a, min(a + _BATCH, total)))


def count(sources: Sources) -> int:
    """The number of documents of map-style data."""
    return sum(map(len, sources.datasets()))


def read_at(sources: Sources, seed: int, positions: np.ndarray) -> list[Document | None]:
    """The documents of map-style data at these positions of the shuffled order."""
    return _at(sources.datasets(), sources._options, seed, positions)


def _at(parts: list, options: TextOptions, seed: int, positions: np.ndarray) -> list[Document | None]:
    ends = np.cumsum([len(p) for p in parts])
    rows = Permutation(int(ends[-1]), derive_key(seed, _DOCUMENT_ORDER))(positions) if options.shuffle else positions
    which = np.searchsorted(ends, rows, side="right")
    out = np.empty(len(rows), object)
    for p in np.unique(which):
        mine = np.flatnonzero(which == p)
        local = rows[mine] - (ends[p - 1] if p else 0)
        out[mine] = _documents(parts[p][local.tolist()]["text"])
    return out.tolist()


def _read_stream(parts: list, options: TextOptions, seed: int, start: int, shown: str) -> Iterator[list[Document | None]]:
    import datasets
    with _readable(shown):
        data = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
        if options.shuffle:
            data = data.shuffle(seed=seed, buffer_size=_STREAM_BUFFER)
        rows = iter(data.skip(start) if start else data)
        while batch := list(itertools.islice(rows, _BATCH)):
            yield _documents([row["text"] for row in batch])


def _documents(values: list) -> list[Document | None]:
    return [value if value is None or isinstance(value, str) else _not_text(value) for value in values]


def _not_text(value) -> Document:
    """Token ids or a conversation, as plain Python. Raises `TextError` for what is neither."""
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):  # a list of structs, by column
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if isinstance(value, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return value
    if isinstance(value, list) and all(isinstance(item, dict) and {"role", "content"} <= item.keys() for item in value):
        return [{name: said for name, said in item.items() if said is not None} for item in value]
    raise TextError(f"config.text.field: the column holds {type(value).__name__}, not text, token ids or conversations (lists of "
                    "role and content)")
