"""`report.html`: one file that opens anywhere, holds no script and loads nothing."""

from pathlib import Path

from markupsafe import Markup

from saejax import config as config_lib
from saejax.base.assets import model_title
from saejax.base.logs import read_metrics
from saejax.base.records import RunPaths
from saejax.base.storage import write_bytes
from saejax.config.options import SAEOptions
from saejax.config.recipes import WITH_K
from saejax.pages.dashboard import add_link, is_dashboard
from saejax.pages.plots import Plot, curves, histogram_plot, is_number, line_plot
from saejax.pages.summary import Result, described, rows
from saejax.pages.templates import render

PARTS = {"reconstruction": "reconstruction", "penalty": "lambda x penalty", "gate": "gate", "auxk": "coefficient x AuxK"}
_NOTHING = 0.95  # an AuxK of 1: no better than predicting zeros
LINK = ("Report of the run", "../report.html")  # of the dashboard
_PENALTIES = {"l1": "l1_coefficient", "sparsity": "sparsity_coefficient"}  # a metric and its coefficient
_WITHOUT = '<p id="dashboard"></p>'
_WITH = '<p id="dashboard"><a href="dashboard/index.html">Dashboard of the features</a></p>'


def write_report(paths: RunPaths, result: Result) -> Path:
    """Writes the report of a run and returns its path; it and the run's dashboard name each other where that is there. Raises
    `DiskError`.

    Everything in it is text or a picture: the page's policy forbids script and any address but data URIs, and every
    value from config or metrics is escaped.
    """
    there = is_dashboard(paths.dashboard)
    write_bytes(paths.report, html(result, read_metrics(paths.metrics), dashboard=there).encode())
    if there:
        add_link(paths.dashboard, *LINK)
    return paths.report


def link_dashboard(paths: RunPaths) -> None:
    """Names the run's dashboard in a report that was made before it."""
    page = paths.report.read_text("utf-8") if paths.report.is_file() and is_dashboard(paths.dashboard) else ""
    if _WITHOUT in page:
        write_bytes(paths.report, page.replace(_WITHOUT, _WITH, 1).encode())


def html(result: Result, lines: list[dict], *, dashboard: bool = False) -> str:
    """The page as a string; dashboard: it stands beside it."""
    config = config_lib.flat(result.config)
    defaults = config_lib.flat(config_lib.Config())
    return render(
        "report.html", name=result.config.name, story=_story(result), table=rows(result),
        dashboard=Markup(_WITH if dashboard else _WITHOUT), plots=plots(result, lines), resamples=_resamples(lines),
        auxk=_useless_auxk(lines),
        config=[(key, repr(value), value != defaults[key]) for key, value in config.items()])


def plots(result: Result, lines: list[dict]) -> list[Plot]:
    """Every figure for which there is data."""
    marks = [tokens for tokens, _ in _resamples(lines)]
    limit = 1.25 * result.config.sae.k if result.config.sae.kind in WITH_K else None
    lines = [line | loss_parts(result.config.sae, line) for line in lines]
    wanted = [
        ("Loss and its parts, which add up to it", {"loss": "loss", **PARTS}, {"log": True}),
        ("L0: active features per token", {"l0": "L0"}, {"top": limit}),
        ("Fraction of variance", {"explained_variance": "explained", "fvu": "unexplained"}, {"top": 1.0}),
        ("Dead features (share)", {"dead_fraction": "dead"}, {}),
        ("Learning rate", {"lr": "learning rate"}, {}),
        ("Sparsity coefficient lambda", {"l1_coefficient": "lambda", "sparsity_coefficient": "lambda"}, {}),
        ("Threshold", {"threshold": "running mean of the least kept activation"}, {}),
        ("Tokens per second", {"tokens_per_second": "tokens/s"}, {}),
        ("MFU: share of the chips' bfloat16 peak", {"mfu": "MFU"}, {"top": 1.0}),
        ("FLOP/s of a device", {} if any("mfu" in line for line in lines) else {"flops_per_second": "FLOP/s"}, {}),
        ("Peak memory of a device (bytes)", {"peak_device_bytes": "bytes"}, {}),
        ("Share of time spent waiting for data", {"data_wait_share": "waiting"}, {"top": 1.0}),
    ]
    out = [line_plot(title, found, marks=marks, **options) for title, labels, options in wanted
           if (found := curves(lines, labels))]
    if result.evaluation.get("density_histogram"):
        out.append(histogram_plot("Firing density of the features", result.evaluation["density_histogram"]))
    return out


def loss_parts(sae: SAEOptions, line: dict) -> dict[str, float]:
    """The parts of a metric line's loss as they enter it, with their coefficients, by the names of `PARTS`; their sum is `loss`.

    reconstruction: what is left of the loss without the others, so with the second error of `sae.multi_topk` and with AuxK where
    that cannot be told apart (nested groups of a kind without k).
    """
    if not all(is_number(line.get(key, 0.0)) for key in ("mse", "aux", "gate_error", *_PENALTIES, *_PENALTIES.values())) \
            or not is_number(line.get("loss")):
        return {}
    penalties = [line[of] * line[by] for of, by in _PENALTIES.items() if of in line and by in line]
    out = {"penalty": sum(penalties)} if penalties else {}
    if "gate_error" in line:
        out["gate"] = line["gate_error"]
    if "aux" in line and sae.kind in WITH_K:
        out["auxk"] = sae.aux_coef * line["aux"]
    elif "aux" in line and "mse" in line and not sae.groups:
        out["auxk"] = line["loss"] - line["mse"] - sum(out.values())
    return {"reconstruction": line["loss"] - sum(out.values()), **out}


def _useless_auxk(lines: list[dict]) -> float | None:
    """The mean of AuxK over the last tenth of the lines where it is near 1 or above."""
    values = [line["aux"] for line in lines[-max(1, len(lines) // 10):] if is_number(line.get("aux"))]
    mean = sum(values) / len(values) if values else 0.0
    return mean if mean >= _NOTHING else None


def _resamples(lines: list[dict]) -> list[tuple[int, int]]:
    """(tokens seen, features replaced) of every resampling step."""
    return [(line["tokens_seen"], int(line["resampled"])) for line in lines
            if {"resampled", "tokens_seen"} <= line.keys()]


def _story(result: Result) -> str:
    c, e = result.config, result.evaluation
    return (f"A sparse autoencoder ({described(c)}) with {c.sae.d_sae:,} features, trained for {result.step:,} steps "
            f"of {c.train.batch:,} tokens on the activations of {model_title(c.lm.model)} at {', '.join(c.sae.hookpoints)}. "
            f"Text: {', '.join(c.text.source)}, in contexts of {c.text.context} tokens. Measured on {e['contexts']:,} "
            f"contexts of held-out text. {result.resume}").strip()
