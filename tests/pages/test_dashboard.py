"""The site: nothing from a corpus can run or hide, files are bounded, and a real browser searches, sorts, opens and goes back."""

import shutil
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from saejax.base.records import RunPaths
from saejax.base.text import visible
from saejax.config import default_config, resolve
from saejax.features.compare.picture import Picture
from saejax.features.index.reader import FeatureIndex
from saejax.pages import dashboard, dashboard_list, data_files
from saejax.pages.dashboard import add_link, address_in, write_dashboard
from saejax.pages.dashboard_list import Lines
from saejax.pages.report import LINK, html, link_dashboard
from saejax.pages.summary import Rates, Result
from tests.features.conftest import DEAD, FEATURES
from tests.pages.browser import CHROMIUM, Browser
from tests.pages.test_dashboard_files import MILLION, many_lines, parsed
from tests.pages.test_report import EVALUATION

HOSTILE = ["<script>window.hacked=1</script>", "</script><img src=x onerror='window.hacked=1'>", "a\u202eb\u2066c", "nul\x00nul",
           "\u2028\u2029", "x" * 100_000, "'\"`${1}", "javascript:alert(1)", "{{ 7 * 7 }}", "\ud800", "e" + "\u0301" * 500,
           "\u200b", "]]>--><!--", "\\u003c"]


@pytest.fixture(scope="module")
def hostile_site(index, tmp_path_factory):
    """The same index over a vocabulary in which every token is an attack."""
    hostile = FeatureIndex.open(index.path)
    hostile.__dict__["vocabulary"] = [HOSTILE[i % len(HOSTILE)] for i in range(len(index.vocabulary))]
    return write_dashboard(hostile, tmp_path_factory.mktemp("hostile") / "dashboard", title=HOSTILE[1],
                           figures=[(HOSTILE[0], HOSTILE[1])], links=[("x", "javascript:alert(1)"), ("ok", "../report.html")],
                           explanations={i: text for i, text in enumerate(HOSTILE)}, progress=False)


def test_hostile_text_stays_data(hostile_site):
    for file in (hostile_site.parent / "data").rglob("*.js"):
        data = file.read_bytes()
        assert data.isascii() and b"<" not in data and b"\\u202e" not in data and b"\\u0000" not in data
        assert len(data) <= data_files.LARGEST
    page = hostile_site.read_text()
    assert page.count("<script") == len(dashboard.SCRIPTS) and "<img" not in page and "default-src 'none'" in page
    assert parsed(hostile_site.parent / "data" / "meta.js")["links"] == [["ok", "../report.html"]]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium here (Debian: apt install chromium)")
    try:
        page = Browser()
    except (AssertionError, OSError) as error:
        pytest.skip(f"Chromium does not start here: {error}")
    yield page
    page.close()


def rows_of(page) -> list[list[str]]:
    return page.js("[...document.querySelectorAll('#list tbody tr')].map(r => [...r.children].map(c => c.textContent))")


@pytest.mark.browser
def test_explanations_are_listed_searched_and_shown(browser, index, tmp_path):
    page = write_dashboard(index, tmp_path / "site", title="x", explanations={3: "Capital <b>cities</b>", 5: HOSTILE[1]},
                           progress=False)
    browser.size(1280, 1000)
    browser.open(page)
    browser.wait("document.querySelectorAll('#list tbody tr').length > 5")
    browser.type("#search", "cities")
    browser.wait("document.querySelectorAll('#list tbody tr').length === 1")
    assert rows_of(browser)[0][:2] == ["3", "Capital <b>cities</b>"]
    browser.click("a[href='#feature=3']")
    browser.wait("!!document.querySelector('#said')")
    assert browser.js("document.querySelector('#said').textContent") == "Capital <b>cities</b>"


