"""Which concepts have a feature, against their frequency in the training text: one study of several runs."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from saejax import lm
from saejax.base.errors import ConceptError
from saejax.base.logs import say
from saejax.base.storage import decided, is_writer, read_json, text_sha256, write_json
from saejax.config import Config
from saejax.data import sources
from saejax.data.store import is_complete
from saejax.features.dedicated import Criterion, dedicated, maxima
from saejax.features.index.corpus import Corpus
from saejax.lm import Tokenizer
from saejax.pages.concepts import write_concepts
from saejax.runs import missing
from saejax.runs.evaluation import checkpoint_of, known
from saejax.runs.subject import Subject
from saejax.sae.inference import SAE
from saejax.scaling.concepts import counting, lists, sampling
from saejax.scaling.concepts.counting import Counts
from saejax.scaling.concepts.lists import Concept
from saejax.scaling.concepts.sampling import SampleOptions
from saejax.scaling.concepts.study import Dictionary, Measured, Study

COUNTS, MEASURED = "counts.json", "measured"  # in the folder of a study
KIND, SCHEMA_VERSION = "saejax-concept-measurements", 1
_Kept = TypeVar("_Kept")


@dataclass(frozen=True)
class Asked:
    """What a study asks. lists: categories that come with saejax, or files; without these and nouns all categories. nouns: a file
    of candidates, of which `pick` with a frequency of `between` are taken, evenly spread in log frequency. tokens: of the text
    that is counted and searched; None: as many as the store holds or, without one, as the run that was trained on most.
    """

    lists: tuple[str, ...] = ()
    nouns: Path | None = None
    pick: int = 400
    between: tuple[float, float] = (1e-6, 1e-3)
    tokens: int | None = None
    criterion: Criterion = Criterion()
    per_concept: int = SampleOptions.per_concept
    random: int = SampleOptions.random


def concept_study(subjects: list[Subject], asked: Asked, out: Path) -> tuple[Study, Path | None]:
    """Counts the concepts in the text that all runs were trained on, looks for their features in every SAE, fits the curves, and
    writes all of it into a folder: (study, its page; None in a process that does not write). The list is emptied on the way:
    one dictionary is in memory at a time.

    What is counted, and measured of an SAE, is kept in the folder and not measured again. Raises `ConceptError` for what is no
    run, for runs of different hookpoints, models or texts, and where the text has none of the concepts.
    """
    given, candidates = _given(asked)
    check_alike(subjects)
    first = next((subject for subject in subjects if is_complete(subject.config.harvest.store)), subjects[0])
    if missing.made_elsewhere(first.sae.cfg):
        raise ConceptError(f"{first.source}: was trained on activations made elsewhere, and the run does not know of which text; "
                           "concepts are counted in that text")
    tokens = asked.tokens or (max(map(_trained, subjects)) if first.store is None else first.store.rows)
    words = first.corpus(tokens=tokens)
    tokenizer = lm.files(first.config.lm.model, first.config.lm.revision).tokenizer
    counts = _counted(words, [*given, *candidates], tokenizer, out / COUNTS, first.progress)
    chosen = sampling.spread(counts.of(candidates), asked.pick, *asked.between) if candidates else []
    counts = counts.of([*given, *chosen])
    if not counts.occurrences_C.any():
        raise ConceptError(f"{counts.tokens:,} tokens of the text have none of the {len(counts.concepts)} concepts between two "
                           "blanks; give others, or more tokens")
    if counts.absent:
        say(f"the text has none of: {_few(counts.absent)}")
    names = _labels(subjects)
    measuring = _Measuring(words, counts.concepts, tokenizer, asked, out / MEASURED, first.progress)
    del first
    dictionaries = []
    for number, label in enumerate(names, 1):
        subject = subjects.pop(0)
        measured = measuring.of(subject, f"{label}, {number} of {len(names)}")
        dictionaries.append(_dictionary(label, subject, measured))
    how = asdict(asked.criterion) | asdict(measuring.sample) | {"contexts": words.contexts, "context": words.context}
    study = Study(counts, tuple(dictionaries), how)
    return study, write_concepts(out, study) if is_writer() else None


def check_alike(subjects: Sequence[Subject]) -> None:
    """Raises `ConceptError` for what is no run, and for one that differs from the first in model, hookpoint or text."""
    for subject in subjects:
        if not subject.trained_here:
            raise ConceptError(f"{subject.source}: is no run; concepts are counted in the text that a run was trained on")
    first, digests = subjects[0], {}
    for other in subjects[1:]:
        a, b = _facts(first.config, digests), _facts(other.config, digests)
        differ = [f"{key} ({a[key][1]}, {b[key][1]})" for key in a if a[key][0] != b[key][0]]
        if differ:
            raise ConceptError(f"{first.source} and {other.source} differ in {', '.join(differ)}; give runs of one model, "
                               "hookpoint and text")


def _facts(config: Config, digests: dict) -> dict[str, tuple]:
    """{config key: (what is compared, what is shown)} of what all runs of a study have in common."""
    options = config.text
    if options not in digests:
        digests[options] = sources.resolve(options).digest
    out = {"sae.hookpoint": config.sae.hookpoints, "lm.model": config.lm.model, "lm.revision": config.lm.revision,
           "seed of the data": config.seed_of_data, **{f"text.{key}": value for key, value in asdict(options).items()}}
    out = {key: (value, " ".join(value) if isinstance(value, tuple) else value) for key, value in out.items()}
    return out | {"text.source": (digests[options], " ".join(options.source))}


def _given(asked: Asked) -> tuple[list[Concept], list[Concept]]:
    """(concepts of the lists, candidates that are in none of them)."""
    given = [concept for name in asked.lists for concept in lists.named(name)]
    if not asked.lists and asked.nouns is None:
        given = lists.shipped()
    taken = lists.spelled(given)
    nouns = lists.read(asked.nouns) if asked.nouns else []
    return given, [noun for noun in nouns if not taken.keys() & set(noun.spellings)]


def _labels(subjects: Sequence[Subject]) -> list[str]:
    names = [subject.name for subject in subjects]
    return names if len(set(names)) == len(names) else [str(subject.source) for subject in subjects]


def _trained(subject: Subject) -> int:
    """Tokens that it was trained on."""
    return int(subject.step_dir.name) * subject.config.train.batch


def _counted(words: Corpus, concepts: list[Concept], tokenizer: Tokenizer, file: Path, progress: bool) -> Counts:
    """Counts in the contexts of a corpus, kept in a file."""
    key = {"corpus": words.digest, "tokenizer": tokenizer.digest, "concepts": _digest(concepts)}
    kept = _kept(file, key, lambda values: Counts(tuple(concepts), np.array(values["occurrences"], np.int64), values["tokens"]))
    if kept is not None:
        return kept
    counts = counting.count(concepts, counting.rows(words.make(), tokenizer), total=_tokens(words), progress=progress)
    _keep(file, key, {"occurrences": counts.occurrences_C.tolist(), "tokens": counts.tokens})
    return counts


def _tokens(words: Corpus) -> int | None:
    return None if words.contexts is None else words.contexts * words.context


class _Measuring:
    """Measures one SAE after the other on one sample, which is drawn when the first of them needs it."""

    def __init__(self, words: Corpus, concepts: Sequence[Concept], tokenizer: Tokenizer, asked: Asked, folder: Path,
                 progress: bool):
        self.sample = SampleOptions(asked.per_concept, asked.random)
        self._words, self._concepts, self._pieces = words, concepts, tokenizer.token_bytes.pieces
        self._criterion, self._folder, self._progress, self._found = asked.criterion, folder, progress, None
        self._key = {"criterion": asdict(asked.criterion), "sample": asdict(self.sample), "corpus": words.digest,
                     "concepts": _digest(concepts)}

    def of(self, subject: Subject, shown: str) -> Measured:
        """What is kept of an SAE, or is now."""
        key = {"sae": checkpoint_of(subject), **self._key}
        file = self._folder / f"{text_sha256(json.dumps(key, sort_keys=True))[:16]}.json"
        kept = _kept(file, key, Measured.from_json)
        if decided(kept is not None):
            if kept is None:
                raise ConceptError(f"{file}: process 0 has it and this process does not see it; give all processes one folder")
            say(f"{shown}: kept in {file}")
            return kept
        say(f"{shown}: looking for features of {len(self._concepts):,} concepts")
        measured = self._measured(subject.sae)
        _keep(file, key, measured.to_json())
        return measured

    def _measured(self, sae: SAE) -> Measured:
        if self._found is None:
            self._found = sampling.find(self._concepts, self._words.make(), self._pieces, self.sample,
                                        total=_tokens(self._words), progress=self._progress)
        max_F = maxima(sae, self._words, self._found, self._progress)
        found = dedicated(sae, self._words, self._found, self._criterion, max_F=max_F, progress=self._progress)
        return Measured(found, int((max_F > 0).sum()), int(self._found.keep_nT.sum()))


def _dictionary(label: str, subject: Subject, measured: Measured) -> Dictionary:
    out = Dictionary(label, subject.sae.cfg.d_sae, _trained(subject), measured)
    evaluation = known(subject)
    if evaluation is None:
        return out
    return replace(out, dead_fraction=evaluation["dead_fraction"], dead_tokens=evaluation["tokens"])


def _digest(concepts: Sequence[Concept]) -> str:
    return text_sha256(json.dumps([(concept.category, concept.spellings) for concept in concepts]))


def _kept(file: Path, key: dict, read: Callable[[dict], _Kept]) -> _Kept | None:
    """What a file of a study holds under this key. Raises `ConceptError` for another file in its place."""
    if not file.is_file():
        return None
    values = read_json(file, ConceptError)
    try:
        if (values["kind"], values["schema_version"]) != (KIND, SCHEMA_VERSION):
            raise ValueError(f"{values['kind']}, schema version {values['schema_version']}")
        return read(values["result"]) if values["key"] == key else None
    except (KeyError, TypeError, ValueError, ConceptError) as error:
        raise ConceptError(f"{file}: not what this saejax keeps of a study of concepts ({type(error).__name__}: {error}); delete "
                           "it, and it is measured again") from error


def _keep(file: Path, key: dict, result: dict) -> None:
    if is_writer():
        write_json(file, {"kind": KIND, "schema_version": SCHEMA_VERSION, "key": key, "result": result})


def _few(names: Sequence[str], most: int = 20) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
