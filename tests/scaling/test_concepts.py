"""Lists of concepts, their counts and samples; curves of presence over frequency, of concepts with a known threshold."""

import csv
import dataclasses
import json
import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from saejax.base.errors import ConceptError
from saejax.base.records import Dedicated
from saejax.data import tokens
from saejax.data.text import Text
from saejax.lm.tokenizer import from_pretrained
from saejax.pages import concepts as pages
from saejax.scaling.concepts import counting, fit, lists, matching, sampling, table
from saejax.scaling.concepts.lists import Concept
from tests import tiny_experiment as tiny

TEXT = " Iron and iron, iron iron\niron ore, irony. Near Paris and paris lies New York City ; New York has no cherries. "


def concepts(*names: str) -> list[Concept]:
    return [Concept("things", tuple(name.split("/"))) for name in names]


def test_shipped_lists():
    sizes = {name: len(lists.shipped(name, ambiguous=True)) for name in lists.categories()}
    assert sizes["elements"] == 118 and sizes["london_boroughs"] == 33
    assert min(len(lists.shipped(name)) for name in ("elements", "cities", "animals", "foods")) >= 100
    every = lists.shipped(ambiguous=True)
    assert len(lists.spelled(every)) == sum(len(c.spellings) for c in every)  # no name is in two lists
    clear = {c.name for c in lists.shipped()}
    assert not clear & {"lead", "tin", "mercury", "turkey", "orange", "Nice", "Reading", "Bath"} and {"cobalt", "Oslo"} <= clear


def test_a_list_of_ones_own(tmp_path):
    file = tmp_path / "stones.txt"
    file.write_text("# what lies about\nflint\ngray wacke/greywacke\nmarble *\n\n")
    assert lists.read(file) == [Concept("stones", ("flint",)), Concept("stones", ("gray wacke", "greywacke"))]
    assert [c.name for c in lists.read(file, ambiguous=True)] == ["flint", "gray wacke", "marble"]
    file.write_text("flint\nmica 2\nb,c\n")
    with pytest.raises(ConceptError, match=r"line 2 \('mica 2'\), line 3 \('b,c'\) are no name"):
        lists.read(file)
    file.write_text("# nothing\n")
    with pytest.raises(ConceptError, match="no concepts"):
        lists.read(file)
    with pytest.raises(ConceptError, match="not readable"):
        lists.read(tmp_path / "none.txt")
    with pytest.raises(ConceptError, match="no list of concepts 'stones'; choose one of animals"):
        lists.shipped("stones")
    with pytest.raises(ConceptError, match="'flint' is twice in things"):
        matching.Matcher(concepts("flint", "chert/flint"))


def test_counts_are_of_names_between_blanks():
    names = concepts("iron", "Paris", "New York", "New York City", "cherry", "ore")
    found = counting.count(names, [(TEXT, 20), ("iron at the edges iron", 5), (" iron ", 2)], progress=False)
    # " Iron ", " iron " (the one before the comma and the two at the line's end are none); the longer of two names counts
    assert found.occurrences_C.tolist() == [3, 1, 1, 1, 0, 0] and found.tokens == 27
    assert found.frequency_C[0] == 3 / 27 and found.absent == ["cherry", "ore"]
    assert counting.count(concepts("sulfur/sulphur"), [(" sulfur sulphur Sulphur x ", 4)], progress=False).occurrences_C == 3
    # names of several words are not only those with a blank
    odd = concepts("Winston-Salem", "bric-a-brac", "king's cup", "shepherd's")
    text = " a Winston-Salem b bric-a-brac c king's cup d shepherd's pie"
    assert counting.count(odd, [(text, 12)], progress=False).occurrences_C.tolist() == [1, 1, 1, 1]
    with pytest.raises(ConceptError, match="no tokens"):
        counting.count(names, [], progress=False)


