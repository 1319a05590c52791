"""Answers on disk: resumed, unscored, torn, of another judge; sheets for people; what answers add up to."""

import csv
import io
import json
import re

import numpy as np
import pytest

from saejax.base.errors import JudgeError
from saejax.features.index.explanations import load_explanations
from saejax.judging.endpoint import Endpoint, Patience
from saejax.judging.questions import Question
from saejax.judging.record import ANSWERS, Record, put, read_answers
from saejax.judging.scores import results, scores_in
from saejax.pages import judged as report
from saejax.pages import sheets
from saejax.pages.sheets import Sheets
from tests.judging.server import serving

QUICK = Patience(timeout=0.5, tries=2, wait=0.01)


def questions(n: int = 6, task: str = "rubric") -> list[Question]:
    return [Question(f"{task}{i}", task, i % 2, f"Question {i}. Answer with one digit alone", i % 10 + 1, 0.1 * (i % 10) + 0.05,
                     context=1, position=i) for i in range(n)]


def record_of(server, folder, **options) -> tuple[Endpoint, Record]:
    judge = Endpoint(server.url, "m", patience=QUICK, concurrency=2)
    return judge, Record(folder, judge, "index", "own", **options)


def test_a_rerun_asks_only_what_is_missing(tmp_path, capsys):
    def script(prompt, n):
        return (500, {}, b"") if "Question 3" in prompt else "gibberish" if "Question 4" in prompt else "2"
    with serving(script) as server:
        judge, record = record_of(server, tmp_path)
        put(judge, questions(), record, title="t", progress=False)
        lines = read_answers(tmp_path / ANSWERS)
        assert [lines[f"rubric{i}"]["score"] for i in range(6)] == [2, 2, 2, None, None, 2]
        assert lines["rubric3"]["raw"] == [] and "HTTP 500" in lines["rubric3"]["trouble"]
        assert lines["rubric4"]["raw"] == ["gibberish"] * 2 and "not one of the answers" in lines["rubric4"]["trouble"]
        assert any("could not be read: gibberish" in prompt for prompt in server.prompts), "asked once more, with a reminder"
        assert lines["rubric0"]["prompt"] == questions()[0].prompt and lines["rubric0"]["usage"]["prompt_tokens"] == 7
        server.requests.clear()
        server._script = lambda prompt, n: "1"
        judge, record = record_of(server, tmp_path)
        capsys.readouterr()
        put(judge, questions(8), record, title="rubric")
        assert re.fullmatch(r"rubric: 100% 8\.00/8\.00 \[.*answer/s\]\n", capsys.readouterr().err), "those answered before count"
        asked = {re.search(r"Question (\d)", prompt)[1] for prompt in server.prompts}
        assert asked == {"3", "6", "7"}, "what never came, and what is new; not what could not be read"
    assert read_answers(tmp_path / ANSWERS)["rubric3"]["score"] == 1


def test_answers_that_were_cut_off_are_unscored(tmp_path):
    from tests.judging.server import completion
    with serving(lambda prompt, n: (200, {}, completion("3", "length"))) as server:
        judge, record = record_of(server, tmp_path)
        put(judge, questions(1), record, title="t", progress=False)
    assert record.lines["rubric0"]["score"] is None and record.lines["rubric0"]["raw"] == ["3", "3"]


def test_a_judge_that_goes_away_leaves_what_it_answered(tmp_path):
    with serving(lambda prompt, n: "3" if n <= 10 else (503, {}, b"")) as server:
        judge, record = record_of(server, tmp_path)
        with pytest.raises(JudgeError, match="5 questions in a row"):
            put(judge, questions(60), record, title="t", progress=False)
    lines = read_answers(tmp_path / ANSWERS)
    assert sum(line["score"] == 3 for line in lines.values()) == 10 and len(lines) < 25
    assert len(record.missing(questions(60))) == 50


