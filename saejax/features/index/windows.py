"""Second pass of an index: what a feature does at the tokens around its examples."""

from pathlib import Path

import jax
import numpy as np

from saejax.base import lease
from saejax.base.errors import FeatureIndexError
from saejax.base.storage import barrier, is_writer, read_json, reserve, write_json
from saejax.features.index.examples import BEFORE, WINDOW, Examples
from saejax.features.index.lookup import Lookup
from saejax.features.index.source import check_part
from saejax.sae.inference import SAE

_AT_ONCE = 1 << 17  # examples


class Windows:
    """`acts` [examples, window] float32 in a file beside the progress of the build; in memory one batch of it.

    The window of an example are up to 23 tokens before it and what follows, 32 in all, moved so that it lies in the context.
    """

    def __init__(self, folder: Path, examples: Examples, context: int, done: int, source: dict):
        self.context, self.window, self.done = context, min(WINDOW, context), done
        self._folder, self._source = folder, source
        self.context_E, self.position_E = np.divmod(examples.row.astype(np.int64), context)
        self.start_E = np.clip(self.position_E - BEFORE, 0, context - self.window)
        self._feature_E = examples.feature
        self._order = np.argsort(self.context_E, kind="stable")
        self._sorted = self.context_E[self._order]
        shape = (len(examples.row), self.window)
        self.acts = np.memmap(folder / "windows.bin", np.float32, "r+" if is_writer() else "r", shape=shape) if shape[0] else \
            np.zeros(shape, np.float32)

    @classmethod
    def open(cls, folder: Path, examples: Examples, context: int, source: dict) -> "Windows":
        """As an interrupted pass left it, or new. Raises `FeatureIndexError` for those of an index of something else."""
        file, bytes_ = folder / "windows.bin", 4 * len(examples.row) * min(WINDOW, context)
        saved = folder / "windows.json"
        done = 0
        if saved.is_file() and file.is_file() and file.stat().st_size == bytes_:
            note = read_json(saved, FeatureIndexError)
            check_part(saved, note.get("source", {}), source)
            done = int(note["contexts"])
        elif is_writer():
            reserve(file, bytes_)
        barrier("saejax_index_windows")
        return cls(folder, examples, context, done, source)

    def save(self) -> None:
        """What is filled is on the disk before the note that says so."""
        if is_writer():
            lease.confirm()
            if len(self.acts):
                self.acts.flush()
            write_json(self._folder / "windows.json", {"contexts": self.done, "source": self._source})

    def fill(self, lookup: Lookup, sae: SAE, x_BD: jax.Array, keep_B: jax.Array, first: int, last: int) -> None:
        """Fills the windows of all examples in contexts first .. last - 1, which are the batch's first."""
        chosen = np.sort(self._order[slice(*np.searchsorted(self._sorted, (first, last)))])  # by feature
        self.done = last
        table = lookup.prepare(sae.params, x_BD) if len(chosen) else None
        for start in range(0, len(chosen), _AT_ONCE):
            part = chosen[start:start + _AT_ONCE]
            size = 1 << (len(part) - 1).bit_length()  # few shapes, few compilations
            row_E = np.zeros(size, np.int32)
            feature_E = np.full(size, -1, np.int32)
            row_E[:len(part)] = (self.context_E[part] - first) * self.context + self.start_E[part]
            feature_E[:len(part)] = self._feature_E[part]
            acts_EW = np.asarray(jax.device_get(lookup.gather(sae.params, table, keep_B, row_E, feature_E)))
            if is_writer():
                self.acts[part] = acts_EW[:len(part)]