def test_places_are_words_with_their_plurals():
    names = concepts("iron", "Paris", "New York", "cherry", "ore")
    found = [(names[c].name, TEXT[first:stop]) for c, first, stop in matching.Matcher(names).places(TEXT)]
    assert found == [("iron", "Iron"), *[("iron", "iron")] * 4, ("ore", "ore"), ("Paris", "Paris"), ("New York", "New York"),
                     ("New York", "New York"), ("cherry", "cherries")]
    assert matching.Matcher(names).places("ores2 iron_ 3iron Parises irons'") == [(0, 26, 31)]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """(text, tokenizer, texts of its training documents): `stone` is common, `flint` is rare."""
    folder = tmp_path_factory.mktemp("concepts")
    rng, written = np.random.default_rng(0), []
    (folder / "text").mkdir()
    for i in range(120):
        written.append(" ".join(rng.choice(["stone", "flint", "a", "of", "stones"], 40, p=[.2, .02, .4, .33, .05])) + ".")
        (folder / "text" / f"{i}.txt").write_text(written[-1])
    config = tiny.make_config(tiny.write_model(folder / "model"), folder / "text", folder / "run", **{"text.holdout": 0.0})
    return Text.of(config), from_pretrained(folder / "model"), written


def test_counts_of_a_text_and_of_its_token_store(words):
    text, tokenizer, written = words
    names = concepts("stone", "flint", "granite")
    by_hand = [sum(document.split(" ")[1:-1].count(name) for document in written) for name in ("stone", "flint", "granite")]
    found = counting.count(names, counting.documents(text, tokenizer), progress=False)
    assert found.occurrences_C.tolist() == by_hand and min(by_hand[:2]) > 50 and found.absent == ["granite"]
    assert found.tokens == sum(map(len, written)) + len(written)  # a character is a token, and a document ends with EOS
    store = tokens.in_memory(text.options, tokenizer, 2**30, seed=text.seed)
    rows = counting.count(names, counting.contexts(store, tokenizer), progress=False)
    assert rows.tokens == store.contexts * store.context
    lost = 1 - rows.occurrences_C[:2] / found.occurrences_C[:2]
    assert (lost > 0).all() and (lost < 0.4).all()  # cut by the end of a context of 32 letters
    every = store.read(0, store.contexts)
    kept = every, np.ones_like(every, bool)
    again = counting.count(names, counting.rows([kept], tokenizer), progress=False)
    assert np.array_equal(again.occurrences_C, rows.occurrences_C) and again.tokens == rows.tokens
    part = counting.count(names, counting.documents(text, tokenizer, tokens=2000), progress=False)
    assert 2000 <= part.tokens < 2000 + max(map(len, written)) + 1


def test_what_fills_a_row_up_is_not_counted(words):
    _, tokenizer, _ = words
    ids = np.array([tokenizer.encode(" stone flint stone ")] * 3)
    keep = np.ones_like(ids, bool)
    keep[0, :3], keep[1, 13:], keep[2] = False, False, False  # a mask in front is text all the same
    assert list(counting.rows([(ids, keep)], tokenizer)) == [(" stone flint stone ", 19), (" stone flint ", 13), ("", 0)]


def test_counts_as_a_file(tmp_path):
    counting.Counts(tuple(concepts("iron", "New York")), np.array([3, 0]), 12).write(tmp_path / "counts.csv")
    assert (tmp_path / "counts.csv").read_text() == (
        "category,name,count,frequency\nthings,iron,3,0.25\nthings,New York,0,0\n")


PIECES = [b"<s>", b" of", b" a", b" fl", b"int", b" stone", b"."]


def contexts_of(n: int, seed: int = 0) -> np.ndarray:
    """[n, 8]: `flint` in about one of 50."""
    rng = np.random.default_rng(seed)
    tokens_NT = rng.choice([1, 2, 5, 6], (n, 8), p=[.45, .45, .05, .05])
    tokens_NT[:, 0] = 0
    there = np.flatnonzero(rng.random(n) < 0.02)
    tokens_NT[there, 3:5] = 3, 4
    return tokens_NT.astype(np.int32)


