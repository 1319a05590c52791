"""The figures of one or several runs as a short table."""

from dataclasses import dataclass

import numpy as np

from saejax.base.assets import model_title
from saejax.base.logs import read_metrics
from saejax.base.records import RunPaths
from saejax.config import Config
from saejax.config.recipes import WITH_K


@dataclass(frozen=True)
class Rates:
    """Tokens per second of the two long stages; None where this run did not do that work."""

    harvest: float | None
    train: float | None


@dataclass(frozen=True)
class Result:
    """A run, the checkpoint step that was measured, and what was measured; resume: a sentence on what resuming it gives."""

    config: Config
    paths: RunPaths
    step: int
    evaluation: dict
    rates: Rates
    resume: str = ""


def training_rate(paths: RunPaths) -> float | None:
    """Median tokens per second over the metric lines of a run."""
    return _median(paths, "tokens_per_second")


def described(config: Config) -> str:
    """The kind, the shape where it is no plain SAE, and what sets its sparsity."""
    sae, target = config.sae, config.train.target_l0
    shape = "crosscoder, " if sae.crosscoder else "" if not sae.target else "skip transcoder, " if sae.skip else "transcoder, "
    if sae.kind in WITH_K:
        return f"{shape}{sae.kind}, k = {sae.k}"
    aim = f"lambda = {sae.penalty_coef:g}" if target is None else f"lambda steered to an L0 of {target:g}"
    if sae.penalty == "target_l0":
        aim = f"target L0 {sae.k}"
    return f"{shape}{sae.kind}, {'' if sae.penalty == 'l1' else f'penalty {sae.penalty}, '}{aim}"


def rows(result: Result) -> list[tuple[str, str]]:
    """(label, value) of every line of the table."""
    sae = result.config.sae
    return [
        ("SAE", f"{described(result.config)}, {sae.d_sae} features"),
        ("products in", result.config.train.compute_dtype),
        ("step", f"{result.step:,} ({result.step * result.config.train.batch:,} tokens)"),
        *measured(result.evaluation),
        (f"dead in {_tokens(sae.dead_tokens)} tokens", _percent(_last(result.paths, "dead_fraction"))),
        ("tokens/s harvest", _rate(result.rates.harvest)),
        ("tokens/s training", _rate(result.rates.train)),
        *_hardware(result.paths),
    ]


def measured(e: dict) -> list[tuple[str, str]]:
    """(label, value) of the figures of an evaluation."""
    rows = e.get("measured_on")  # instead of held-out text
    lost = [] if rows else [
        ("CE clean / spliced", f"{_number(e['ce_clean'])} / {_number(e['ce_spliced'])}"),
        ("CE zero / mean", f"{_number(e['ce_zero'])} / {_number(e['ce_mean'])}"),
        ("CE recovered", f"{_number(e['ce_recovered'])}, against mean {_number(e['ce_recovered_mean'])}"),
        ("KL(clean || spliced)", _number(e["kl"])),
    ]
    return [
        ("hookpoint", e["hookpoint"]),
        ("language model", model_title(e["model"])),
        (rows or "held-out tokens", f"{e['tokens']:,} ({e['outlier_tokens']:,} outliers)"),
        ("L0", f"{_number(e['l0_mean'])} (median {_number(e['l0_median'])})"),
        ("FVU", f"{_number(e['fvu'])}, without outliers {_number(e['fvu_no_outliers'])}"),
        ("explained variance",
         f"{_number(e['explained_variance'])}, without outliers {_number(e['explained_variance_no_outliers'])}"),
        *lost,
        (f"silent on {'them' if rows else 'held-out text'}", f"{_percent(e['dead_fraction'])} ({e['tokens']:,} tokens)"),
    ]


def _hardware(paths: RunPaths) -> list[tuple[str, str]]:
    """MFU, or FLOP/s where the chip's peak is not known, and memory: of what there is in the metric lines."""
    mfu, flops, peak = _median(paths, "mfu"), _median(paths, "flops_per_second"), _last(paths, "peak_device_bytes")
    use = [("MFU training", _percent(mfu))] if mfu else [("FLOP/s of a device", f"{flops:.3g}")] if flops else []
    return use + ([("peak device memory", f"{peak / 1e9:.4g} GB")] if peak else [])


def table(results: list[Result]) -> str:
    """Plain text, one column per run."""
    return columns([(str(r.paths.root), rows(r)) for r in results])


def columns(found: list[tuple[str, list[tuple[str, str]]]]) -> str:
    """Plain text of (title, its lines), one column each."""
    labels = list(dict.fromkeys(label for _, lines in found for label, _ in lines))
    cells = [["", *(title for title, _ in found)]]
    cells += [[label, *(dict(lines).get(label, "-") for _, lines in found)] for label in labels]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "-" * sum(widths, 2 * len(widths) - 2), *lines[1:]])


def _median(paths: RunPaths, key: str) -> float | None:
    values = [line[key] for line in read_metrics(paths.metrics) if key in line]
    return float(np.median(values)) if values else None


def _last(paths: RunPaths, key: str) -> float | None:
    lines = [line for line in read_metrics(paths.metrics) if key in line]
    return lines[-1][key] if lines else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _tokens(n: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:g}{unit}"
    return str(n)