def test_torn_and_damaged_records(tmp_path):
    with serving() as server:
        judge, record = record_of(server, tmp_path)
        put(judge, questions(3), record, title="t", progress=False)
        whole = (tmp_path / ANSWERS).read_bytes()
        (tmp_path / ANSWERS).write_bytes(whole[:-20])
        assert len(read_answers(tmp_path / ANSWERS)) == 2
        judge, record = record_of(server, tmp_path)
        put(judge, questions(3), record, title="t", progress=False)
        assert len(read_answers(tmp_path / ANSWERS)) == 3
        (tmp_path / ANSWERS).write_bytes(b"{}\n" + whole)
        with pytest.raises(JudgeError, match="line 1 is no answer"):
            record_of(server, tmp_path)


def test_answers_of_another_judge_or_index_are_not_mixed(tmp_path):
    with serving() as server:
        record_of(server, tmp_path)
        with pytest.raises(JudgeError, match="another judge.*another directory"):
            Record(tmp_path, Endpoint(server.url, "other"), "index", "own")
        with pytest.raises(JudgeError, match="another index, another explanations"):
            Record(tmp_path, Endpoint(server.url, "m"), "index 2", "file")


HOSTILE = '=HYPERLINK("http://x")</div><script>alert(1)</script>'


def rounds(folder, asked):
    judge = Sheets(folder)
    return dict((q.id, reply.text) for q, reply in judge.ask(asked))


def filled(folder, name: str, rows: list[tuple[str, str]], separator: str = ",") -> None:
    lines = [separator.join(f'"{v}"' for v in row) for row in [("id", "answer"), *rows]]
    (folder / name).write_text("\ufeff" + "\r\n".join(lines) + "\r\n", "utf-8")


def test_people_answer_in_rounds(tmp_path):
    asked = questions(5)
    assert rounds(tmp_path, asked) == {}
    rows = list(csv.DictReader(io.StringIO((tmp_path / "round_1.csv").read_text("utf-8-sig"), newline="")))
    assert [row["id"] for row in rows] == sorted(q.id for q in asked) and {row["answer"] for row in rows} == {""}
    before = (tmp_path / "round_1.csv").read_bytes()
    filled(tmp_path, "mine.csv", [("rubric0", "3"), ("rubric1", ""), ("rubric2", "0")], ";")
    assert rounds(tmp_path, asked) == {"rubric0": "3", "rubric2": "0"}
    assert rounds(tmp_path, [*asked[3:], *questions(7)[5:]]) == {}, "answers to what was taken before stay where they are"
    assert (tmp_path / "round_1.csv").read_bytes() == before and (tmp_path / "round_2.csv").is_file()
    assert len(sheets._known(tmp_path)) == 7 and not (tmp_path / "round_3.csv").exists()


@pytest.mark.parametrize("rows, message", [
    ([("rubric0", "3"), ("rubric0", "3")], "row 3: 'rubric0' stands twice"), ([("nobody", "1")], "'nobody' is none of the quest"),
    ([("rubric0", "4")], "'4' is no answer to a question of rubric"), ([("rubric0", "-1")], "'-1' is no answer"),
    ([("rubric1", "two")], "'two' is no answer")])
def test_sheets_are_checked(tmp_path, rows, message):
    rounds(tmp_path, questions(2))
    filled(tmp_path, "mine.csv", rows)
    with pytest.raises(JudgeError, match=message):
        rounds(tmp_path, questions(2))


def test_two_sheets_that_contradict_each_other(tmp_path):
    rounds(tmp_path, questions(2))
    filled(tmp_path, "a.csv", [("rubric0", "3")])
    filled(tmp_path, "b.csv", [("rubric0", "3")])
    assert rounds(tmp_path, questions(2)) == {"rubric0": "3"}
    filled(tmp_path, "b.csv", [("rubric0", "2")])
    with pytest.raises(JudgeError, match="is '2' here and '3' in a.csv"):
        rounds(tmp_path, questions(2))


@pytest.mark.parametrize("data, message", [
    (b"\xff\xfe\x00", "not UTF-8"), (b"number,score\n1,2\n", "no columns id and answer"), (b"", "no columns"),
    (b'id,answer\n"rubric0,3\n', "not readable as CSV")])
def test_broken_sheets_are_named(tmp_path, data, message):
    rounds(tmp_path, questions(1))
    (tmp_path / "mine.csv").write_bytes(data)
    with pytest.raises(JudgeError, match=f"mine.csv: {message}|mine.csv: its first row.*{message}"):
        rounds(tmp_path, questions(1))