def sample_of(tokens_NT: np.ndarray, **options):
    pieces = np.array_split(tokens_NT, 3)
    return sampling.find(concepts("flint", "stone"), ((part, part > 0) for part in pieces), PIECES,
                         sampling.SampleOptions(**options), progress=False)


def test_a_sample_of_everything_has_all_places():
    tokens_NT = contexts_of(300)
    found = sample_of(tokens_NT, per_concept=1000, random=1000)
    assert found.contexts == 300 and (found.weight_n == 1).all() and np.array_equal(found.tokens_nT, tokens_NT)
    spans = list(zip(found.row_S, found.concept_S, found.first_S, found.stop_S, strict=True))
    by_hand = [(row, c, at, at + size) for row in range(300) for at in range(8)
               for c, start, size in ((0, 3, 2), (1, 5, 1)) if tokens_NT[row, at] == start]
    assert spans == by_hand and found.found_C.tolist() == [sum(s[1] == c for s in by_hand) for c in (0, 1)]
    with pytest.raises(ConceptError, match="no whole context"):
        sampling.find(concepts("flint"), [], PIECES, progress=False)


def test_weighted_sums_of_a_sample_are_those_of_the_text():
    """Mean of 120 samples within 4 standard errors: contexts, occurrences of both concepts, and tokens of another word."""
    tokens_NT, seen = contexts_of(2000), []
    for seed in range(120):
        found = sample_of(tokens_NT, per_concept=10, random=40, seed=seed)
        assert len(found.numbers_n) <= 60 and np.array_equal(found.tokens_nT, tokens_NT[found.numbers_n])
        of_concept = np.bincount(found.concept_S, found.weight_n[found.row_S], 2)
        seen.append([found.weight_n.sum(), *of_concept, found.weight_n @ (found.tokens_nT == 2).sum(1)])
    truth = [2000, *found.found_C, (tokens_NT == 2).sum()]
    error = np.std(seen, axis=0, ddof=1) / math.sqrt(len(seen))
    assert (np.abs(np.mean(seen, axis=0) - truth) < 4 * error).all()
    assert np.bincount(found.concept_S, minlength=2)[0] >= 10  # one context of 50 has it, and the sample has it ten times


def test_words_spread_over_frequencies():
    rng = np.random.default_rng(1)
    n, total = 5000, 10**9
    counts = counting.Counts(tuple(concepts(*("".join(rng.choice(list("abcdefgh"), 9)) for _ in range(n)))),
                             np.exp(rng.normal(math.log(2e4), 2, n)).astype(int), total)
    chosen = sampling.spread(counts, 400, 1e-6, 1e-3, seed=3)
    where = {concept.name: f for concept, f in zip(counts.concepts, counts.frequency_C, strict=True)}
    f = np.array([where[concept.name] for concept in chosen])
    assert len(set(chosen)) == 400 and 1e-6 <= f.min() and f.max() <= 1e-3 and (np.diff(f) >= 0).all()
    assert np.abs(np.histogram(np.log10(f), 6, (-6, -3))[0] - 400 / 6).max() < 8
    assert chosen == sampling.spread(counts, 400, 1e-6, 1e-3, seed=3) != sampling.spread(counts, 400, 1e-6, 1e-3, seed=4)
    with pytest.raises(ConceptError, match="6000 are wanted; give more candidates"):
        sampling.spread(counts, 6000, 1e-6, 1e-3)


def world(alive: int, threshold: float = 0.5, slope: float = 2.0, n: int = 600, seed: int = 0) -> fit.Size:
    """Concepts from 1e-7 to 1e-2, of which those above threshold / alive are mostly present."""
    rng = np.random.default_rng([seed, alive])
    f = np.exp(np.random.default_rng(seed).uniform(math.log(1e-7), math.log(1e-2), n))
    p = expit(slope * np.log(f * alive / threshold))
    return fit.Size(f"{alive} features", alive, tuple(f"word{i}" for i in range(n)), f, rng.random(n) < p)


