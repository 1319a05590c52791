"""`saejax release`: a checkpoint -> a directory that loads anywhere."""

import dataclasses

import numpy as np

from saejax.base.errors import ConfigError
from saejax.base.records import RunPaths
from saejax.base.storage import is_writer
from saejax.cli.arguments import Arguments
from saejax.cli.subjects import subjects
from saejax.data.store import Store, check_matches, is_complete
from saejax.data.stream import Stream
from saejax.formats.release import release, with_one_threshold
from saejax.runs.evaluation import known, scalars
from saejax.runs.subject import Subject
from saejax.train.checkpoint import read_meta

CALIBRATION_ROWS = 65_536  # rows that --jumprelu measures its threshold on, or all that the store has


def start(arguments: Arguments) -> int:
    """The job, of every run given."""
    found = subjects(arguments)
    if len(found) > 1 and arguments.out is not None:
        raise ConfigError(f"saejax release: --out={arguments.out} takes one run; release them one by one")
    for subject in found:
        if not subject.trained_here:
            raise ConfigError(f"saejax release: {subject.source} is no run or checkpoint step; saejax convert writes other files")
        sae, step = subject.sae, subject.step_dir
        if arguments.option("jumprelu") and subject.config.sae.kind == "topk":
            sae = with_one_threshold(step, subject.mesh, rows_ahead(subject))
        out = release(sae, arguments.out or RunPaths(subject.run).release, scalars(known(subject) or {}))
        if is_writer():
            print(f"release  {out} (step {step.name})")
    return 0


def rows_ahead(subject: Subject) -> np.ndarray:
    """The rows that come next in the run's order, bfloat16 [N, width]: unseen ones as long as an epoch has not ended. In another
    store than that of the run, the first ones.
    """
    config = subject.config
    if not is_complete(config.harvest.store):
        raise ConfigError(f"saejax release --jumprelu: measures the threshold on activations, and {config.harvest.store} is no "
                          "complete store; run saejax harvest with the run's config, or name a store of the same model and "
                          "hookpoints: --config=FILE --config.harvest.store=DIR")
    store, meta = Store.open(config.harvest.store), read_meta(subject.step_dir)
    check_matches(store, hookpoints=config.sae.hookpoints, d_in=config.sae.d_in, model=config.lm.model)
    place = meta.counters.stream
    if store.digest != meta.data["store_digest"]:
        place = dataclasses.replace(place, epoch=0, position=0)
    n = min(CALIBRATION_ROWS, store.kept_rows)
    with Stream(store, config.sae.hookpoints, n, config.stream, place) as stream:
        return next(stream).x_BW[:stream.rows_per_epoch]