def test_no_formula_and_no_script_gets_out(tmp_path):
    asked = [Question("a1", "explain", 0, HOSTILE), Question("b2", "rubric", 0, "+1"), Question("c3", "detect", 0, "@x\tyes?")]
    rounds(tmp_path, asked)
    for row in csv.reader(io.StringIO((tmp_path / "round_1.csv").read_text("utf-8-sig"), newline="")):
        assert not any(value.startswith(("=", "+", "-", "@", "\t", "\r")) for value in row)
    page = (tmp_path / "round_1.html").read_text("utf-8")
    assert page.count("<script>") == 1 and "&lt;script&gt;alert(1)" in page and "src=" not in page
    assert "default-src 'none'" in page and page.count("type=\"radio\"") == 4 + 2 and page.count("<textarea") == 1


def test_simulation_is_not_for_people(tmp_path):
    with pytest.raises(JudgeError, match="do=simulate"):
        rounds(tmp_path, [Question("a", "simulate", 0, "?", tokens=("t",))])


def lines_of(task: str, entries) -> list[dict]:
    return [{"task": task, "feature": feature, "interval": interval, "truth": truth, "score": score}
            for feature, interval, truth, score in entries]


def test_results_are_plain_means():
    found = results([
        *lines_of("explain", [(0, 0, None, "vowels"), (1, 0, None, None)]),
        *lines_of("rubric", [(0, 10, None, 3), (0, 10, None, 1), (0, 1, None, None), (1, 1, None, 0)]),
        *lines_of("detect", [(0, 10, 1, 1), (0, 9, 1, 0), (0, 0, 0, 0), (0, 0, 0, 0), (1, 5, 1, 1)]),
        *lines_of("simulate", [(0, 5, [0.0, 0.5], [0, 4]), (0, 9, [1.0], [9]), (1, 5, [0.0, 1.0], [3, 3])])])
    zero, one, overall = found["features"]["0"], found["features"]["1"], found["overall"]
    assert zero["explanation"] == "vowels" and "explanation" not in one
    assert zero["rubric"] == {"counts": [0, 1, 0, 1], "mean": 2.0, "answers": 2}
    assert zero["unscored"] == 1 and one["unscored"] == 1
    assert zero["detect"] == {"active_found": 0.5, "silent_found": 1.0, "answers": 4, "balanced_accuracy": 0.75}
    assert one["detect"]["balanced_accuracy"] is None, "there were no silent samples"
    assert zero["simulate"]["pearson"] == pytest.approx(np.corrcoef([0, .5, 1], [0, 4, 9])[0, 1])
    assert zero["simulate"]["spearman"] == pytest.approx(1)
    assert one["simulate"]["pearson"] is None, "of a constant there is none"
    assert overall["rubric"] == {"mean": 1.0, "features": 2, "answers": 3, "standard_error": 1.0}
    assert one["rubric"] == {"counts": [1, 0, 0, 0], "mean": None, "answers": 1}, "no mean of one answer"
    assert overall["rubric_counts"][9] == [0, 1, 0, 1] and overall["rubric_counts"][0] == [1, 0, 0, 0]
    assert overall["detect_found"][9] == [1, 1] and overall["detect_found"][8] == [0, 1]
    assert overall["unscored"] == {"detect": 0, "explain": 1, "rubric": 1, "simulate": 0} and overall["fuzz"] is None
    json.dumps(found, allow_nan=False)


def test_drawn_activations_stand_for_themselves():
    """A feature's answers from two samplings are not mixed; those of another feature stay."""
    lines = lines_of("rubric", [(0, 9, None, 3), (0, 1, None, 0), (1, 1, None, 2)])
    found = results([lines[0], lines[1] | {"drawn": True}, lines[2]])
    assert [found["features"][f]["rubric"]["counts"] for f in "01"] == [[1, 0, 0, 0], [0, 0, 1, 0]]
    assert sum(map(sum, found["overall"]["rubric_counts"])) == found["overall"]["answers"] == 2