def test_the_collapse_recovers_the_threshold():
    found = fit.collapse([world(alive) for alive in (1_000, 10_000, 100_000)], draws=60)
    assert found.f50_alive == pytest.approx(0.5, rel=0.2) and found.curve.slope == pytest.approx(2, rel=0.2)
    low, high = found.f50_alive_interval
    assert low < 0.5 < high and high / low < 2 and found.freedom == 4 and found.p > 0.01 and not found.refused
    for one in found.sizes:
        assert one.f50 == pytest.approx(0.5 / one.alive, rel=0.35) and one.f50_alive == pytest.approx(one.f50 * one.alive)
        assert one.f50_interval[0] < 0.5 / one.alive < one.f50_interval[1] and one.near >= fit.LEAST_NEAR


def test_curves_that_do_not_collapse():
    found = fit.collapse([world(1_000, threshold=0.1), world(100_000, threshold=3.0)], draws=20)
    assert found.p < 1e-6 and found.statistic > 30
    assert [one.f50_alive for one in found.sizes] == pytest.approx([0.1, 3.0], rel=0.5)


def test_the_curve_maximises_the_likelihood():
    size = world(10_000, n=150)
    x, y = np.log(size.frequency_N), size.present_N

    def loss(at):
        return np.logaddexp(0, np.where(y, -1, 1) * at[0] * (x - at[1])).sum()

    best = minimize(loss, (1.0, x.mean()), method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-10, "maxiter": 4000})
    curve = fit.fit(size, draws=2).curve
    assert not curve.firth and (curve.slope, curve.ln_f50) == pytest.approx(best.x, rel=1e-4)
    assert curve.log_likelihood == pytest.approx(-best.fun, abs=1e-7)
    assert curve(math.exp(curve.ln_f50)) == pytest.approx(0.5)


def test_a_sharp_threshold_is_fitted_by_the_penalised_likelihood():
    f = np.geomspace(1e-5, 1e-3, 60)
    curve = fit.fit(fit.Size("sharp", 100, tuple(map(str, range(60))), f, f > 1e-4), draws=2).curve
    x, y = np.log(f), f > 1e-4

    def loss(at):
        p = expit(at[0] * (x - at[1]))
        X = np.stack([np.ones(60), x - x.mean()], 1)
        information = (X * (p * (1 - p))[:, None]).T @ X
        return np.logaddexp(0, np.where(y, -1, 1) * at[0] * (x - at[1])).sum() - 0.5 * np.linalg.slogdet(information)[1]

    best = minimize(loss, (5.0, math.log(1e-4)), method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-10})
    assert curve.firth and (curve.slope, curve.ln_f50) == pytest.approx(best.x, rel=1e-3)
    assert math.exp(curve.ln_f50) == pytest.approx(1e-4, rel=0.1)


@pytest.mark.parametrize("change, why", [
    (lambda size: {"present_N": np.ones(600, bool)}, "all 600 concepts are present"),
    (lambda size: {"present_N": np.zeros(600, bool)}, "all 600 concepts are absent"),
    (lambda size: {"present_N": ~size.present_N}, "present no more often"),
    (lambda size: {"frequency_N": np.zeros(600)}, "none of the concepts"),
    (lambda size: {"frequency_N": np.where(np.abs(np.log10(size.frequency_N) + 4.3) < 1.2, 0, size.frequency_N)},
     "concepts lie within a decade of the 50 % point")])
def test_what_has_no_curve_says_so(change, why):
    size = world(10_000)
    found = fit.fit(dataclasses.replace(size, **change(size)), draws=5)
    assert why in found.refused and found.refused.startswith("10000 features: ") and found.curve is None and found.f50 is None
    both = fit.collapse([size, dataclasses.replace(size, **change(size))], draws=5)
    assert both.refused.startswith("1 of 2 sizes have a curve") and both.curve is None


