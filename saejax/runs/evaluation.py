"""The evaluation of a subject: measured once, kept beside its run."""

import dataclasses
import json
from pathlib import Path

from saejax.base.logs import say
from saejax.base.records import RunPaths
from saejax.base.storage import read_json, text_sha256
from saejax.config import Config, EvalOptions
from saejax.evals.evaluate import cache_key, cached, evaluate, evaluate_rows, remember
from saejax.pages.summary import Rates, Result, training_rate
from saejax.runs import missing
from saejax.runs.experiment import rates_file
from saejax.runs.opening import open_subject
from saejax.runs.subject import Subject
from saejax.train.checkpoint import machine_of, read_meta
from saejax.train.determinism import promise


def evaluate_subject(source: str | Path | Subject, *, contexts: int | None = None) -> dict:
    """L0, explained variance, cross-entropy recovered, KL and densities of an SAE on held-out text; of a run kept in `eval.json`.

    contexts: of the text, instead of the run's `config.eval.contexts`. Raises `HookpointError`, `FormatError`, `TextError`.
    """
    return evaluated(source if isinstance(source, Subject) else open_subject(source), contexts)


def evaluated(subject: Subject, contexts: int | None = None) -> dict:
    """Its figures on held-out text (`evals.evaluate`); of a run from `eval.json` where they are there, else measured and kept.

    contexts: instead of the config's. Kept is what was measured as the run's config says, not with another model, text or store.
    Of a run on activations made elsewhere, and nothing said of them, the reconstruction of its store's rows.
    """
    given = subject.given
    rows = missing.made_elsewhere(subject.sae.cfg) and given.model is None and given.text is None and subject.store is not None
    if not rows:
        subject.require(text=True)
    config = subject.config or Config()
    options = config.eval
    options = options if contexts is None else dataclasses.replace(options, contexts=contexts)
    key = _key(subject, options)
    result = None if key is None else cached(RunPaths(subject.run), key)
    if result is None and rows:
        result = evaluate_rows(subject.sae, subject.store, options, progress=subject.progress)
        say(f"{subject.source}: measured on {result['measured_on']}, nothing is spliced; for held-out text give a model and "
            "a text")
    elif result is None:
        result = evaluate(subject.sae, subject.lm, subject.text, subject.stats(subject.sae.cfg.targets), options,
                          batch_contexts=config.lm.batch_contexts, progress=subject.progress)
    if key is not None:
        remember(RunPaths(subject.run), key, result)
    return result


def known(subject: Subject) -> dict | None:
    """The evaluation that is kept, or None."""
    key = _key(subject, subject.config.eval) if subject.config is not None else None
    return None if key is None else cached(RunPaths(subject.run), key)


def _key(subject: Subject, options: EvalOptions) -> dict | None:
    """Under what an evaluation of a checkpoint step is kept."""
    given = subject.given
    if not subject.trained_here or any(v is not None for v in (given.model, given.hookpoint, given.text, given.store)):
        return None
    fingerprints = json.dumps(read_meta(subject.step_dir).fingerprints, sort_keys=True)
    config = dataclasses.replace(subject.config, eval=options)
    return cache_key(config, int(subject.step_dir.name), text_sha256(fingerprints))


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
