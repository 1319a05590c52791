"""The report is one inert file whatever a config or a metric says, and it shows what a run measured."""

import base64
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from saejax.base.records import RunPaths
from saejax.config import default_config, resolve
from saejax.config.recipes import RECIPES
from saejax.pages import plots
from saejax.pages.plots import curves
from saejax.pages.report import html, loss_parts, write_report
from saejax.pages.summary import Rates, Result, described, table

HOSTILE = "</td></table><script>alert(1)</script><img src=x onerror=alert(2)>\"'{{ 7 * 7 }}"


EVALUATION = {
    "hookpoint": "blocks.9.hook_resid_post", "model": "smollm2-135m", "tokens": 1000, "outlier_tokens": 3, "contexts": 8,
    "l0_mean": 31.9, "l0_median": 32.0, "fvu": 0.2, "fvu_no_outliers": 0.25, "explained_variance": 0.8,
    "explained_variance_no_outliers": 0.75, "ce_clean": 3.0, "ce_spliced": 3.2, "ce_zero": 9.0, "ce_mean": 7.0,
    "ce_recovered": 0.9667, "ce_recovered_mean": None, "kl": 0.2, "dead_fraction": 0.015,
    "density_histogram": {"log10_edges": [-7 + 0.5 * i for i in range(15)], "counts": [5] * 14, "never": 9}}


@pytest.fixture
def evaluation():
    return dict(EVALUATION)


def lines(n=50):
    return [{"step": i, "tokens_seen": i * 2048, "loss": 1 / (1 + i), "mse": 0.5 / (1 + i), "aux": 0.0, "l0": 32,
             "fvu": 0.3, "explained_variance": 0.7, "dead_fraction": 0.0, "lr": 1e-3, "tokens_per_second": 9000.0 + i,
             "data_wait_share": 0.01, "flops_per_second": 4e14, "mfu": 0.4, "peak_device_bytes": 31e9} |
            ({"resampled": 17} if i == 20 else {}) for i in range(1, n)]


def result(tmp_path, evaluation, **changes):
    config = dataclasses.replace(resolve(default_config("topk")), **changes)
    return Result(config, RunPaths(Path(tmp_path)), 100, evaluation, Rates(500.0, 9000.0))


