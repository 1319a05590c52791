"""Which files a source stands for: a file, a folder, a glob.

A folder gives its data files (of those that are named by split, as `datasets` writes them, only the ones of the wanted split), or
where it has none, its plain text. Hidden files, dataset cards and what describes a dataset are not read.
"""

import difflib
import glob
import re
from pathlib import Path

from saejax.base import assets
from saejax.base.errors import TextError
from saejax.base.logs import say

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
_PLAIN = (".txt", ".md", ".rst", ".py", ".tex", ".html", ".c", ".h", ".js", ".java", ".rs", ".go")
_PACKED = (".gz", ".zst")  # of data files; the library unpacks them
_HUB = re.compile(r"(?P<name>[\w.\-]+(/[\w.\-]+)?)(:(?P<config>[\w.\-]+))?(@(?P<revision>[\w.\-]+))?")
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}
# Words for a split, in the path of a data file.
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
           "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation"}
KNOWN = (*BUILDERS, *_PLAIN)

Hub = tuple[str, str | None, str | None]


def builder(path: Path) -> str:
    """The builder of `datasets` that reads a file."""
    return BUILDERS.get(_ending(path), "text")


def _ending(path: Path) -> str:
    """The suffix of a file; of a packed data file that of the data."""
    if path.suffix in _PACKED and Path(path.stem).suffix in BUILDERS:
        return Path(path.stem).suffix
    return path.suffix


def find(source: str, split: str) -> list[Path] | Hub:
    """The files of a source in the order of their names, or (name, config, revision) of a hub dataset. Raises `TextError`."""
    if source in assets.TEXTS:
        return [assets.text_path(source)]
    path = Path(source).expanduser()
    if path.is_file():
        if _ending(path) not in KNOWN:
            raise TextError(f"config.text.source: {source!r} ends in none of {' '.join(KNOWN)}")
        return [path]
    if path.is_dir():
        return _of_folder(path, source, split)
    if glob.has_magic(source):
        found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file() and _ending(p) in KNOWN)
        if not found:
            raise TextError(f"config.text.source: {source!r} holds no file ending in {' '.join(KNOWN)}")
        return found
    return _of_hub(source, path)


def _of_folder(folder: Path, source: str, split: str) -> list[Path]:
    every = sorted(p for p in folder.rglob("*") if p.is_file() and _ending(p) in KNOWN and p.name not in _DESCRIPTIONS
                   and not any(part.startswith(".") for part in p.relative_to(folder).parts))
    data = [p for p in every if _ending(p) in BUILDERS]
    found = data or [p for p in every if not _is_card(p)]
    if not found:
        raise TextError(f"config.text.source: {source!r} holds no file ending in {' '.join(KNOWN)}")
    splits = {p: _split_of(p.relative_to(folder)) for p in data}
    there = sorted({name for name in splits.values() if name})
    if there:
        wanted = _SPLITS.get(split, split)
        found = [p for p in data if splits[p] == wanted]
        if not found:
            raise TextError(f"config.text.split: {source!r} has files of {' and of '.join(there)}, none of {split!r}; name one "
                            "of these")
    if len(found) < len(every):
        names = ", ".join(str(p.relative_to(folder)) for p in found[:3]) + (", ..." if len(found) > 3 else "")
        say(f"text: of {source}, {len(found)} of {len(every)} files are read: {names}")
    return found


def _is_card(path: Path) -> bool:
    """Whether a file is a dataset card: a README that begins with its data."""
    if path.name.lower() != "readme.md":
        return False
    with path.open("rb") as stream:
        return stream.read(3) == b"---"


def _split_of(path: Path) -> str | None:
    """The split that a path names, its last word that is one: `data/train-00000-of-00001.parquet`, `test/a.jsonl`."""
    words = re.split(r"[^a-z]+", str(path).lower())
    return next((_SPLITS[word] for word in reversed(words) if word in _SPLITS), None)


def _of_hub(source: str, path: Path) -> Hub:
    match = _HUB.fullmatch(source)
    missing = f"config.text.source: {source!r} is missing: no such file, directory or preset ({', '.join(assets.TEXTS)})"
    if not match or _ending(path) in KNOWN or source.startswith(("~", "./", "../")):
        raise TextError(missing)
    near = _misspelt(Path(match["name"]))
    above = Path(match["name"]).parent
    if near or above != Path(".") and above.is_dir():  # a misspelt path, which the hub need not be asked about
        raise TextError(missing + (f"; did you mean {near}?" if near else ""))
    return match["name"], match["config"], match["revision"]


def _misspelt(path: Path) -> Path | None:
    """What is there under nearly the same name, or under the same name in a folder of nearly the same name."""
    def nearly(name: str, folder: Path) -> list[Path]:
        there = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        return [folder / found for found in difflib.get_close_matches(name, there)]

    if path.parent.is_dir():
        found = nearly(path.name, path.parent)
    else:
        found = [p / path.name for p in nearly(path.parent.name, Path(".")) if (p / path.name).exists()]
    return found[0] if found else None