def test_a_curve_that_may_as_well_fall_has_no_threshold():
    """Words that are present whatever their frequency: of 40 curves hardly one may be left, and 95 % intervals of slopes that
    rise hold the truth.
    """
    def size(seed, slope):
        rng = np.random.default_rng(seed)
        f = np.exp(rng.uniform(math.log(1e-5), math.log(1e-3), 80))
        return fit.Size("flat", 1000, tuple(map(str, range(80))), f, rng.random(80) < expit(slope * np.log(f / 1e-4)))

    flat = [fit.fit(size(seed, 0.0), draws=100, seed=seed) for seed in range(40)]
    assert sum(one.curve is not None for one in flat) <= 4
    steep = [fit.fit(size(seed, 1.0), draws=100, seed=seed) for seed in range(20)]
    assert sum(low < 1.0 < high for low, high in (one.slope_interval for one in steep if one.curve)) >= 16


@pytest.mark.parametrize("n", [1, 2, 5, 30])
def test_few_words_and_equal_frequencies_give_no_curve_and_no_error(n):
    rng = np.random.default_rng(n)
    for equal in (False, True):
        for _ in range(40):
            f = np.full(n, 1e-4) if equal else np.exp(rng.uniform(-14, -5, n))
            found = fit.fit(fit.Size("few", 1000, tuple(map(str, range(n))), f, rng.random(n) < rng.random()), draws=3)
            assert (found.curve is None) == bool(found.refused) and (found.curve is None or found.near >= 20)
            assert not equal or found.refused


def test_concepts_that_the_text_lacks_are_named():
    size = world(1_000)
    found = fit.fit(dataclasses.replace(size, frequency_N=np.where(np.arange(600) < 2, 0, size.frequency_N)), draws=5)
    assert found.absent == ["word0", "word1"] and found.concepts == 598 and found.curve
    with pytest.raises(ConceptError, match="3 names, 3 frequencies, 2 answers, 5 alive"):
        fit.Size("odd", 5, ("a", "b", "c"), np.ones(3), np.ones(2, bool))


def test_files_and_figures(tmp_path):
    """Two dictionaries over 600 concepts of one text; what the files say is what was found."""
    sizes, lines = [], []
    for alive in (1_000, 100_000):
        made = world(alive)
        counts = counting.Counts(tuple(concepts(*(f"w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(600)))),
                                 np.round(made.frequency_N * 1e9).astype(int), 10**9)
        scores = np.where(made.present_N, 0.75, np.nan)
        sampled = np.full(600, 3)
        sampled[5] = 0
        found = Dedicated(tuple(c.name for c in counts.concepts), sampled, np.where(made.present_N, np.arange(600), -1), scores,
                          scores, scores, made.present_N)
        sizes.append(table.size_of(made.label, alive, counts, found))
        lines += table.lines_of(made.label, alive, counts, found)
    assert len(sizes[0].names) == 599
    collapsed = fit.collapse([*sizes, dataclasses.replace(sizes[0], label="none", present_N=np.zeros(599, bool))], draws=10)
    table.write(tmp_path, lines, collapsed)
    rows = list(csv.DictReader((tmp_path / table.LINES).open()))
    values = json.loads((tmp_path / table.RESULTS).read_text())
    assert len(rows) == 1200 and [row["name"] for row in rows] == [line["name"] for line in values["concepts"]]
    assert rows[5]["present"] == "" and values["concepts"][5]["present"] is None
    assert sum(row["present"] == "True" for row in rows) == sum(size.present_N.sum() for size in sizes)
    assert values["curves"]["sizes"][0]["f50"] == collapsed.sizes[0].f50 and "all 599" in values["curves"]["sizes"][2]["refused"]
    with pytest.raises(ConceptError, match="different concepts"):
        table.size_of("x", 1, counts, dataclasses.replace(found, names=found.names[::-1]))
    shown = pages.plots([*sizes, dataclasses.replace(sizes[0], label="none", present_N=np.zeros(599, bool))], collapsed)
    assert len({plot.light for plot in shown}) == 3 and all(p.dark.startswith("data:image/svg+xml;base64,") for p in shown)
    nothing = fit.collapse([dataclasses.replace(sizes[0], present_N=np.zeros(599, bool))], draws=2)
    assert len(pages.plots(sizes[:1], nothing)) == 2