@pytest.mark.browser
def test_search_sort_open_hover_and_back(browser, site, index):
    browser.size(1280, 1000)
    browser.open(site)
    browser.wait("document.querySelectorAll('#list tbody tr').length > 5")
    assert len(rows_of(browser)) == FEATURES - len(DEAD) and "of 40 features" in browser.js("document.body.innerText")
    browser.click("[data-sort=max]")
    browser.wait("document.querySelector('th[aria-sort=descending] [data-sort=max]') !== null")
    order = [int(row[0]) for row in rows_of(browser)]
    assert order == sorted(order, key=lambda f: (-index.column("max")[f], f))
    browser.type("#search", str(order[2]))
    browser.wait(f"[...document.querySelectorAll('#list tbody tr td:first-child')].some(c => c.textContent === '{order[2]}')")
    browser.wait("document.querySelectorAll('#list tbody tr').length < 38")
    searched = browser.js("location.hash")
    browser.click(f"a[href='#feature={order[2]}']")
    browser.wait("!!document.querySelector('.ex')")
    assert browser.js("document.querySelector('h1').textContent") == f"Feature {order[2]}"
    stored = index.examples(order[2])
    peak = browser.js("document.querySelector('.tok.peak').textContent")
    assert peak == visible(index.vocabulary[index.tokens_NT[stored[0]["context"], stored[0]["position"]]])
    browser.hover(".tok.peak")
    browser.wait("!document.getElementById('tip').hidden")
    assert f"{stored[0]['value']:.4g}".rstrip("0") in browser.js("document.getElementById('tip').textContent")
    assert browser.js("document.querySelectorAll('.bar.i10').length") > 0
    browser.js("history.back()")
    browser.wait("!!document.querySelector('#search')")
    assert browser.js("location.hash") == searched and len(rows_of(browser)) < 38
    assert browser.troubles() == []


def follow(page, selector: str) -> None:
    """Goes where a link leads; a click leaves the page while the click is still being answered."""
    page.call("Page.navigate", url=page.js(f"document.querySelector({selector!r}).href"))


@pytest.mark.browser
def test_from_the_report_to_a_feature_and_back(browser, index, tmp_path):
    """The links of the report, of a page about one prompt, and of the dashboard, followed."""
    site = write_dashboard(index, tmp_path / "dashboard", title="tiny", progress=False)
    page = html(Result(resolve(default_config("topk")), RunPaths(tmp_path), 1, EVALUATION, Rates(None, None)), [])
    (tmp_path / "report.html").write_text(page)
    link_dashboard(RunPaths(tmp_path))
    add_link(site.parent, *LINK)
    browser.size(1280, 1000)
    browser.open(tmp_path / "report.html")
    browser.wait("!!document.querySelector('#dashboard a')")
    follow(browser, "#dashboard a")
    browser.wait("document.querySelectorAll('#list tbody tr').length > 5")
    follow(browser, "a[href='../report.html']")
    browser.wait("document.title.endsWith('saejax report')")
    address = address_in(site.parent, 3, tmp_path / "pages" / "steered.html")
    assert address == "../dashboard/index.html#feature=3"
    browser.open((tmp_path / "pages" / address.split("#")[0]).resolve(), "#feature=3")
    browser.wait("document.querySelector('h1')?.textContent === 'Feature 3'")
    assert browser.troubles() == []


