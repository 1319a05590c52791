"""Dictionaries side by side: numbers as computed by hand from the answers, refusals, hostile names."""

import csv
import json

import numpy as np
import pytest

from saejax.base.errors import JudgeError
from saejax.judging.endpoint import Endpoint, Patience
from saejax.judging.questions import Question
from saejax.judging.record import ANSWERS, JUDGE, Record, put
from saejax.judging.specificity import compare
from saejax.pages import specificity as page
from saejax.runs.judging import records
from tests.judging.server import serving

QUICK = Patience(timeout=0.5, tries=2, wait=0.01)


def questions(scores: dict[tuple[int, int], list[str]], drawn: bool = False) -> list[Question]:
    """{(feature, interval): what the judge will say}; the prompt says it."""
    return [Question(f"{'d' if drawn else 'i'}{feature}.{interval}.{n}", "rubric", feature, f"say <{said}>. one digit alone",
                     interval, interval / 10, drawn=drawn)
            for (feature, interval), found in scores.items() for n, said in enumerate(found)]


@pytest.fixture(scope="module")
def server():
    with serving(lambda prompt, n: prompt.split("<")[1].split(">")[0]) as found:
        yield found


def judged(server, folder, asked: list[Question], *, model: str = "m", explanations: str = "own"):
    judge = Endpoint(server.url, model, patience=QUICK)
    put(judge, asked, Record(folder, judge, "index", explanations), title="t", progress=False)
    return folder


SAID = {(1, 10): ["3", "3", "2"], (1, 1): ["0", "1"], (2, 10): ["3"], (2, 1): ["0", "what?"], (3, 1): ["2"], (3, 5): ["1"]}


def test_numbers_are_those_of_the_answers(server, tmp_path):
    judged(server, tmp_path / "a", questions(SAID))
    judged(server, tmp_path / "b", questions({(f, 10): ["3"] * f for f in range(1, 5)}))
    found = compare([("a", tmp_path / "a"), ("b", tmp_path / "b")], least=2)
    a, b = found.dictionaries
    assert found.judge["model"] == "m" and (a.size, a.place, a.density, a.tokens, a.baseline) == (None,) * 5
    top, low, middle = a.levels[9], a.levels[0], a.levels[4]
    assert (top.counts, top.features, top.answers) == ((0, 0, 1, 3), 2, 4)
    assert top.mean == pytest.approx((8 / 3 + 3) / 2)
    assert top.standard_error == pytest.approx(np.std([8 / 3, 3], ddof=1) / 2**0.5)
    assert low.counts == (2, 1, 1, 0) and low.mean == pytest.approx((0.5 + 0 + 2) / 3), "what could not be read counts nowhere"
    assert low.standard_error == pytest.approx(np.std([0.5, 0, 2], ddof=1) / 3**0.5)
    assert (middle.answers, middle.mean) == (1, None) and a.levels[1].answers == 0 and a.unscored == 1
    assert a.overall.mean == pytest.approx((9 / 5 + 3 / 2 + 3 / 2) / 3) and a.overall.answers == 9
    assert b.levels[9].mean == 3 and b.levels[9].standard_error == 0 and b.levels[9].answers == 10


def test_the_files_say_the_same(server, tmp_path):
    judged(server, tmp_path / "a", questions(SAID))
    judged(server, tmp_path / "b", questions({(f, 10): ["3"] * f for f in range(1, 5)}))
    found = compare([("a", tmp_path / "a"), ("b", tmp_path / "b")], least=4)
    html = page.write(tmp_path / "out", found).read_text()
    values = json.loads((tmp_path / "out" / "specificity.json").read_text())
    assert values["least"] == 4 and values["dictionaries"][0] == json.loads(json.dumps(found.dictionaries[0].to_json()))
    rows = list(csv.DictReader((tmp_path / "out" / "specificity.csv").open(newline="")))
    assert len(rows) == 22 and sum(int(row["answers"]) for row in rows if row["to"] == "1.0" and row["above"] == "0.9") == 14
    top = next(row for row in rows if (row["dictionary"], row["above"]) == ("a", "0.9"))
    assert float(top["mean"]) == found.dictionaries[0].levels[9].mean and top["score_3"] == "3"
    assert next(row for row in rows if (row["dictionary"], row["above"]) == ("a", "0.4"))["mean"] == ""
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "specificity.html", "specificity.json", "specificity.csv", "scores.svg", "scores.png", "answers.svg", "answers.png"}
    assert "opinion of one judge" in html and "endpoint: model m, url http://127.0.0.1" in html and html.count("<figure>") == 4
    assert "1 of 20 questions have no score (5.0%)" in html and "2.83 \u00b1 0.17" in html
    assert "a: 8; b: 9." in html and "too few answers" in html, "levels without a point are counted"


def test_nothing_is_drawn_of_too_few_answers(server, tmp_path):
    judged(server, tmp_path / "a", questions(SAID))
    found = compare([("a", tmp_path / "a")], least=5)
    assert all(level.mean is None for level in found.dictionaries[0].levels) and page.pictures(found) == {}
    html = page.write(tmp_path / "out", found).read_text()
    assert "nothing is drawn" in html and "<img" not in html and not (tmp_path / "out" / "scores.svg").exists()
    judged(server, tmp_path / "one", questions({(1, 10): ["3"] * 20}))
    [one] = compare([("one", tmp_path / "one")]).dictionaries
    assert one.levels[9].mean is None and "too few features" in str(page.levels(compare([("one", tmp_path / "one")]), one))


