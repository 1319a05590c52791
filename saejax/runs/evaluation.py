"""The evaluation of a subject: measured once, kept beside its run."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax

from saejax import lm
from saejax.base import hardware
from saejax.base.errors import DiskError
from saejax.base.logs import say
from saejax.base.records import RunPaths
from saejax.base.storage import read_json, text_sha256
from saejax.config import Config, EvalOptions
from saejax.data import sources
from saejax.evals.evaluate import cache_key, cached, evaluate_all, evaluate_rows, newest, remember
from saejax.pages.summary import Rates, Result, training_rate
from saejax.runs import missing
from saejax.runs.experiment import rates_file
from saejax.runs.opening import open_subject
from saejax.runs.subject import Subject
from saejax.train.checkpoint import machine_of, read_meta
from saejax.train.determinism import promise

TOGETHER = 1 / 8  # of a device's memory: dictionaries beyond which none is opened to be measured in the same pass

def evaluate_subject(source: str | Path | Subject, *, contexts: int | None = None, out: str | Path | None = None) -> dict:
    """L0, explained variance, cross-entropy recovered, KL and densities of an SAE on held-out text; of a run kept in `eval.json`.

    contexts: of the text, instead of the run's `config.eval.contexts`. out: keep it in `out/eval.json` instead. Raises
    `HookpointError`, `FormatError`, `TextError`.
    """
    subject = source if isinstance(source, Subject) else open_subject(source)
    return evaluated(subject, contexts, None if out is None else Path(out))


def evaluated(subject: Subject, contexts: int | None = None, out: Path | None = None) -> dict:
    """`evaluated_all` of one subject."""
    return next(evaluated_all([subject], contexts, out))[1]


def evaluated_all(subjects: list[Subject], contexts: int | None = None,
                  out: Path | None = None) -> Iterator[tuple[Subject, dict]]:
    """Each subject with its figures on held-out text (`evals.evaluate`), in their order: of a run from `eval.json` where they are
    there, else measured and kept. Neighbours with the same language model and text are measured in one pass, see `TOGETHER`.
    The list is emptied on the way: who keeps no subject keeps no dictionary.

    contexts: instead of the config's. out: a directory for `eval.json` instead of the run's. Kept is what was measured as the
    run's config says, not with another model, text or store. What cannot be kept is returned all the same, with a line. Of a run
    on activations made elsewhere, and nothing said of them, the reconstruction of its store's rows.
    """
    waiting: list[_Measuring] = []
    while subjects:
        if _bytes_of_a_device(waiting) > TOGETHER * hardware.chip_of(jax.local_devices()[0]).memory:
            yield from _measured(waiting)
        new = _Measuring(subjects.pop(0), contexts, out)
        if waiting and not new.joins(waiting[0]):
            yield from _measured(waiting)
        waiting.append(new)
    yield from _measured(waiting)


class _Measuring:
    """A subject on its way to its figures; `result` where they are there already."""

    def __init__(self, subject: Subject, contexts: int | None, out: Path | None):
        given = subject.given
        self.subject, self.file = subject, None
        if subject.run or out:
            self.file = (RunPaths(subject.run) if out is None else RunPaths(out)).evaluation
        self._rows = (missing.made_elsewhere(subject.sae.cfg) and given.model is None and given.text is None
                      and subject.store is not None)
        if not self._rows:
            subject.require(text=True)
        config = subject.config or Config()
        self.options = config.eval if contexts is None else dataclasses.replace(config.eval, contexts=contexts)
        self.batch_contexts, self._key = config.lm.batch_contexts, _key(subject, self.options)
        self.result = None if self._key is None else cached(self.file, self._key)
        if self.result is None and self._rows:
            self.keep(evaluate_rows(subject.sae, subject.store, self.options, progress=subject.progress))
            say(f"{subject.source}: measured on {self.result['measured_on']}, nothing is spliced; for held-out text give a model "
                "and a text")

    def joins(self, other: "_Measuring") -> bool:
        """Whether both are yet to be measured and read the same."""
        if self.result is not None or other.result is not None:
            return False
        return (self.subject.lm is other.subject.lm and self.subject.text == other.subject.text
                and (self.options, self.batch_contexts) == (other.options, other.batch_contexts))

    def keep(self, result: dict) -> None:
        self.result = result
        if self._key is not None:
            _kept(self.file, self._key, result)


def _bytes_of_a_device(waiting: list[_Measuring]) -> int:
    """Of the matrices of their dictionaries."""
    saes = [one.subject.sae for one in waiting]
    return sum(8 * sae.cfg.d_in * sae.cfg.d_sae // (1 if sae.mesh is None else sae.mesh.shape["dict"]) for sae in saes)


def _measured(waiting: list[_Measuring]) -> Iterator[tuple[Subject, dict]]:
    """Empties the list."""
    new = [one for one in waiting if one.result is None]
    if new:
        subjects, first = [one.subject for one in new], new[0]
        found = evaluate_all([s.sae for s in subjects], first.subject.lm, first.subject.text,
                             [s.stats(s.sae.cfg.targets) for s in subjects], first.options,
                             batch_contexts=first.batch_contexts, progress=first.subject.progress)
        for one, result in zip(new, found, strict=True):
            one.keep(result)
        del subjects, first
    new.clear()
    while waiting:
        one = waiting.pop(0)
        yield one.subject, one.result


def _kept(file: Path, key: dict, result: dict) -> None:
    try:
        remember(file, key, result)
    except DiskError as error:
        say(f"{error}; the evaluation is not kept (out=DIR keeps it elsewhere)")


def known(subject: Subject) -> dict | None:
    """The evaluation that was last kept of its checkpoint, or None. Reads neither model nor text."""
    return newest(RunPaths(subject.run).evaluation, checkpoint_of(subject)) if subject.trained_here else None


def checkpoint_of(subject: Subject) -> str:
    """A digest of the arrays of its checkpoint."""
    return text_sha256(json.dumps(read_meta(subject.step_dir).fingerprints, sort_keys=True))


def _key(subject: Subject, options: EvalOptions) -> dict | None:
    """Under what an evaluation of a checkpoint step is kept."""
    given = subject.given
    if not subject.trained_here or any(v is not None for v in (given.model, given.hookpoint, given.text, given.store)):
        return None
    config, kept = dataclasses.replace(subject.config, eval=options), subject.kept
    digests = {"checkpoint": checkpoint_of(subject), "store": "" if kept is None else kept.store}
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
