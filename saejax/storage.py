"""Files: atomic JSON, digests, safe paths, who writes, barriers, and the mesh-independent fingerprint of arrays."""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from saejax.errors import DiskError, SaejaxError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")


@contextlib.contextmanager
def disk_errors(path):
    """Turns the operating system's and tensorstore's write errors into one-line `DiskError`s that name the path."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise DiskError(f"{error.filename or path}: a file or a dangling link lies where a directory is needed; remove it or "
                            "choose another directory") from error
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR):
            raise DiskError(f"{error.filename or path}: {error.strerror}; free space or choose another directory") from error
        raise
    except ValueError as error:
        words = ("No space left", "File too large", "Disk quota", "Read-only file system", "Permission denied")
        if any(w in str(error) for w in words):
            reason = next(w for w in words if w in str(error))
            raise DiskError(f"{path}: {reason}; free space or choose another directory") from error
        raise


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes a file so that it is there whole or not at all (temporary file, fsync, rename). Raises `DiskError`."""
    path = Path(path)
    # Processes of different hosts may have the same id.
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: str | Path, value) -> None:
    """`write_bytes` of sorted, indented JSON (NaN and Inf refused): equal values give equal bytes."""
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def read_json(path: str | Path, error: type[SaejaxError] = SaejaxError):
    """JSON of a file; `error` with the path when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError as e:
        raise error(f"{path}: missing") from e
    except (ValueError, OSError, RecursionError) as e:
        raise error(f"{path}: not readable as JSON ({e})") from e


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


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
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is here; nothing in a single process."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils
        multihost_utils.sync_global_devices(name)


def mixed(x):
    """The murmur3 finaliser: uint32 whose bits all depend on all bits of x."""
    x ^= x >> 16
    x *= jnp.uint32(0x85EBCA6B)
    x ^= x >> 13
    x *= jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _leaf_fingerprint(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    u = jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)
    sharding = jax.typeof(u).sharding
    for d in range(x.ndim):
        i = jax.lax.broadcasted_iota(jnp.uint32, u.shape, d, out_sharding=sharding)
        u = mixed(u ^ (i * jnp.uint32(0x9E3779B1) + jnp.uint32(d + 1)))
    return jnp.stack([jnp.sum(u, dtype=jnp.uint32), jnp.sum(mixed(u ^ jnp.uint32(0x5BD1E995)), dtype=jnp.uint32)])


@jax.jit
def _fingerprints(leaves):
    return [_leaf_fingerprint(x) for x in leaves]


def fingerprints(tree) -> dict[str, str]:
    """{leaf path: 16 hex digits} of a tree of arrays, equal for every mesh, sharding and process count.

    Each element's bits are mixed with its global coordinates (the murmur3 finaliser) and summed with wrap-around; integer
    addition is associative, so the sharding does not matter. Detects accidents, not attackers. One pass over memory; no
    host ever holds a whole array. Every process must call it.
    """
    paths, leaves = zip(*jax.tree_util.tree_flatten_with_path(tree)[0], strict=True)
    words = jax.device_get(_fingerprints(list(leaves)))
    return {jax.tree_util.keystr(p, simple=True, separator="."): f"{int(a):08x}{int(b):08x}"
            for p, (a, b) in zip(paths, (np.asarray(w) for w in words), strict=True)}