@pytest.mark.browser
def test_the_map_names_and_opens_the_feature_under_the_pointer(browser, index, tmp_path):
    picture = Picture(np.arange(FEATURES), np.stack([np.arange(FEATURES) / FEATURES, np.full(FEATURES, 0.5)], axis=1))
    browser.size(1280, 1000)
    browser.open(write_dashboard(index, tmp_path / "site", title="x", picture=picture, progress=False))
    browser.wait("document.querySelector('#map')?.dataset.ready && document.querySelectorAll('#list tbody tr').length > 5")
    browser.js("document.querySelector('#map').scrollIntoView({ block: 'center' })")
    browser.hover("#map")  # its middle
    browser.wait("!document.getElementById('tip').hidden")
    assert browser.js("document.getElementById('tip').textContent").split()[0] == str(FEATURES // 2)
    browser.click("#map")
    browser.wait(f"document.querySelector('h1').textContent === 'Feature {FEATURES // 2}'")
    assert browser.troubles() == []


@pytest.mark.browser
def test_the_page_is_the_same_over_http(browser, site):
    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=site.parent)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        there = f"http://127.0.0.1:{server.server_port}/"
        browser.call("Page.navigate", url=f"{there}index.html#sort=max&dir=-1")
        browser.wait(f"document.querySelectorAll('#list tbody tr').length === {FEATURES - len(DEAD)}")
        served = rows_of(browser)
        browser.call("Page.navigate", url=f"{there}index.html#feature=3")
        browser.wait("!!document.querySelector('.ex')")
        server.shutdown()
    asked = [trouble for trouble in browser.troubles() if "favicon.ico" not in trouble]
    assert f"{there}data/max/0000.js" in asked and all(url.startswith(there) for url in asked)
    browser.open(site, "#sort=max&dir=-1")
    browser.wait(f"document.querySelectorAll('#list tbody tr').length === {FEATURES - len(DEAD)}")
    assert rows_of(browser) == served


@pytest.mark.browser
def test_the_map_of_a_sample_says_so_and_names_its_features(browser, index, tmp_path, monkeypatch):
    monkeypatch.setattr(dashboard, "_POINTS", 3)  # of a file
    features = np.array([1, 4, 8, 12, 20, 23, 31])
    places = np.stack([np.linspace(0, 1, 7), np.full(7, 0.5)], axis=1)
    site = write_dashboard(index, tmp_path / "site", title="x", picture=Picture(features, places), progress=False)
    assert len(list((site.parent / "data" / "map").iterdir())) == 3
    browser.size(1280, 1000)
    browser.open(site)
    browser.wait("document.querySelector('#map')?.dataset.ready && document.querySelectorAll('#list tbody tr').length > 5")
    assert "A sample of 7 of 40 features." in browser.js("document.body.innerText")
    browser.js("document.querySelector('#map').scrollIntoView({ block: 'center' })")
    browser.hover("#map")  # its middle
    browser.wait("!document.getElementById('tip').hidden")
    said = browser.js("document.getElementById('tip').textContent").split()
    assert said[0] == "12" and said[1].replace("\u2423", "") == visible(index.token(index.lists("token_ids")[12][0])).strip()
    browser.click("#map")
    browser.wait("document.querySelector('h1').textContent === 'Feature 12'")
    assert browser.troubles() == []


@pytest.mark.browser
def test_dead_unknown_and_empty_say_so(browser, site):
    browser.open(site, f"#feature={DEAD[0]}")
    assert "Dead" in browser.wait("document.querySelector('#dead-notice')?.textContent")
    browser.open(site, "#feature=999999")
    assert "0 to 39" in browser.wait("document.querySelector('#no-such')?.textContent")
    browser.open(site, "#feature=%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E")
    browser.wait("!!document.querySelector('#no-such')")
    browser.open(site, "#q=zzzzzz")
    browser.wait("document.querySelector('#status')?.textContent.startsWith('No feature matches')")
    browser.open(site, "#dead=1&sort=density")
    browser.wait("document.querySelectorAll('#list tbody tr').length === 40")
    assert browser.js("document.querySelector('#list tbody tr td:nth-child(2)').textContent") == "dead"


@pytest.mark.browser
@pytest.mark.parametrize("width, dark", [(390, False), (1280, True)])
def test_nothing_is_wider_than_the_page(browser, site, width, dark):
    browser.size(width, 844, dark)
    for fragment, there in (("", "document.querySelectorAll('#list tbody tr').length > 5"),
                            ("#feature=3", "!!document.querySelector('.ex')")):
        browser.open(site, fragment)
        browser.wait(there)
        assert browser.js("document.documentElement.scrollWidth") <= width
    background = browser.js("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")