class Elements(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


def test_hostile_text_stays_text(tmp_path, evaluation):
    hostile = dict(evaluation, hookpoint=HOSTILE)
    page = html(result(tmp_path, hostile, name=HOSTILE), [{**line, HOSTILE: 1.0} for line in lines()])
    found, clean = Elements(page), Elements(html(result(tmp_path, evaluation), lines()))
    assert found.tags.count("script") == 0 and found.tags.count("img") == clean.tags.count("img")
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert "{{ 7 * 7 }}" in page and "&lt;script&gt;" in page and ">49<" not in page


def test_metrics_of_the_wrong_type_are_left_out(tmp_path, evaluation):
    broken = [{"step": 1, "tokens_seen": HOSTILE, "loss": HOSTILE}, {"step": 2, "tokens_seen": 2, "loss": float("nan")}]
    assert "<script" not in html(result(tmp_path, evaluation), broken)


def test_nothing_is_loaded_and_policy_forbids_it(tmp_path, evaluation):
    page = write_report(RunPaths(tmp_path), result(tmp_path, evaluation)).read_text()
    found = Elements(page)
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in found.attributes
    assert "link" not in found.tags and "script" not in found.tags
    for name, value in found.attributes:
        if name in ("src", "srcset", "href"):
            assert value.startswith("data:image/svg+xml;base64,")
    assert "url(" not in page and not re.search(r"https?://", page)


def test_pictures_hold_no_script_and_no_text(tmp_path, evaluation):
    page = html(result(tmp_path, evaluation, name=HOSTILE), lines())
    pictures = [base64.b64decode(code).decode() for code in re.findall(r"base64,([A-Za-z0-9+/=]+)", page)]
    assert len(pictures) == 2 * 10  # loss, L0, variance, dead, learning rate, rate, MFU, memory, waiting, histogram; two themes
    for svg in pictures:
        assert "<script" not in svg and "<text" not in svg and "onload" not in svg and "foreignObject" not in svg


def loss_line(kind: str, **terms) -> dict:
    """A metric line of a kind whose loss is put together as its objective says."""
    aux, mse = terms.get("aux", 0.0), terms["mse"]
    own = sum(terms.get(name, 0.0) * terms.get(f"{name}_coefficient", 0.0) for name in ("l1", "sparsity"))
    loss = mse / 0.5 + aux / 32 if kind == "topk" else mse + own + terms.get("gate_error", 0.0) + 0.5 * aux / 32
    return {"step": 1, "tokens_seen": 1, "loss": loss, **terms}


@pytest.mark.parametrize("kind, terms, expected", [
    ("topk", {"mse": 0.06, "aux": 1.0}, {"reconstruction": 0.12, "auxk": 1 / 32}),
    ("relu", {"mse": 0.3, "l1": 4.0, "l1_coefficient": 0.1}, {"reconstruction": 0.3, "penalty": 0.4}),
    ("relu", {"mse": 0.3, "l1": 4.0, "l1_coefficient": 0.1, "aux": 1.0},
     {"reconstruction": 0.3, "penalty": 0.4, "auxk": 1 / 64}),
    ("gated", {"mse": 0.3, "l1": 4.0, "l1_coefficient": 0.1, "gate_error": 0.2},
     {"reconstruction": 0.3, "penalty": 0.4, "gate": 0.2}),
    ("jumprelu", {"mse": 0.3, "sparsity": 2.0, "sparsity_coefficient": 0.1}, {"reconstruction": 0.3, "penalty": 0.2})])
def test_the_parts_of_the_loss_add_up(kind, terms, expected):
    line = loss_line(kind, **terms)
    found = loss_parts(resolve(default_config(kind)).sae, line)
    assert found == pytest.approx(expected) and sum(found.values()) == pytest.approx(line["loss"])
    assert loss_parts(resolve(default_config(kind)).sae, line | {"mse": HOSTILE}) == {}


def test_a_log_axis_stays_log_where_some_are_zero(monkeypatch):
    scales = []
    monkeypatch.setattr(plots, "_plot", lambda title, draw: [draw(axes := Figure().add_subplot(), plots._THEMES["light"]),
                                                            scales.append(axes.get_yscale())])
    for ys in ([1.0, 0.1], [0.0, 0.1], [0.0, 0.0]):
        plots.line_plot("t", [plots.Curve("c", [0.0, 1.0], ys)], log=True)
    assert scales == ["log", "log", "linear"]


def test_auxk_near_one_is_put_in_words(tmp_path, evaluation):
    near, far = ([line | {"aux": value} for line in lines()] for value in (1.001, 0.4))
    assert "AuxK is 1.00 at the end" in html(result(tmp_path, evaluation), near)
    assert "AuxK is" not in html(result(tmp_path, evaluation), far) + html(result(tmp_path, evaluation), lines())


def test_silent_says_on_how_many_tokens(tmp_path, evaluation):
    assert re.search(r"silent on held-out text +1\.50 % \(1,000 tokens\)", table([result(tmp_path, evaluation)]))


def test_the_demos_model_is_named_for_what_it_is(tmp_path, evaluation):
    said = "HuggingFaceTB/SmolLM2-135M-Instruct in 4 bits (GGUF Q4_1)"
    assert re.search(rf"language model +{re.escape(said)}\n", table([result(tmp_path, evaluation)]))
    assert f"on the activations of {said} at" in html(result(tmp_path, evaluation), lines())
    assert "1.50 % (1,000 tokens)" in html(result(tmp_path, evaluation), lines())


@pytest.mark.parametrize("n", [1, 2, 1499, 1500, 1501, 3000, 3001, 3002])
def test_curves_are_thinned_and_end_at_the_last_line_once(n):
    [curve] = curves([{"tokens_seen": i, "loss": 2.0 * i} for i in range(n)], {"loss": "loss"})
    assert curve.xs[-1] == n - 1 and curve.ys == [2.0 * x for x in curve.xs]
    assert curve.xs == sorted(set(curve.xs)) and len(curve.xs) <= 3001


def test_resampling_is_told_and_marked(tmp_path, evaluation):
    assert "17 at 40,960 tokens" in html(result(tmp_path, evaluation), lines())


def test_changed_options_are_shaded(tmp_path, evaluation):
    page = html(result(tmp_path, evaluation, seed=5), [])
    assert re.search(r'<tr class="changed"><th scope="row"><code>seed</code></th><td><code>5</code>', page)


def test_table_puts_runs_side_by_side(tmp_path, evaluation):
    first, second = result(tmp_path / "a", evaluation), result(tmp_path / "b", dict(evaluation, ce_recovered=0.5))
    text = table([first, second])
    line = next(line for line in text.splitlines() if line.startswith("CE recovered"))
    assert "0.9667" in line and "0.5" in line and line.index("0.9667") < line.index("0.5,")
    assert str(tmp_path / "a") in text and str(tmp_path / "b") in text
    assert max(map(len, text.splitlines())) == len(text.splitlines()[1])


def test_utilisation_where_the_peak_is_known_else_flops(tmp_path, evaluation):
    known = lines()
    unknown = [{key: value for key, value in line.items() if key not in ("mfu", "peak_device_bytes")} for line in known]
    for metrics, there, absent in ((known, ("MFU training", "40.00 %", "peak device memory", "31 GB"), ("FLOP/s of a device",)),
                                   (unknown, ("FLOP/s of a device", "4e+14"), ("MFU", "peak device memory"))):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
        page = html(result(tmp_path, evaluation), metrics)
        assert all(word in page for word in there) and not any(word in page for word in absent)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_described(recipe):
    text = described(resolve(default_config(recipe)))
    assert text.startswith(RECIPES[recipe]["sae.kind"])
    assert any(part in text for part in ("k = 32", "lambda = ", "target L0 80"))


def test_shapes_are_described():
    c = default_config("relu")
    c.harvest.hookpoints = ("a", "b")
    c.sae.hookpoint, c.sae.target, c.sae.skip, c.train.target_l0 = "a", "b", True, 20.0
    assert described(resolve(c)) == "skip transcoder, relu, lambda steered to an L0 of 20"
