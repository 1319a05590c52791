"""Second pass of an index: what a feature does at the tokens around its examples."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.base import lease, sharding
from saejax.base.errors import FeatureIndexError
from saejax.base.storage import barrier, is_writer, read_json, reserve, write_json
from saejax.features.index.examples import BEFORE, WINDOW, Examples
from saejax.sae.inference import SAE, encode_raw


class Windows:
    """`acts` [examples, window] float32 in a file beside the progress of the build; in memory one batch of it.

    The window of an example are up to 23 tokens before it and what follows, 32 in all, moved so that it lies in the context.
    """

    def __init__(self, folder: Path, examples: Examples, context: int, done: int):
        self.context, self.window, self.done = context, min(WINDOW, context), done
        self._folder = folder
        self.context_E, self.position_E = np.divmod(examples.row.astype(np.int64), context)
        self.start_E = np.clip(self.position_E - BEFORE, 0, context - self.window)
        self._feature_E = examples.feature
        self._order = np.argsort(self.context_E, kind="stable")
        self._sorted = self.context_E[self._order]
        shape = (len(examples.row), self.window)
        self.acts = np.memmap(folder / "windows.bin", np.float32, "r+" if is_writer() else "r", shape=shape) if shape[0] else \
            np.zeros(shape, np.float32)

    @classmethod
    def open(cls, folder: Path, examples: Examples, context: int) -> "Windows":
        """As an interrupted pass left it, or new."""
        file, bytes_ = folder / "windows.bin", 4 * len(examples.row) * min(WINDOW, context)
        saved = folder / "windows.json"
        done = 0
        if saved.is_file() and file.is_file() and file.stat().st_size == bytes_:
            done = int(read_json(saved, FeatureIndexError)["contexts"])
        elif is_writer():
            reserve(file, bytes_)
        barrier("saejax_index_windows")
        return cls(folder, examples, context, done)

    def save(self) -> None:
        """What is filled is on the disk before the note that says so."""
        if is_writer():
            lease.confirm()
            if len(self.acts):
                self.acts.flush()
            write_json(self._folder / "windows.json", {"contexts": self.done})

    def fill(self, gather: Callable, sae: SAE, x_BD: jax.Array, keep_B: jax.Array, first: int, last: int) -> None:
        """Fills the windows of all examples in contexts first .. last - 1, which are the batch's first."""
        chosen = self._order[slice(*np.searchsorted(self._sorted, (first, last)))]
        self.done = last
        if not len(chosen):
            return
        size = 1 << (len(chosen) - 1).bit_length()  # few shapes, few compilations
        row_E = np.zeros(size, np.int32)
        feature_E = np.full(size, -1, np.int32)
        row_E[:len(chosen)] = (self.context_E[chosen] - first) * self.context + self.start_E[chosen]
        feature_E[:len(chosen)] = self._feature_E[chosen]
        acts_EW = np.asarray(jax.device_get(gather(sae.params, x_BD, keep_B, row_E, feature_E)))
        if is_writer():
            self.acts[chosen] = acts_EW[:len(chosen)]

    def make_gather(self, sae: SAE) -> Callable:
        """gather(params, x [B, D], keep [B], row [E], feature [E]) -> [E, window] activations of a feature from a row on.

        Every device looks up what lies on it; one all-reduce of [E, window] puts it together.
        """
        window, spec, norm = self.window, sae.cfg.spec, sae.cfg.input_norm

        def local(acts_BF, keep_B, row_E, feature_E):
            B, F = acts_BF.shape
            row_EW = row_E[:, None] + jnp.arange(window) - B * lax.axis_index("data")
            feature_E = feature_E - F * lax.axis_index("dict")
            here = (row_EW >= 0) & (row_EW < B) & ((feature_E >= 0) & (feature_E < F))[:, None]
            at = jnp.clip(row_EW, 0, B - 1)
            value_EW = acts_BF[at, jnp.clip(feature_E, 0, F - 1)[:, None]]
            return lax.psum(jnp.where(here & keep_B[at], value_EW, 0.0), ("data", "dict"))

        gather = jax.shard_map(local, mesh=sae.mesh, in_specs=(sharding.spec("rows", "features"), sharding.spec("rows"),
                                                               sharding.spec(), sharding.spec()),
                               out_specs=sharding.spec(), check_vma=False)
        return jax.jit(lambda params, x_BD, keep_B, row_E, feature_E:
                       gather(encode_raw(spec, norm, params, x_BD), keep_B, row_E, feature_E))
