"""People as judges: questions go out as a page and as CSV, answers come back as CSV.

    round_1.html     all questions on one page that opens from disk; its button saves the answers as CSV
    round_1.csv      the same questions for a spreadsheet: fill the column `answer`
    questions.json   which questions have gone out

Every CSV file in the folder is read; nothing in it is ever overwritten. Questions stand in the order of their ids, which are
digests: neither order nor id tells how active the feature is.
"""

import base64
import csv
import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from markupsafe import Markup

from saejax.base.errors import JudgeError
from saejax.base.logs import say
from saejax.base.storage import disk_errors, read_json, write_bytes, write_json
from saejax.judging.questions import Question, Reply, understood
from saejax.pages.templates import render, source

GONE_OUT = "questions.json"
COLUMNS = ("id", "feature", "task", "answer", "question")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")
_MOST_BYTES = 64 << 20
_CHOICES = {"rubric": ("0", "1", "2", "3"), "detect": ("yes", "no"), "fuzz": ("yes", "no")}


class Sheets:
    """A folder of sheets. `ask` yields what is answered, and sends out what has not gone out yet."""

    retries = False

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.name = self.folder.name

    def describe(self) -> dict:
        return {"kind": "people", "name": self.name}

    def ask(self, questions: Iterable[Question]) -> Iterator[tuple[Question, Reply]]:
        """Raises `JudgeError` that lists what is wrong in the sheets; then nothing of them is taken."""
        asked = {question.id: question for question in questions}
        if any(question.task == "simulate" for question in asked.values()):
            raise JudgeError("do=simulate: asks for a number of every token, which is for models; leave it out for people")
        known = _known(self.folder)
        answers = self._answers(known, asked)
        for id_, text in answers.items():
            if id_ in asked:
                yield asked[id_], Reply(text)
        new = sorted((q for id_, q in asked.items() if id_ not in known), key=lambda q: q.id)
        if new:
            self._send(new, known)
        waiting = sum(id_ not in answers for id_ in asked)
        if waiting:
            say(f"{self.folder}: {waiting} questions wait for an answer; fill in the sheets and give the same command again")

    def _send(self, questions: list[Question], known: dict[str, str]) -> None:
        number = 1
        while any((self.folder / f"round_{number}.{kind}").exists() for kind in ("csv", "html")):
            number += 1
        write_bytes(self.folder / f"round_{number}.html", page(questions, f"round_{number}").encode())
        write_bytes(self.folder / f"round_{number}.csv", sheet(questions).encode("utf-8-sig"))
        write_json(self.folder / GONE_OUT, known | {q.id: q.task for q in questions})

    def _answers(self, known: dict[str, str], asked: dict[str, Question]) -> dict[str, str]:
        found: dict[str, tuple[str, str]] = {}
        problems: list[str] = []
        for file in sorted(self.folder.glob("*.csv")):
            seen = set()
            for row, (id_, answer) in enumerate(_rows(file), 2):
                where = f"{file.name} row {row}"
                if id_ in seen:
                    problems.append(f"{where}: {id_!r} stands twice")
                elif id_ not in known:
                    problems.append(f"{where}: {id_[:40]!r} is none of the questions")
                elif answer and id_ in found and found[id_][0] != answer:
                    problems.append(f"{where}: {id_!r} is {answer[:40]!r} here and {found[id_][0][:40]!r} in {found[id_][1]}")
                elif answer and id_ in asked and understood(asked[id_], answer) is None:
                    problems.append(f"{where}: {answer[:40]!r} is no answer to a question of {known[id_]} "
                                    f"({' '.join(_CHOICES.get(known[id_], ('a sentence',)))})")
                elif answer:
                    found[id_] = (answer, file.name)
                seen.add(id_)
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise JudgeError(f"{self.folder}: {'; '.join(problems[:5])}{more}; correct the sheets, nothing was taken from them")
        return {id_: answer for id_, (answer, _) in found.items()}


def cell(text: str) -> str:
    """A cell that no spreadsheet takes for a formula: one that begins like one gets an apostrophe before it."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def sheet(questions: Iterable[Question]) -> str:
    """The CSV, `COLUMNS` with an empty answer. Line ends within a question are LF, as spreadsheets have them."""
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    for q in questions:
        writer.writerow([cell(value) for value in (q.id, str(q.feature), q.task, "", q.prompt)])
    return out.getvalue()


def page(questions: Iterable[Question], name: str) -> str:
    """The page. Its policy allows its own script only, by digest, and no address at all."""
    script = source("site/sheet.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return render("sheet.html", name=name, digest=digest, script=Markup(script), choices=_CHOICES, questions=list(questions))


def _known(folder: Path) -> dict[str, str]:
    if not (folder / GONE_OUT).is_file():
        return {}
    found = read_json(folder / GONE_OUT, JudgeError)
    if not isinstance(found, dict) or not all(isinstance(task, str) for task in found.values()):
        raise JudgeError(f"{folder / GONE_OUT}: altered; take it from a copy, or begin in another folder")
    return found


def _rows(file: Path) -> Iterator[tuple[str, str]]:
    """(id, answer) of every row of a sheet, with commas, semicolons or tabs as spreadsheets write them."""
    with disk_errors(file):
        if file.stat().st_size > _MOST_BYTES:
            raise JudgeError(f"{file}: {file.stat().st_size} bytes; a sheet has at most {_MOST_BYTES}")
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise JudgeError(f"{file}: not UTF-8; save it as CSV UTF-8") from error
    first = text.splitlines()[0] if text.strip() else ""
    separator = max(",;\t", key=first.count)
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        if not {"id", "answer"} <= set(rows.fieldnames or ()):
            raise JudgeError(f"{file}: its first row names no columns id and answer; save the sheet with its header")
        for row in rows:
            yield _plain(row["id"]), _plain(row["answer"])
    except csv.Error as error:
        raise JudgeError(f"{file}: not readable as CSV ({error}); save it again as CSV UTF-8") from error


def _plain(value: str | None) -> str:
    """A cell without the apostrophe of `cell`."""
    value = (value or "").strip()
    return value[1:].strip() if value.startswith("'") else value
