"""The page that people rate on, in a real browser: what it saves is what the command reads."""

import pytest

from saejax.judging.questions import Question
from saejax.pages.sheets import Sheets
from tests.pages.browser import CHROMIUM, Browser

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian: apt install chromium)")]
HOSTILE = "</div><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"


def test_answers_saved_on_the_page_are_read(tmp_path):
    asked = [Question("a1", "rubric", 0, HOSTILE), Question("b2", "detect", 0, "Is it?"), Question("c3", "explain", 0, "What?"),
             Question("d4", "rubric", 0, "left open")]
    assert list(Sheets(tmp_path).ask(asked)) == []
    browser = Browser()
    try:
        browser.size(390, 800)
        browser.open(tmp_path / "round_1.html")
        browser.wait("typeof saejaxCsv === 'function'")
        browser.click("#a1 input[value='2']")
        browser.click("#b2 input[value=no]")
        browser.type("#c3 textarea", '=vowels, "mostly"')
        assert browser.js("document.getElementById('count').textContent") == "3"
        assert browser.js("document.querySelector('#a1 .prompt').textContent") == HOSTILE and browser.js("window.hacked") is None
        assert browser.js("document.documentElement.scrollWidth") <= 390
        csv = browser.js("saejaxCsv()")
        assert browser.troubles() == []
    finally:
        browser.close()
    (tmp_path / "round_1_answers.csv").write_text(csv, "utf-8")
    found = {question.id: reply.text for question, reply in Sheets(tmp_path).ask(asked)}
    assert found == {"a1": "2", "b2": "no", "c3": '=vowels, "mostly"'}
