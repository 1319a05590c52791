"""Which torch file a path means, and a cheap look at what it holds."""

from pathlib import Path

from saejax.base.errors import FormatError
from saejax.formats.archives import open_torch

SUFFIXES = (".pt", ".pth")


def torch_files(path: Path) -> list[Path]:
    """The file itself, or the torch files of a directory (not of those below it)."""
    if path.is_file():
        return [path] if path.suffix in SUFFIXES else []
    return sorted(p for p in path.glob("*") if p.suffix in SUFFIXES and p.is_file()) if path.is_dir() else []


def only_torch_file(path: Path) -> Path:
    """The one torch file that a path means. Raises `FormatError` for several, naming them."""
    files = torch_files(path)
    if len(files) != 1:
        raise FormatError(f"{path}: {len(files)} torch files ({', '.join(f.name for f in files[:5])}); name the one to load")
    return files[0]


def keys_of(path: Path) -> set[str]:
    """Names of tensors and values of the one torch file that a path means; empty where there is none that can be read."""
    files = torch_files(path)
    if len(files) != 1:
        return set()
    try:
        file = open_torch(files[0])
    except FormatError:
        return set()
    return set(file.entries) | set(file.values)
