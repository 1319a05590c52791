"""The state of all features on disk, while an index is built: files of ranges of features.

Each is written by a process whose devices hold these features, and read by whoever needs them: no host holds more than two files
beside the shards of its devices.

    state.json             written last: how many contexts, and the ranges. Until then the saving before it counts
    state_CONTEXTS/        FIRST.npz of each range: the fields of `FeatureState`, and what they belong to
"""

import functools
import json
import shutil
import zipfile
import zlib
from pathlib import Path

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, SingleDeviceSharding

from saejax.base import lease, sharding
from saejax.base.distributed import gathered
from saejax.base.errors import FeatureIndexError
from saejax.base.ranges import ranges
from saejax.base.storage import barrier, is_writer, patient, read_json, replacing, together, write_json
from saejax.features.index import state as st
from saejax.features.index.source import check_part
from saejax.features.index.state import FIELDS, FeatureState

PART = 32_768  # features of a file: 63 MB
NOTE = "state.json"


class SavedState:
    """The states of all features of the first `contexts` contexts, as host arrays, by range."""

    def __init__(self, progress: Path, source: dict, note: dict):
        """note: what is in `NOTE`."""
        self.contexts, self.features = note["contexts"], note["borders"][-1]
        self._folder, self._source, self._borders = _folder(progress, self.contexts), source, np.array(note["borders"])
        self._whole = functools.lru_cache(maxsize=1)(lambda part: self._read(part, FIELDS))

    @classmethod
    def open(cls, progress: Path, source: dict) -> "SavedState | None":
        """What was saved last; None where nothing was. Every process must call it."""
        file, note = progress / NOTE, None
        with together("saejax_index_saved"):
            if is_writer() and file.is_file():
                note = read_json(file, FeatureIndexError)
                check_part(file, note.pop("source", {}), source)
        note = gathered(note)[0]
        return None if note is None else cls(progress, source, note)

    def column(self, name: str) -> np.ndarray:
        """A field of all features."""
        shape, dtype, _ = getattr(st.SHAPES, name)
        out = np.empty((self.features, *shape), dtype)
        for part, (first, stop) in enumerate(zip(self._borders, self._borders[1:], strict=False)):
            out[first:stop] = self._read(part, (name,))[name]
        return out

    @functools.cached_property
    def fired(self) -> np.ndarray:
        return self.column("fired")

    def block(self, first: int, stop: int) -> FeatureState:
        """Features first to stop - 1. One file is kept for the next block."""
        last = np.searchsorted(self._borders, stop)
        pieces = []
        for part in range(np.searchsorted(self._borders, first, "right") - 1, last):
            start, fields = self._borders[part], self._whole(part)
            pieces.append({name: value[max(first - start, 0):stop - start] for name, value in fields.items()})
        return FeatureState(**{name: np.concatenate([piece[name] for piece in pieces]) if len(pieces) > 1 else pieces[0][name]
                               for name in FIELDS})

    def placed(self, mesh: Mesh) -> FeatureState:
        """On a mesh: every process reads the features of its own devices, file by file."""
        held = sharding.sharding(mesh, "features").addressable_devices_indices_map((self.features,))
        held = {device: index[0].indices(self.features)[:2] for device, index in held.items()}
        states = {device: jax.jit(st.empty, static_argnums=0, out_shardings=SingleDeviceSharding(device))(stop - first)
                  for device, (first, stop) in held.items()}
        for start, end in zip(self._borders, self._borders[1:], strict=False):
            for device, (first, stop) in held.items():
                a, b = max(start, first), min(end, stop)
                if a < b:
                    states[device] = _filled(states[device], jax.device_put(self.block(a, b), device), np.int32(a - first))
        return FeatureState(**{name: jax.make_array_from_single_device_arrays(
            (self.features, *getattr(st.SHAPES, name)[0]), sharding.sharding(mesh, *logical),
            [getattr(state, name) for state in states.values()]) for name, logical in st.LOGICAL.items()})

    def _read(self, part: int, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        first = int(self._borders[part])
        file = self._folder / f"{first}.npz"

        def read() -> dict[str, np.ndarray]:
            try:
                with np.load(file, allow_pickle=False) as saved:
                    note = json.loads(str(saved["note"]))
                    found = {name: saved[name] for name in names}
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise FeatureIndexError(f"{file}: not readable ({' '.join(str(error).split())[:200]}); delete "
                                        f"{self._folder.parent} to begin again") from error
            check_part(file, note["source"], self._source)
            if (note["contexts"], note["first"]) != (self.contexts, first):
                raise FeatureIndexError(f"{file}: holds features from {note['first']} on after {note['contexts']} contexts, "
                                        f"expected {first} and {self.contexts}; delete {self._folder.parent} to begin again")
            return found

        return patient(read, FeatureIndexError)


def save(progress: Path, state: FeatureState, contexts: int, source: dict) -> SavedState:
    """Every process writes what its devices hold, file by file; then the note that makes it count; what was saved before is gone
    afterwards. Every process must call it. Raises `DiskError`.
    """
    parts, folder = ranges(sharding.row_shards(state.max), PART), _folder(progress, contexts)
    with together("saejax_index_state"):
        for part in parts:
            if part.process != jax.process_index():
                continue
            with replacing(folder / f"{part.first}.npz") as file:
                np.savez(file, note=json.dumps({"source": source, "contexts": contexts, "first": part.first}),
                         **{name: sharding.rows_here(getattr(state, name), part.first, part.stop) for name in FIELDS})
    note = {"contexts": contexts, "borders": [0, *(part.stop for part in parts)]}
    if is_writer():
        lease.confirm()
        write_json(progress / NOTE, note | {"source": source})
        for old in progress.glob("state_*"):
            if old != folder:
                shutil.rmtree(old)
    barrier("saejax_index_saved")
    return SavedState(progress, source, note)


def _folder(progress: Path, contexts: int) -> Path:
    return progress / f"state_{contexts}"


@functools.partial(jax.jit, donate_argnums=0)
def _filled(state: FeatureState, block: FeatureState, first: jax.Array) -> FeatureState:
    return jax.tree.map(lambda whole, part: lax.dynamic_update_slice_in_dim(whole, part, first, 0), state, block)
