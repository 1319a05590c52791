"""Files: atomic JSON, digests, safe paths, who writes, barriers. Importing this module does not import jax."""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from saejax.base.errors import DiskError, Preempted, SaejaxError

# A `Path` has lost one of the two strokes.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+(?=://)|(?:gs|gcs|s3|az|abfs|hdfs|https?)(?=:/))")
_PLAIN = re.compile(r"[A-Za-z0-9_.\-+=,/]*")
_VIEW_SECONDS = 60  # that a network file system may keep a listing
_Result = TypeVar("_Result")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")


@contextlib.contextmanager
def disk_errors(path):
    """Turns the operating system's and tensorstore's write errors into one-line `DiskError`s that name the path."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EISDIR:
            raise DiskError(f"{error.filename2 or path}: is a directory; name a file") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise DiskError(f"{error.filename or path}: a file or a dangling link lies where a directory is needed; remove it or "
                            "choose another directory") from error
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise DiskError(f"{error.filename or path}: {error.strerror}; free space or choose another directory") from error
        raise
    except ValueError as error:
        words = ("No space left", "File too large", "Disk quota", "Read-only file system", "Permission denied")
        if any(w in str(error) for w in words):
            reason = next(w for w in words if w in str(error))
            raise DiskError(f"{path}: {reason}; free space or choose another directory") from error
        raise


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write that takes its place when the body is done, whole or not at all (temporary file, fsync, rename).

    Raises `DiskError`.
    """
    path = Path(path)
    # Processes of different hosts may have the same id.
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes a file so that it is there whole or not at all. Raises `DiskError`."""
    with replacing(path) as f:
        f.write(data)


def reserve(path: str | Path, size: int) -> None:
    """Makes a file of `size` zero bytes that have their room on the disk: writing into a mapping of it cannot fail then, which
    would kill the process without a word. Raises `DiskError`.
    """
    with disk_errors(path), open(path, "wb") as f:
        if hasattr(os, "posix_fallocate") and size:
            os.posix_fallocate(f.fileno(), 0, size)
        else:
            for start in range(0, size, 1 << 22):
                f.write(bytes(min(1 << 22, size - start)))


def check_room(directory: str | Path, needed: int) -> None:
    """Raises `DiskError` unless `needed` bytes are free where the directory is or will be."""
    place = Path(directory).absolute()
    while not place.exists():
        place = place.parent
    with disk_errors(directory):
        free = shutil.disk_usage(place).free
    if free < needed:
        raise DiskError(f"{directory}: {needed:,} bytes will be written and {free:,} are free; free space or choose another "
                        "directory")


def write_json(path: str | Path, value) -> None:
    """`write_bytes` of `json_bytes`."""
    write_bytes(path, json_bytes(value))


def json_bytes(value) -> bytes:
    """Sorted, indented JSON (NaN and Inf refused): equal values give equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def read_json(path: str | Path, error: type[SaejaxError] = SaejaxError):
    """JSON of a file; `error` with the path when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError as e:
        raise error(f"{path}: missing") from e
    except (ValueError, OSError, RecursionError) as e:
        raise error(f"{path}: not readable as JSON ({e})") from e


def file_sha256(path: str | Path, advance: Callable[[int], object] = lambda _: None) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. advance: is told how many have been read."""
    found = hashlib.sha256()
    with open(path, "rb", buffering=0) as f:
        for block in iter(lambda: f.read(1 << 20), b""):
            found.update(block)
            advance(len(block))
    return found.hexdigest()


def text_sha256(*parts: str | bytes) -> str:
    """SHA-256 over length-prefixed parts: ("ab", "c") and ("a", "bc") differ."""
    h = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        h.update(len(data).to_bytes(8, "little"))
        h.update(data)
    return h.hexdigest()


def safe_name(name: str, error: type[SaejaxError] = SaejaxError) -> str:
    """`name` if it can be one path component (letters, digits, `_ . -`, no leading dot or dash); else `error`."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        raise error(f"{name!r} is not a safe file name (letters, digits, '_', '.', '-')")
    return name


def bucket_trouble(place: str | Path) -> str:
    """What is wrong with an address such as gs://bucket/run, which a file system would take for a folder "gs:"; else empty."""
    scheme = _SCHEME.match(str(place))
    if not scheme:
        return ""
    return (f"{str(place)!r} is an address of {scheme[1]!r}, not a path; buckets are not supported yet, mount it as a file "
            "system or copy it")


@contextlib.contextmanager
def plain_path(path: str | Path) -> Iterator[Path]:
    """An absolute path to the same place for libraries that take some characters for patterns or parts of an address: where
    `path` has other than letters, digits and `_ . - + = ,` it leads through a link in the temporary folder.
    """
    path = Path(path).absolute()
    if _PLAIN.fullmatch(str(path)):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="saejax-") as folder:
        link = Path(folder) / "link"
        link.symlink_to(path)
        yield link


def inside(root: str | Path, relative: str, error: type[SaejaxError] = SaejaxError) -> Path:
    """`root/relative`, refused when any component is unsafe or when a link leads out of `root`."""
    path = Path(root)
    for part in Path(relative).parts:
        path = path / safe_name(part, error)
    if not path.resolve().is_relative_to(Path(root).resolve()):
        raise error(f"{path}: leads outside {root}")
    return path


def is_writer() -> bool:
    """True in the one process that writes shared files."""
    import jax
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is here; nothing in a single process."""
    import jax
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils
        multihost_utils.sync_global_devices(name)


def patient(action: Callable[[], _Result], error: type[SaejaxError]) -> _Result:
    """What an action gives that reads files of another process: tried again for a minute while it raises this error, since a
    shared file system may show what is there that much later. A single process does not wait.
    """
    import jax
    deadline = time.monotonic() + _VIEW_SECONDS * (jax.process_count() > 1)
    while True:
        try:
            return action()
        except error:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.5)


def decided(answer: int) -> int:
    """What process 0 says, in every process: views of a shared directory may be seconds old. For `bool` and small numbers."""
    import jax
    if jax.process_count() == 1:
        return answer
    import numpy
    from jax.experimental import multihost_utils
    return type(answer)(multihost_utils.broadcast_one_to_all(numpy.array(answer)))


@contextlib.contextmanager
def together(name: str):
    """What all processes do or none: a `SaejaxError` in one of them becomes one in every process, after the body. It becomes
    `Preempted` where nothing else stopped any of them.
    """
    import jax
    if jax.process_count() == 1:
        yield
        return
    error = None
    try:
        yield
    except SaejaxError as e:
        error = e
    import numpy
    from jax.experimental import multihost_utils
    kind = 0 if error is None else 1 if isinstance(error, Preempted) else 2
    kinds_P = multihost_utils.process_allgather(numpy.array([kind])).ravel()
    if error is not None:
        raise error
    if kinds_P.any():
        stop = SaejaxError if kinds_P.max() == 2 else Preempted
        raise stop(f"{name}: process {kinds_P.argmax()} stopped; its own line says why")
