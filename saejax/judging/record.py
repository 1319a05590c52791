"""Answers on disk, one JSON line each, appended as they come: what is there is not asked again.

    judge.json       whose answers, about which index, with which prompts and explanations; never a key
    answers.jsonl    id, task, feature, interval, level, truth, context, position, prompt, raw (every answer in its own words),
                     score (null: unscored), trouble (why), usage
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from saejax.base.errors import JudgeError
from saejax.base.logs import Progress
from saejax.base.storage import disk_errors, read_json, write_json
from saejax.base.text import visible
from saejax.judging import prompts
from saejax.judging.questions import RULES, Judge, Question, Reply, understood

ANSWERS, JUDGE = "answers.jsonl", "judge.json"
SCHEMA_VERSION = 1
_LONGEST_RAW = 20_000  # characters of an answer that are kept


class Record:
    """The answers of one judge about one index. Raises `JudgeError` when the directory holds those of another."""

    def __init__(self, folder: Path, judge: Judge, index: str, explanations: str):
        self.folder = Path(folder)
        about = {"kind": "saejax-judging", "schema_version": SCHEMA_VERSION, "judge": judge.describe(), "index": index,
                 "prompts": prompts.DIGEST, "explanations": explanations}
        if (self.folder / JUDGE).is_file():
            found = read_json(self.folder / JUDGE, JudgeError)
            differs = [key for key in about if not isinstance(found, dict) or found.get(key) != about[key]]
            if differs:
                raise JudgeError(f"{self.folder / JUDGE}: the answers there have another {', another '.join(differs)}; choose "
                                 "another directory")
        else:
            write_json(self.folder / JUDGE, about)
        self.lines = read_answers(self.folder / ANSWERS)

    def missing(self, questions: Iterable[Question]) -> list[Question]:
        """Those without an answer. One that could not be read counts as an answer, one that never came does not."""
        return [q for q in questions if q.id not in self.lines or not self.lines[q.id]["raw"]]

    def add(self, question: Question, raw: Sequence[str], score, trouble: str, usage: dict | None) -> None:
        """Appends one answer. Raises `DiskError`."""
        values = {key: value for key, value in asdict(question).items() if key != "tokens"}
        line = values | {"raw": [text[:_LONGEST_RAW] for text in raw], "score": score, "trouble": trouble, "usage": usage or {}}
        with disk_errors(self.folder / ANSWERS), open(self.folder / ANSWERS, "a", encoding="ascii") as f:
            f.write(json.dumps(line, allow_nan=False) + "\n")
        self.lines[question.id] = line


def read_answers(file: Path, *, mend: bool = True) -> dict[str, dict]:
    """{id: line}, the newest of each; a line torn by a crash is cut off, with `mend` in the file as well. Raises `JudgeError` for
    any other that is none.
    """
    if not file.is_file():
        return {}
    data = file.read_bytes()
    whole = data[:data.rfind(b"\n") + 1]
    if mend and len(whole) < len(data):
        with open(file, "r+b") as f:
            f.truncate(len(whole))
    out = {}
    for number, text in enumerate(whole.splitlines(), 1):
        try:
            line = json.loads(text)
            out[line["id"]] = line
            _ = line["task"], line["feature"], line["raw"], line["score"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise JudgeError(f"{file}: line {number} is no answer; remove it, and it is asked again") from error
    return out


def put(judge: Judge, questions: Sequence[Question], record: Record, *, title: str, progress: bool = True) -> None:
    """Asks what is missing. What cannot be read is asked once more with a reminder, then kept as unscored, as is what never came.

    Raises `JudgeError` where the judge gives up; what it answered is kept.
    """
    pending = record.missing(questions)
    raw: dict[str, list[str]] = {question.id: [] for question in pending}
    original = {question.id: question for question in pending}
    with Progress(title, len(questions), initial=len(questions) - len(pending), unit="answer", enabled=progress) as bar:
        for last in ((False, True) if judge.retries else (True,)):
            again = []
            for question, reply in judge.ask(pending):
                said = raw[question.id]
                if reply.text is not None:
                    said.append(reply.text)
                score, trouble = _score(question, reply)
                if score is None and reply.text is not None and not last:
                    again.append(reminded(original[question.id], reply.text))
                    continue
                record.add(original[question.id], said, score, trouble, reply.usage)
                bar.advance(1)
            pending = again


def _score(question: Question, reply: Reply) -> tuple[object, str]:
    if reply.text is None or reply.trouble:
        return None, reply.trouble or "no answer"
    score = understood(question, reply.text)
    return score, "" if score is not None else "not one of the answers asked for"


def reminded(question: Question, answer: str) -> Question:
    """The question with what was answered before, and the rule once more."""
    prompt = (f"{question.prompt}\n\nAn earlier answer, which could not be read: {visible(answer, 200)}\n"
              f"{RULES[question.task]}")
    return Question(**{**question.__dict__, "prompt": prompt})