@pytest.mark.browser
def test_hostile_text_cannot_run(browser, hostile_site):
    browser.size(1280, 900)
    for fragment, there in (("", "document.querySelectorAll('#list tbody tr').length > 5"),
                            ("#feature=3", "!!document.querySelector('.ex')")):
        browser.open(hostile_site, fragment)
        browser.wait(there)
        assert browser.js("window.hacked === undefined && document.querySelectorAll('img, iframe, object').length === 0")
        assert browser.js("document.querySelectorAll('script').length") == len(dashboard.SCRIPTS)
        text = browser.js("document.body.textContent")
        assert "<script>window.hacked=1</script>" in text and "\u2400" in text and "\u202e" not in text and "\x00" not in text
    assert browser.js("(() => { const s = document.createElement('script'); s.textContent = 'window.hacked = 2'; "
                      "document.body.append(s); return window.hacked === undefined; })()"), "the policy forbids inline script"
    assert all("Content Security Policy" in trouble or "Content-Security-Policy" in trouble for trouble in browser.troubles())


def grown(site, folder, lines: Lines, part: int):
    """The page with the lines of another dictionary, `part` in a file."""
    folder.mkdir(parents=True)
    for name in ("index.html", *dashboard.STYLES, *dashboard.SCRIPTS):
        (folder / name).write_bytes((site.parent / name).read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dashboard_list, "PART", part)
        divided = dashboard_list.write_list(folder / "data", lines, lambda token: f" token {token}")
    changes = {"features": lines.features, "explained": len(lines.said)} | divided
    data_files.write_value(folder / "data" / "meta.js", "meta", 0, parsed(site.parent / "data" / "meta.js") | changes)
    return folder / "index.html"


def repeated(index, many: int) -> Lines:
    """The lines of the small index, again and again."""
    lines = Lines.of(index, {})
    turn = np.arange(many) % FEATURES
    return Lines(*({name: values[turn] for name, values in columns.items()} for columns in (lines.numbers, lines.ids)), {})


@pytest.mark.browser
def test_an_address_of_a_page_opens_that_page(browser, index, site, tmp_path):
    """Cold, reloaded and gone back to; one beyond the end opens the last."""
    browser.size(1280, 900)
    page = grown(site, tmp_path / "dashboard", repeated(index, 400), 60)
    status = "document.querySelector('#status')?.textContent"
    browser.open(page, "#page=3")
    assert browser.wait(f"{status} === '380 features, page 4 of 8'")
    assert rows_of(browser)[0][0] == "157", "seven of the features before it are dead"
    browser.call("Page.reload")
    browser.wait(f"{status} === '380 features, page 4 of 8'")
    browser.click("#before")
    browser.wait(f"{status} === '380 features, page 3 of 8'")
    browser.js("history.back()")
    browser.wait(f"{status} === '380 features, page 4 of 8'")
    browser.open(page, "#page=99&dead=1")
    browser.wait(f"{status} === '400 features, page 8 of 8'")
    assert browser.troubles() == []


