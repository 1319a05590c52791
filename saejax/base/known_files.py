"""SHA-256 of large files that do not change, computed once: texts and weights are gigabytes, and every start asks for them."""

import contextlib
import hashlib
import json
import time
from pathlib import Path

from saejax.base import assets
from saejax.base.storage import file_sha256, write_json

LEAST = 16 << 20  # bytes of a file from which on its digest is kept
_SETTLED = 2.0    # seconds since its last change after which a file system's clock shows the next one


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file. Of a large one it is kept in `<cache>/digests` under the file's place, and holds as long as device,
    inode, size and times of change are the same.
    """
    path = Path(path).resolve()
    found = path.stat()
    if found.st_size < LEAST:
        return file_sha256(path)
    state = [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
    kept = assets.cache_dir() / "digests" / f"{hashlib.sha256(str(path).encode(errors='surrogateescape')).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        before = json.loads(kept.read_text())
        if before["state"] == state:
            return before["sha256"]
    digest = file_sha256(path)
    if time.time() - max(found.st_mtime, found.st_ctime) > _SETTLED and path.stat().st_mtime_ns == found.st_mtime_ns:
        with contextlib.suppress(Exception):  # a cache that cannot be written costs time only
            write_json(kept, {"state": state, "sha256": digest})
    return digest
