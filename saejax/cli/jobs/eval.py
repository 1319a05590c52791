"""`saejax eval`: SAEs measured on held-out text, side by side."""

import json
from dataclasses import dataclass
from pathlib import Path

from saejax.base.errors import ConfigError
from saejax.cli.options import (
    ConfigOptions,
    CorpusOptions,
    DistributedOptions,
    Job,
    Json,
    SubjectOptions,
    count,
    path,
    places,
    value,
)


@dataclass(frozen=True)
class Options(Json, SubjectOptions, CorpusOptions, ConfigOptions, DistributedOptions):
    paths: tuple[str, ...] = places("SAE", "a run or other files of an SAE")
    out: Path | None = value("keep the figures in DIR/eval.json instead of RUN/eval.json; of one run", "DIR", path)
    contexts: int | None = value("held-out contexts, instead of the run's config.eval.contexts", "N", count)


def run(options: Options) -> int:
    """The job."""
    from saejax.base.storage import is_writer
    from saejax.cli.subjects import subjects
    from saejax.pages.summary import columns
    from saejax.runs.evaluation import evaluated_all
    from saejax.runs.subject import forget_language_model
    waiting, found = subjects(options), []
    if options.out is not None and (len(waiting) > 1 or not waiting[0].trained_here):
        raise ConfigError(f"saejax eval: --out={options.out} takes one run")
    for subject, evaluation in evaluated_all(waiting, options.contexts, options.out):
        found.append((str(subject.run if subject.trained_here else subject.source), *_shown(subject, evaluation)))
        del subject  # the next one's dictionary needs the memory
    forget_language_model()
    if is_writer():
        print(json.dumps([plain for _, _, plain in found], indent=1) if options.json else
              columns([(title, lines) for title, lines, _ in found]))
    return 0


def _shown(subject, evaluation: dict) -> tuple[list[tuple[str, str]], dict]:
    """(lines of its column, the same as plain values)."""
    from saejax.pages.summary import measured, rows
    from saejax.runs.evaluation import result_of
    if subject.trained_here:
        return (rows(result_of(subject, evaluation)),
                {"run": str(subject.run), "step": int(subject.step_dir.name), **evaluation})
    lines = [("SAE", f"{subject.sae.cfg.kind}, {subject.sae.cfg.d_sae} features"), *measured(evaluation)]
    return lines, {"sae": str(subject.source), **evaluation}


JOB = Job(
    "eval", "make", "measure SAEs on held-out text, side by side", """
    Reads SAEs: runs (or RUN/checkpoints/STEP), releases, files of any format that saejax.load reads, places on the hub as
    org/repo:path; and the statistics of their activations that a run keeps, of other SAEs those of the store or the text. Of runs
    it writes RUN/eval.json. Prints a table: L0, FVU and explained variance with and without outlier tokens, cross-entropy clean,
    spliced, zero- and mean-ablated, recovered share, KL, dead features. Results are kept per checkpoint, options, text and model;
    a second call is instant. The directory of a sweep stands for all its SAEs.

    --config=FILE means the run at its run_dir, with the eval, log and mesh sections given now; the other keys must be those of
    the run.
    """, "saejax eval runs/demo runs/demo_relu", Options, run)