def test_drawn_activations_stand_for_themselves(server, tmp_path):
    judged(server, tmp_path / "a", [*questions(SAID), *questions({(1, 10): ["0", "0"]}, drawn=True)])
    judged(server, tmp_path / "b", questions(SAID))
    found = compare([("a", tmp_path / "a"), ("b", tmp_path / "b")], least=2)
    a, b = found.dictionaries
    assert (a.drawn, b.drawn) == ("both", "index") and a.levels[9].counts == (2, 0, 0, 1)
    assert any("drawn from the corpus for some" in caveat for caveat in page.caveats(found))


@pytest.mark.parametrize("change, message", [
    ({"model": "other"}, "another judge than those in"), ({"explanations": "0" * 64}, "explanations there are given, in .* own")])
def test_other_judges_and_explanations_are_refused(server, tmp_path, change, message):
    judged(server, tmp_path / "a", questions(SAID))
    judged(server, tmp_path / "b", questions(SAID), **change)
    with pytest.raises(JudgeError, match=message) as error:
        compare([("a", tmp_path / "a"), ("b", tmp_path / "b")])
    assert "\n" not in str(error.value)


def test_other_prompts_and_what_is_no_record_are_refused(server, tmp_path):
    places = [judged(server, tmp_path / name, questions(SAID)) for name in "ab"]
    both = [(place.name, place) for place in places]
    values = json.loads((places[1] / JUDGE).read_text())
    (places[1] / JUDGE).write_text(json.dumps(values | {"prompts": "0" * 64}))
    with pytest.raises(JudgeError, match="another prompts than those"):
        compare(both)
    for text, message in (("[]", "not the record"), ('{"judge": {}}', "not the record"), ("{", "judge.json")):
        (places[1] / JUDGE).write_text(text)
        with pytest.raises(JudgeError, match=message):
            compare(both)
    (places[1] / JUDGE).write_text(json.dumps(values))
    line = json.loads((places[1] / ANSWERS).read_text().splitlines()[0])
    for wrong in ({"interval": 0}, {"interval": None}, {"score": 7}, {"score": "3"}, {"score": [3]}):
        (places[1] / ANSWERS).write_text(json.dumps(line | wrong) + "\n")
        with pytest.raises(JudgeError, match="no interval or no score from 0 to 3"):
            compare(both)
    for empty, message in (("", "no rubric answers;"), (json.dumps(line | {"score": None}) + "\n", "but 1 that are unscored")):
        (places[1] / ANSWERS).write_text(empty)
        with pytest.raises(JudgeError, match=message):
            compare(both)
    with pytest.raises(JudgeError, match="no records of answers"):
        compare([])
    with pytest.raises(JudgeError, match="judge.json is missing"):
        compare([("x", tmp_path / "x")])


def test_reading_changes_nothing(server, tmp_path):
    """Another command may be writing there."""
    place = judged(server, tmp_path / "a", questions(SAID))
    whole = (place / ANSWERS).read_bytes()
    (place / ANSWERS).write_bytes(whole + b'{"id": "torn')
    assert compare([("a", place)]).dictionaries[0].overall.answers == 9
    assert (place / ANSWERS).read_bytes() == whole + b'{"id": "torn'


def test_records_of_runs(server, tmp_path):
    """Labels by run and baseline; of several judges one has to be named."""
    for run in ("r1", "x/r2"):
        for index in ("features", "features_neurons", "features_sparse_directions"):
            judged(server, tmp_path / run / "judging" / index / "m_1", questions(SAID))
    r1, r2 = tmp_path / "r1", tmp_path / "x" / "r2"
    found = records([r1, r2])
    assert [label for label, _ in found] == [f"{run}{baseline}" for run in ("r1", "r2")
                                             for baseline in ("", " neurons", " sparse_directions")]
    assert [one.baseline for one in compare(found).dictionaries][:3] == [None, "neurons", "sparse_directions"]
    single = r2 / "judging" / "features_neurons" / "m_1"
    assert records([r1 / "judging" / "features" / "m_1", single, single]) == [
        ("r1", r1 / "judging" / "features" / "m_1"), ("r2 neurons", single)]
    judged(server, tmp_path / "y" / "r2" / "judging" / "features" / "m_1", questions(SAID))
    assert records([r2, tmp_path / "y" / "r2"])[-1][0] == str(tmp_path / "y" / "r2"), "two runs of one name"
    judged(server, tmp_path / "mine", questions(SAID))
    assert records([tmp_path / "mine"]) == [("mine", tmp_path / "mine")]
    judged(server, r2 / "judging" / "features" / "n_2", questions(SAID), model="n")
    with pytest.raises(JudgeError, match="several judges, m_1, n_2: .* judge=NAME"):
        records([r1, r2])
    assert len(records([r1, r2], "m_1")) == 6
    with pytest.raises(JudgeError, match="r1: holds no answers of the judge n_2"):
        records([r2, r1], "n_2")
    with pytest.raises(JudgeError, match="holds no answers of a judge"):
        records([tmp_path / "nowhere"])


def test_hostile_names_are_text(server, tmp_path):
    name = "=1+1<script>alert(1)</script>$x\u202e"
    judged(server, tmp_path / "a", questions(SAID), model="<b>m</b>")
    found = compare([(name, tmp_path / "a")], least=2)
    html = page.write(tmp_path / "out", found).read_text()
    assert "<script" not in html and "&lt;script&gt;alert(1)" in html and "<b>" not in html and "\u202e" not in html
    assert "default-src 'none'" in html
    assert (tmp_path / "out" / "specificity.csv").read_text().splitlines()[1].startswith("'=1+1")
