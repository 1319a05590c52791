"""The evaluation of a subject: measured once, kept beside its run."""

import dataclasses
import json
from pathlib import Path

from saejax import lm
from saejax.base.errors import DiskError
from saejax.base.logs import say
from saejax.base.records import RunPaths
from saejax.base.storage import read_json, text_sha256
from saejax.config import Config, EvalOptions
from saejax.data import sources
from saejax.evals.evaluate import cache_key, cached, evaluate, evaluate_rows, newest, remember
from saejax.pages.summary import Rates, Result, training_rate
from saejax.runs import missing
from saejax.runs.experiment import rates_file
from saejax.runs.opening import open_subject
from saejax.runs.subject import Subject
from saejax.train.checkpoint import machine_of, read_meta
from saejax.train.determinism import promise


def evaluate_subject(source: str | Path | Subject, *, contexts: int | None = None, out: str | Path | None = None) -> dict:
    """L0, explained variance, cross-entropy recovered, KL and densities of an SAE on held-out text; of a run kept in `eval.json`.

    contexts: of the text, instead of the run's `config.eval.contexts`. out: keep it in `out/eval.json` instead. Raises
    `HookpointError`, `FormatError`, `TextError`.
    """
    subject = source if isinstance(source, Subject) else open_subject(source)
    return evaluated(subject, contexts, None if out is None else Path(out))


def evaluated(subject: Subject, contexts: int | None = None, out: Path | None = None) -> dict:
    """Its figures on held-out text (`evals.evaluate`); of a run from `eval.json` where they are there, else measured and kept.

    contexts: instead of the config's. out: a directory for `eval.json` instead of the run's. Kept is what was measured as the
    run's config says, not with another model, text or store. What cannot be kept is returned all the same, with a line. Of a run
    on activations made elsewhere, and nothing said of them, the reconstruction of its store's rows.
    """
    given = subject.given
    file = (RunPaths(subject.run) if out is None else RunPaths(out)).evaluation if subject.run or out else None
    rows = missing.made_elsewhere(subject.sae.cfg) and given.model is None and given.text is None and subject.store is not None
    if not rows:
        subject.require(text=True)
    config = subject.config or Config()
    options = config.eval
    options = options if contexts is None else dataclasses.replace(options, contexts=contexts)
    key = _key(subject, options)
    result = None if key is None else cached(file, key)
    if result is not None:
        return result
    if rows:
        result = evaluate_rows(subject.sae, subject.store, options, progress=subject.progress)
        say(f"{subject.source}: measured on {result['measured_on']}, nothing is spliced; for held-out text give a model and "
            "a text")
    else:
        result = evaluate(subject.sae, subject.lm, subject.text, subject.stats(subject.sae.cfg.targets), options,
                          batch_contexts=config.lm.batch_contexts, progress=subject.progress)
    if key is not None:
        _kept(file, key, result)
    return result


def _kept(file: Path, key: dict, result: dict) -> None:
    try:
        remember(file, key, result)
    except DiskError as error:
        say(f"{error}; the evaluation is not kept (out=DIR keeps it elsewhere)")


def known(subject: Subject) -> dict | None:
    """The evaluation that was last kept of its checkpoint, or None. Reads neither model nor text."""
    return newest(RunPaths(subject.run).evaluation, _checkpoint(subject)) if subject.trained_here else None


def _checkpoint(subject: Subject) -> str:
    """A digest of the arrays of its checkpoint."""
    return text_sha256(json.dumps(read_meta(subject.step_dir).fingerprints, sort_keys=True))


def _key(subject: Subject, options: EvalOptions) -> dict | None:
    """Under what an evaluation of a checkpoint step is kept."""
    given = subject.given
    if not subject.trained_here or any(v is not None for v in (given.model, given.hookpoint, given.text, given.store)):
        return None
    config, kept = dataclasses.replace(subject.config, eval=options), subject.kept
    digests = {"checkpoint": _checkpoint(subject), "store": "" if kept is None else kept.store}
    if not missing.made_elsewhere(subject.sae.cfg):
        model = subject.__dict__.get("lm") or lm.files(config.lm.model, config.lm.revision)
        digests |= {"model": model.digest, "tokenizer": model.tokenizer.digest, "text": sources.resolve(config.text).digest}
    return cache_key(config, int(subject.step_dir.name), digests)


def result_of(subject: Subject, evaluation: dict) -> Result:
    """A run or step with what was measured of it."""
    config, paths, step = subject.config, RunPaths(subject.run), int(subject.step_dir.name)
    rates = read_json(rates_file(paths)) if rates_file(paths).is_file() else {}
    return Result(config=config, paths=paths, step=step, evaluation=evaluation,
                  rates=Rates(harvest=rates.get("tokens_per_second"), train=training_rate(paths)),
                  resume=promise(config.train.deterministic, machine_of(paths.checkpoints / str(step))))


def scalars(evaluation: dict) -> dict:
    """The figures of an evaluation without its histogram: what a release keeps."""
    return {k: v for k, v in evaluation.items() if not isinstance(v, dict)}
