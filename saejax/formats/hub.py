"""SAEs of a Hugging Face repository: "org/repo:path/in/repo" or "org/repo@revision:path", through the library's own cache."""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from saejax.base.errors import FormatError
from saejax.base.logs import one_line_of_retries
from saejax.base.storage import safe_name
from saejax.formats.keys import counted, one_of

_SOURCE = re.compile(r"(?P<repo>[\w.\-]+/[\w.\-]+)(?:@(?P<revision>[\w.\-/]+))?:(?P<path>[^:]*)")
# The only files that are fetched from a folder: those that some format consists of.
WANTED = ("cfg.json", "config.json", "hyperparams.json", "sae_weights.safetensors", "sae_weights-?????-of-?????.safetensors",
          "sae.safetensors", "params.safetensors", "params.npz", "ae.pt", "activation_scaler.json",
          "checkpoints/final.safetensors")
_FILES = (".pt", ".pth", ".npz")


@dataclass(frozen=True)
class Source:
    """A place in a repository. revision: a branch, tag or commit; None: the default branch."""

    repo: str
    revision: str | None
    path: str

    @property
    def origin(self) -> str:
        return f"{self.repo}:{self.path}"


def parse(path: str | Path) -> Source | None:
    """The place in a repository that `path` means, or None for a path of this machine.

    Raises `FormatError` for a path in a repository that has unsafe components. Whatever exists on this machine under that name
    is a path.
    """
    match = _SOURCE.fullmatch(str(path)) if isinstance(path, str) else None
    if match is None or Path(path).exists():
        return None
    inside = match["path"].strip("/")
    for part in PurePosixPath(inside).parts:
        safe_name(part, FormatError)
    return Source(match["repo"], match["revision"], inside)


def fetch(source: Source) -> tuple[Path, str]:
    """(local path, commit) of a place in a repository: downloaded into the Hugging Face cache, or found there when offline.

    Raises one `FormatError` when the network, the repository, the revision or the path is missing.
    """
    import huggingface_hub
    from huggingface_hub import errors

    single = source.path.endswith(_FILES)
    folder = source.path.rpartition("/")[0] if single else source.path
    above = folder.rpartition("/")[0]  # sparsify keeps the run's config one level up
    patterns = [_join(folder, name) for name in WANTED if not single or name in ("config.json",)]
    patterns += [source.path] if single else [_join(above, "config.json")]
    try:
        with one_line_of_retries(source.repo):
            snapshot = Path(huggingface_hub.snapshot_download(source.repo, revision=source.revision, allow_patterns=patterns))
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError, errors.OfflineModeIsEnabled, OSError,
            RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FormatError(f"{source.origin}: could not be fetched from the Hugging Face hub and is not in its cache "
                          f"({type(error).__name__}: "
                          f"{reason}); check the name, the network and HF_HUB_OFFLINE, or download the files and give their "
                          "folder") from error
    local = snapshot / source.path
    if not local.exists() or local.is_dir() and not any(file.is_file() for file in local.iterdir()):
        if found := _below(source, snapshot):
            raise FormatError(f"{source.origin}: no SAE itself, but the repository (commit {snapshot.name}) holds {len(found)} "
                              f"below it; give {source.origin}{'/' if source.path else ''} and {one_of(found)}")
        raise FormatError(f"{source.origin}: the repository (commit {snapshot.name}) has none of the files that are read there "
                          f"({', '.join(WANTED)}); give the folder that holds them, or a .pt or .npz file")
    return local, snapshot.name


def _below(source: Source, snapshot: Path) -> list[str]:
    """The places below this one that hold weights of an SAE, from it: of the repository, without the network of its cache."""
    import huggingface_hub
    from huggingface_hub import errors
    try:
        files = huggingface_hub.list_repo_files(source.repo, revision=snapshot.name)
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError):
        files = [file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*") if file.is_file()]
    start, found = f"{source.path}/" if source.path else "", set()
    for file in (file.removeprefix(start) for file in files if file.startswith(start)):
        weights = next((name for name in WANTED if not name.endswith(".json") and fnmatchcase(file, f"*/{name}")), None)
        if weights or file.endswith(_FILES):
            found.add(file.rsplit("/", 1 + weights.count("/"))[0] if weights else file)
    return sorted((place for place in found if place.rpartition("/")[0] not in found), key=counted)  # no data beside an SAE


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