@pytest.mark.browser
def test_a_leading_blank_is_seen_and_searched(browser, index, tmp_path):
    blank, none = index.lists("token_ids")[3][:2]
    holding = {f for f in range(FEATURES) if f not in DEAD for name in ("token_ids", "logit_ids")
               if blank in index.lists(name)[f][:4]}
    assert 0 < len(holding) < FEATURES - len(DEAD)
    browser.size(1280, 1000)
    explanations = {0: "kings", 5: "an old King"}
    browser.open(named(index, tmp_path / "site", {blank: " king", none: "king"}, explanations))
    browser.wait("document.querySelectorAll('#list tbody tr').length > 5")
    drawn = ("[...document.querySelectorAll('.word')].filter(w => w.textContent === {!r})"
             ".map(w => [...w.querySelectorAll('.blank')].filter(b => b.clientWidth > 3 && b.clientHeight > 2).length)")
    assert set(browser.js(drawn.format(" king"))) == {1} and set(browser.js(drawn.format("king"))) == {0}
    browser.type("#search", " king")
    browser.wait(f"document.querySelectorAll('#list tbody tr').length === {len(holding | {0, 5})}")
    assert {int(row[0]) for row in rows_of(browser)} == holding | {0, 5}, "an explanation begins with a word"
    browser.call("Page.reload")
    browser.wait(f"document.querySelectorAll('#list tbody tr').length === {len(holding | {0, 5})}")
    assert browser.js("document.querySelector('#search').value") == " king"
    browser.type("#search", " ")
    browser.wait("document.querySelectorAll('#list tbody tr').length === 1")
    assert rows_of(browser)[0][:2] == ["5", "an old King"], "a blank behind it counts, too"
    assert browser.troubles() == []


def named(index, out, words: dict[int, str], explanations=None):
    """The site with other texts of some tokens, and w0, w1, ... of the rest."""
    other = FeatureIndex.open(index.path)
    other.__dict__["vocabulary"] = [words.get(i, f"w{i}") for i in range(len(index.vocabulary))]
    return write_dashboard(other, out, title="x", explanations=explanations or {}, progress=False)


@pytest.mark.browser
def test_the_best_match_comes_first_and_is_lit(browser, index, tmp_path):
    """What a feature fires on, the text itself before a part of it, then its explanation, then what it promotes."""
    tokens, logits = index.lists("token_ids"), index.lists("logit_ids")
    exact, within = tokens[3][0], next(ids[1] for ids in tokens if ids and ids[1] != tokens[3][0])
    promoted = next(t for ids in logits for t in ids[:4] if t < len(index.vocabulary) and t not in (exact, within))
    words = {exact: " King", within: "un<b>king", promoted: "kingly"}

    def best(ids):
        fits = {" King": 0, "kingly": 1, "un<b>king": 2}
        return min((10 * fits[words[t]] + place for place, t in enumerate(ids[:4]) if t in words), default=None)

    expected = []
    for f in sorted(set(range(FEATURES)) - set(DEAD)):
        ranks = [(0, best(tokens[f])), (1, 0 if f == 8 else None), (2, best(logits[f]))]
        expected += [(*next(rank for rank in ranks if rank[1] is not None), f)] if any(r[1] is not None for r in ranks) else []
    browser.size(1280, 1000)
    browser.open(named(index, tmp_path / "site", words, {8: "<i>kings</i>"}), "#q=king")
    browser.wait(f"document.querySelectorAll('#list tbody tr').length === {len(expected)}")
    assert [int(row[0]) for row in rows_of(browser)] == [f for *_, f in sorted(expected)]
    assert "best match first" in browser.js("document.querySelector('#status').textContent")
    lit = browser.js("[...document.querySelectorAll('#list .word, #list .said')].map(w => [...w.querySelectorAll('mark')]"
                     ".map(m => m.textContent).join('').toLowerCase()).filter(text => text)")
    assert set(lit) == {"king"} and len(lit) >= len(expected)
    assert browser.js("document.querySelectorAll('#list b, #list i').length") == 0
    assert "un<b>king" in browser.js("document.querySelector('#list').textContent")
    browser.click("[data-sort=number]")
    browser.wait("document.querySelector('th[aria-sort=ascending] [data-sort=number]') !== null")
    assert [int(row[0]) for row in rows_of(browser)] == sorted(f for *_, f in expected)
    assert browser.troubles() == []