def test_every_mean_says_how_many_answers_it_is_of(tmp_path):
    """And there is none of one: not of a feature, not over features, not as a bar."""
    one = results(lines_of("rubric", [(7, 3, None, 1), (7, 9, None, None)]))
    assert one["overall"]["rubric"]["mean"] is None and one["features"]["7"]["rubric"]["mean"] is None
    page = report.write(tmp_path / "features" / "judge", "features", "judge", one).read_text()
    assert page.count("too few answers (1)") == 2 and "1.00" not in page
    assert report.compared(tmp_path / "features" / "judge", "features", one["overall"])[0][1] == "too few answers (1)"
    two = results([*lines_of("rubric", [(7, 3, None, 1), (7, 9, None, 2)]), *lines_of("detect", [(7, 3, 1, 1), (7, 0, 0, 0)])])
    assert report.compared(tmp_path, "features", two["overall"])[0][1:3] == ("1.50 (2 answers, 1 feature)",
                                                                            "1.00 (2 answers, 1 feature)")
    assert "1.50 (2 answers)" in report.write(tmp_path / "features" / "judge", "features", "judge", two).read_text()
    many = results(lines_of("rubric", [(f, 3, None, f) for f in range(3)]))
    assert many["overall"]["rubric"]["mean"] == 1.0 and many["overall"]["rubric"]["answers"] == 3, "one answer each will do"


def test_given_explanations_and_single_answers_are_in_the_report(tmp_path):
    lines = [line | {"raw": ["so: 2", "<b>2"], "prompt": f"Is it {HOSTILE}?", "trouble": "", "id": str(i)} for i, line in
             enumerate(lines_of("rubric", [(7, 3, None, 2), (7, 9, None, None), (8, 1, None, 0)]))]
    found = results(lines, {7: f"vowels {HOSTILE}", 9: "nobody asked"})
    assert list(found["features"]) == ["7", "8"] and "explanation" not in found["features"]["8"]
    page = report.write(tmp_path, "features", "judge", found, lines).read_text()
    assert "vowels =HYPERLINK" in page and "<script" not in page
    for number, answers in (("7", 2), ("8", 1)):
        assert f'<a href="answers/{number}.html">{number}</a>' in page
        single = (tmp_path / "answers" / f"{number}.html").read_text()
        assert single.count("<summary>") == answers and "&lt;script&gt;alert(1)" in single and "<script" not in single
        assert "&lt;b&gt;2" in single and "../report.html" in single
    assert all(word in (tmp_path / "answers" / "7.html").read_text() for word in ("vowels", "unscored"))
    assert load_explanations(tmp_path / "results.json") == {7: f"vowels {HOSTILE}"}
    assert scores_in(tmp_path / "answers.jsonl") == {}, "of one answer each"
    assert scores_in(tmp_path / "nowhere" / "answers.jsonl") == {}
    report.write(tmp_path, "features", "judge", results(lines_of("rubric", [(7, 3, None, 2), (7, 9, None, 3)])))
    assert scores_in(tmp_path / "results.json") == {7: "rubric 2.50 of 3, 2 answers"}
    (tmp_path / "results.json").write_text('{"features": {"7": {"rubric": {"mean": 1}}}}')
    with pytest.raises(JudgeError, match="another version"):
        scores_in(tmp_path / "results.json")


def test_reports_are_text_and_pictures(tmp_path):
    found = results([*lines_of("explain", [(0, 0, None, HOSTILE)]),
                     *lines_of("rubric", [(0, i, None, i % 4) for i in range(1, 11)]),
                     *lines_of("detect", [(0, 3, 1, 1), (0, 0, 0, 0)])])
    other = tmp_path / "features_neurons" / "judge"
    report.write(other, "features_neurons", "judge", found)
    page = report.write(tmp_path / "features" / "judge", "features", "judge <b>", found).read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "judge &lt;b&gt;" in page and page.count("<figure>") == 2
    assert page.count("features_neurons") == 1, "what the same judge said of others stands beside"
    (other / "results.json").write_text("[]")
    assert "features_neurons" not in report.write(tmp_path / "features" / "judge", "features", "judge", found).read_text()
