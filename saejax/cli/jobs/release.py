"""`saejax release`: a checkpoint -> a directory that loads anywhere."""

import itertools
from dataclasses import dataclass
from pathlib import Path

from saejax.base.errors import ConfigError
from saejax.cli.options import ConfigOptions, DistributedOptions, Job, path, places, refuse, switch, value

CALIBRATION_ROWS = 65_536  # rows that --jumprelu measures its threshold on, or all that the store has


@dataclass(frozen=True)
class Options(ConfigOptions, DistributedOptions):
    paths: tuple[str, ...] = places("RUN_OR_STEP", "a run directory")
    out: Path | None = value("where to write (default RUN/release)", "DIR", path)
    jumprelu: bool = switch("a topk SAE with one threshold for all rows, of the same mean L0, measured on rows of the run's "
                            "activation store")


def run(options: Options) -> int:
    """The job, of every run given."""
    from saejax.base.records import RunPaths
    from saejax.base.storage import is_writer
    from saejax.cli.subjects import subjects
    from saejax.formats.release import release, with_one_threshold
    from saejax.runs.evaluation import known, scalars
    found = subjects(options)
    if len(found) > 1 and options.out is not None:
        raise ConfigError(f"saejax release: --out={options.out} takes one run; release them one by one")
    for subject in found:
        if not subject.trained_here:
            raise ConfigError(f"saejax release: {subject.source} is no run or checkpoint step; saejax convert writes other files")
        sae, step = subject.sae, subject.step_dir
        if "threshold" not in sae.params.per_feature and subject.config.sae.kind != "topk":
            refuse("release", options, ("jumprelu",), f"on a {subject.config.sae.kind} SAE, which has no threshold to measure")
        if options.jumprelu and subject.config.sae.kind == "topk":
            sae = with_one_threshold(step, subject.mesh, rows_ahead(subject))
        out = release(sae, options.out or RunPaths(subject.run).release, scalars(known(subject) or {}))
        if is_writer():
            print(f"release  {out} (step {step.name})")
    return 0


def rows_ahead(subject):
    """The rows that come next in the run's order, bfloat16 [N, width]: unseen ones as long as an epoch has not ended. In another
    store than that of the run, the first ones.
    """
    import numpy as np

    from saejax.data.store import Store, check_matches, is_complete
    from saejax.data.stream import Stream
    from saejax.train.checkpoint import read_meta
    config = subject.config
    if not is_complete(config.harvest.store):
        raise ConfigError(f"saejax release --jumprelu: measures the threshold on activations, and {config.harvest.store} is no "
                          "complete store; run saejax harvest with the run's config, or name a store of the same model and "
                          "hookpoints: --config=FILE --config.harvest.store=DIR")
    store, meta = Store.open(config.harvest.store), read_meta(subject.step_dir)
    check_matches(store, hookpoints=config.sae.hookpoints, d_in=config.sae.d_in, model=config.lm.model)
    place, n = meta.counters.stream, min(CALIBRATION_ROWS, store.kept_rows)
    if store.digest != meta.data["store_digest"]:
        place = place.seed
    batch = config.train.batch
    with Stream(store, config.sae.hookpoints, batch, config.stream, place) as stream:
        return np.concatenate([x_BW.copy() for x_BW in itertools.islice(stream, -(-n // batch))])[:n]


JOB = Job(
    "release", "make", "a checkpoint -> a directory that loads anywhere", """
    Reads a run directory (its newest checkpoint that verifies) or one checkpoint step, also while the run goes on; writes
    cfg.json, sae_weights.safetensors, metrics.json and README.md to DIR. saejax.load and SAELens read it. More than 4 GB of
    weights are in several files, each of a range of features; SAELens needs them joined (saejax convert).
    """, "saejax release runs/demo/checkpoints/400 --out=my_sae", Options, run)