@pytest.mark.browser
def test_back_from_a_feature_finds_the_place_again(browser, index, site, tmp_path):
    """Gone back to, and reloaded where all the list must be read before."""
    browser.size(1280, 700)
    page = grown(site, tmp_path / "dashboard", repeated(index, 400), 60)
    shutil.copytree(site.parent / "data" / "features", page.parent / "data" / "features")
    rows = "document.querySelector('#status')?.textContent === '380 features, page 1 of 8'"
    browser.open(page)
    browser.wait(rows)
    browser.js("scrollTo(0, 900)")
    browser.click("#list tbody tr:nth-child(30) a")
    browser.wait("document.querySelector('h1')?.textContent.startsWith('Feature') && scrollY === 0")
    left = browser.js("(history.back(), new Promise(done => setTimeout(() => done(scrollY), 700)))")
    assert browser.js(rows) and left > 600
    assert 0 < browser.js("document.querySelector('#list tbody tr:nth-child(30)').getBoundingClientRect().top") < 700
    browser.call("Page.reload")
    browser.wait(f"{rows} && Math.abs(scrollY - {left}) < 2")
    browser.js("location.hash = 'page=2'")
    browser.wait("scrollY === 0")
    assert browser.troubles() == []


def shown_at(browser, what: str, condition: str) -> None:
    """Waits for a condition and prints how long it took."""
    began = time.monotonic()
    browser.wait(condition, 120)
    print(f"{what}: {time.monotonic() - began:.2f} s")


def seconds_to(browser, address: str, status: str) -> float:
    """How long the page takes to show another address, as if gone back to; its status then begins so."""
    milliseconds = browser.js("(() => { const began = performance.now(); history.pushState(null, '', " + repr(address) + "); "
                              "dispatchEvent(new PopStateEvent('popstate')); return performance.now() - began; })()")
    ready = f"document.querySelector('#status').textContent.startsWith({status!r}) && !{READING}"
    shown_at(browser, f"{address}: {milliseconds / 1000:.3f} s, with reading", ready)
    return milliseconds / 1000


READING = "/read so far|reading/.test(document.querySelector('#status').textContent)"


@pytest.mark.browser
@pytest.mark.slow
def test_a_million_features_are_listed_sorted_and_searched(browser, site, tmp_path):
    """The first appear before all are read; what sorts or searches reads its own columns, and answers within a second after."""
    lines = many_lines(MILLION)
    alive = np.flatnonzero(lines.numbers["density"])
    browser.size(1280, 900)
    browser.open(grown(site, tmp_path / "dashboard", lines, dashboard_list.PART))
    shown_at(browser, "first lines", "document.querySelectorAll('#list tbody tr').length === 50")
    assert browser.js(READING) and [int(row[0]) for row in rows_of(browser)] == alive[:50].tolist()
    shown_at(browser, "densities", f"!{READING}")
    has = "Object.entries(dashboard.data.list.columns).filter(([, c]) => c.started).map(([name]) => name)"
    assert browser.js(has) == ["density"]
    order = alive[np.argsort(-lines.numbers["max"][alive], kind="stable")]
    seconds_to(browser, "#sort=max&dir=-1", f"{len(alive):,} features, page 1 of")
    assert [int(row[0]) for row in rows_of(browser)] == order[:50].tolist()
    assert browser.js(has) == ["density", "max"]
    seconds_to(browser, "#q=token+4711", "")
    assert set(browser.js(has)) == {"density", "max", "tokens", "logits", "words", "said"}
    for address, found in (("#q=token+471", "471"), ("#q=about+7", "about 7"), ("#q=token+47&sort=mean&dir=-1", "47")):
        assert seconds_to(browser, address, "") < 1
        assert all(found in "".join(row) for row in rows_of(browser)) and len(rows_of(browser)) == 50
    assert seconds_to(browser, "#sort=density&dir=-1&page=9000", "") < 1
    order = alive[np.argsort(-lines.numbers["density"][alive], kind="stable")]
    assert [int(row[0]) for row in rows_of(browser)] == order[450_000:450_050].tolist()
    assert browser.troubles() == []
