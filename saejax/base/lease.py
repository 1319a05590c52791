"""One writer of a directory at a time: a lease, a small file that its holder renews. Importing this module imports no jax.

`writing(directory)` takes the lease of a run directory, a store or an index for as long as a job writes there. It is the file
`.lease` in it, written only if it is still what was read (tensorstore's conditional write, which file systems and buckets have).
The holder renews it every `RENEWED` seconds. Whoever wants it counts as dead a holder whose file did not change for `EXPIRES`
seconds *while it was watched*: no clocks of two machines are compared. Whether a process of the same machine lives is asked
directly. `confirm()` reads the leases again and belongs before everything that makes written work count.

With several processes process 0 holds it for all.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from saejax.base.errors import LeaseError
from saejax.base.logs import say
from saejax.base.storage import disk_errors, is_writer, plain_path, together

FILE = ".lease"
RENEWED = 15.0  # seconds between two renewals
EXPIRES = 60.0  # seconds without one, as the waiter saw it, after which the holder counts as dead
_ABSENT = b"\x02"  # tensorstore's generation of a key that is not there


@dataclass(frozen=True)
class _Holder:
    """Who holds a lease: a random name, and what tells others where to look. `beat` changes with every renewal."""

    name: str
    job: str
    machine: str   # host name; with `space` the same only where process numbers mean the same
    space: str
    process: int
    started: str   # of the process, since numbers are given again
    beat: int = 0

    @property
    def here(self) -> bool:
        return (self.machine, self.space) == (socket.gethostname(), _space())

    @property
    def alive(self) -> bool:
        """Whether the process still runs; only of one that is `here`."""
        with contextlib.suppress(PermissionError):  # alive, and somebody else's
            try:
                os.kill(self.process, 0)
            except ProcessLookupError:
                return False
        return _started(self.process) == self.started

    def __str__(self) -> str:
        return f"`{self.job}`, process {self.process} on {self.machine}"


def _space() -> str:
    """What process numbers belong to: the machine since it was started, and the container."""
    with contextlib.suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.stat('/proc/self/ns/pid').st_ino}"
    return ""


def _started(process: int) -> str:
    """When a process was started, in the kernel's ticks; empty where the system does not say."""
    with contextlib.suppress(OSError, IndexError):
        stat = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return "" if stat[0] == "Z" else stat[19]
    return ""


class _Lease:
    """A lease of this process. `holders` counts how often this process has taken it: a job inside a job shares it."""

    def __init__(self, directory: Path):
        import tensorstore
        self.directory, self.holders = directory, 1
        self._open = contextlib.ExitStack()
        place = self._open.enter_context(plain_path(directory))
        self._store = tensorstore.KvStore.open({"driver": "file", "path": f"{place}/"}).result()
        self._me = _Holder(secrets.token_hex(8), _job(), socket.gethostname(), _space(), os.getpid(), _started(os.getpid()))
        self._lock = threading.Lock()
        self._generation = self._taken()

    def _read(self) -> tuple[_Holder | None, bytes]:
        """(who holds it, its generation)"""
        found = self._store.read(FILE).result()
        try:
            return (_Holder(**json.loads(found.value)) if found.state == "value" else None), found.stamp.generation
        except (ValueError, TypeError):  # not ours, or of another version: watched like any other
            return _Holder("?", "?", "?", "", 0, "", hash(found.value)), found.stamp.generation

    def _write(self, generation: bytes) -> bytes:
        """The new generation; empty when it was no longer the one given."""
        return self._store.write(FILE, json.dumps(asdict(self._me)).encode(), if_equal=generation).result().generation

    def _taken(self) -> bytes:
        """The generation under which it is ours. Raises `LeaseError` where somebody else writes."""
        generation = self._write(_ABSENT)
        while not generation:
            holder, found = self._read()
            if holder is not None and holder.here and holder.alive:
                raise self._refused(holder)
            if holder is not None and not holder.here:
                self._watch(holder)
            generation = self._write(_ABSENT if holder is None else found)
        return generation

    def _refused(self, holder: _Holder) -> LeaseError:
        return LeaseError(f"{self.directory}: another job writes here ({holder}); wait for its end, or choose another directory")

    def _watch(self, holder: _Holder) -> None:
        """Returns when the holder gave no sign for `EXPIRES`, or is gone. Raises `LeaseError` when it did."""
        say(f"{self.directory}: {holder} wrote here and cannot be asked from this machine; waiting up to {EXPIRES:.0f} s for a "
            "sign of it")
        until = time.monotonic() + EXPIRES
        while time.monotonic() < until:
            time.sleep(min(1.0, EXPIRES / 20))
            now, _ = self._read()
            if now is None:
                return
            if now != holder:
                raise self._refused(now)
        say(f"{self.directory}: no sign of {holder}; going on in its place")

    def renew(self) -> None:
        """A new beat. What fails for another reason than a new holder (a full disk) is left to the next time."""
        with self._lock, contextlib.suppress(ValueError, OSError):
            self._me = replace(self._me, beat=self._me.beat + 1)
            self._generation = self._write(self._generation) or self._generation

    def confirm(self) -> None:
        """Raises `LeaseError` when it is no longer ours."""
        with self._lock:
            holder, _ = self._read()
        if holder is None or holder.name != self._me.name:
            who = "its lease was removed" if holder is None else f"{holder} writes here now"
            raise LeaseError(f"{self.directory}: {who}, since this job gave no sign for too long; it stops and writes no more")

    def give_back(self) -> None:
        with self._open, self._lock, contextlib.suppress(ValueError, OSError):
            self._store.write(FILE, None, if_equal=self._generation).result()


_HELD: dict[Path, _Lease] = {}
_CHANGES = threading.Lock()
_renewing: threading.Thread | None = None


@contextlib.contextmanager
def writing(*directories: str | Path) -> Iterator[None]:
    """This job alone writes in these directories, which are made when they are not there; every process calls it.

    A job within a job shares what this process holds already. Raises `LeaseError` where another job writes, `DiskError`.
    """
    paths = [Path(directory).absolute() for directory in directories]
    with contextlib.ExitStack() as held:
        with together("saejax_lease"):  # of all processes: nobody goes on when process 0 has not got it
            for path in paths if is_writer() else []:
                _take(path)
                held.callback(_give_back, path)
        yield


def _take(path: Path) -> None:
    with _CHANGES:
        if path in _HELD:
            _HELD[path].holders += 1
            return
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        lease = _Lease(path)
    with _CHANGES:
        _HELD[path] = lease
        _start_renewing()


def _give_back(path: Path) -> None:
    with _CHANGES:
        lease = _HELD[path]
        lease.holders -= 1
        if lease.holders:
            return
        del _HELD[path]
    lease.give_back()


def confirm() -> None:
    """Raises `LeaseError` when somebody else has taken a lease of this process, because it was suspended for long, say."""
    for lease in list(_HELD.values()):
        lease.confirm()


def _start_renewing() -> None:
    global _renewing
    if _renewing is None or not _renewing.is_alive():
        _renewing = threading.Thread(target=_renew, name="saejax-leases", daemon=True)
        _renewing.start()


def _renew() -> None:
    while True:
        time.sleep(RENEWED)
        for lease in list(_HELD.values()):
            lease.renew()


def _job() -> str:
    words: Iterable[str] = sys.argv[1:2] if Path(sys.argv[0]).stem in ("saejax", "main", "__main__") else ()
    return " ".join(["saejax" if words else Path(sys.argv[0]).name or "python", *words])
