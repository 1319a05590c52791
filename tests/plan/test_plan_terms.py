"""The terms of a step's time against what was measured, and what they are made of."""

import dataclasses

import pytest

from saejax.base import hardware
from saejax.base.hardware import parse
from saejax.plan import as_table, make_plan
from saejax.train import step_cost
from saejax.train.step_work import Work
from tests.plan.configs import make_config
from tests.plan.test_plan import spec_of

# Milliseconds measured on one H200 (jax 0.11.2, CUDA 13): topk, 4,096 rows, 2,304 -> 131,072 features, k = 64, bfloat16 products.
# Each is a piece alone, value gradients are taken to cost what decoding does; of the new step there is no whole one.
ON_H200 = {
    ("product",): 3.6,
    ("product", "casts"): 4.1,
    ("selection",): 1.42,
    ("product", "selection"): 4.69,
    ("decode",): 2.5,
    ("value gradients",): 2.5,
    ("two weight gradients",): 2 * 2.8,
}
GROUP_MAXIMA, ADAM_IN_28_BYTES = 0.71, 4.0
# The same of two quiet cores of a server, float32, `benchmarks/plan_terms.py`: topk of 768 -> 16,384 features, 1,024 rows, and of
# 65,536, 512 rows, k = 32. The whole step ran as one program.
PIECES = (("product", "tile re-reads"), ("selection",), ("decode",), ("value gradients",), ("two weight gradients",),
          ("optimizer",))
ON_CPU = {(16_384, 1024): dict(zip(PIECES, (146, 42.7, 2.76, 8.12, 61.7, 64.4), strict=True)),
          (65_536, 512): dict(zip(PIECES, (281, 43.0, 1.66, 4.72, 45.6, 186), strict=True))}
STEP_ON_CPU = {(16_384, 1024): 312, (65_536, 512): 557}


def close(ms: float):
    return pytest.approx(ms, rel=0.3)


def work_of(chip: str, **overrides) -> Work:
    config = step_cost.with_path(make_config(train__compute_dtype="auto", **overrides), True)
    return Work.of(config, spec_of(config), 1, 1, hardware.CHIPS[chip])


@pytest.fixture
def on_h200() -> Work:
    return work_of("h200", sae__d_in=2304, sae__d_sae=131_072, sae__k=64, train__batch=4096)


def ms(work: Work, topology: str) -> dict[str, float]:
    return {name: 1e3 * value for name, value in step_cost.seconds(work, parse(topology)).items()}


@pytest.mark.parametrize("names", ON_H200, ids=", ".join)
def test_terms_on_an_h200_are_those_measured(on_h200, names):
    terms = ms(on_h200, "h200:1")
    # Rounding W_enc, as the measured program did.
    casts = 1e3 * 6 * on_h200.features * on_h200.d_in / (step_cost.REACHED["gpu"].streamed * on_h200.chip.bandwidth)
    assert sum((terms | {"casts": casts})[name] for name in names) == close(ON_H200[names])


def test_group_maxima_on_an_h200(on_h200):
    reached, entries = step_cost.REACHED["gpu"], on_h200.rows * on_h200.features
    assert 1e3 * 4 * entries / (reached.maxima * on_h200.chip.bandwidth) == close(GROUP_MAXIMA)


def test_adam_on_an_h200(on_h200):
    """28 bytes a parameter: state read and written, gradient read. The norm and the constraints read more."""
    bare = dataclasses.replace(on_h200, state_bytes=12.0, unit_decoder=False, pre_bias=False)
    norm = 1e3 * 4 * bare.matrices / (step_cost.REACHED["gpu"].streamed * bare.chip.bandwidth)
    assert ms(bare, "h200:1")["optimizer"] - norm == close(ADAM_IN_28_BYTES)
    assert ms(on_h200, "h200:1")["optimizer"] < 2 * ADAM_IN_28_BYTES


@pytest.mark.parametrize("features, rows", ON_CPU)
def test_terms_on_a_cpu_are_those_measured(features, rows):
    work = work_of("cpu", sae__d_in=768, sae__d_sae=features, sae__k=32, train__batch=rows)
    terms = ms(work, "cpu:1")
    assert {names: sum(terms[name] for name in names) for names in PIECES} == {
        names: close(measured) for names, measured in ON_CPU[features, rows].items()}
    assert sum(terms.values()) == close(STEP_ON_CPU[features, rows])
    assert work.row_tiles == (2 if features == 65_536 else 1)


def test_aux_is_told_apart_and_grows_with_its_room():
    config = make_config(sae__d_in=2304, sae__d_sae=131_072, sae__aux_k=256, sae__k=64, train__batch=4096)
    config = step_cost.with_path(config, True)
    work = Work.of(config, spec_of(config), 1, 1, hardware.CHIPS["h200"])
    found = step_cost.aux_seconds(work, parse("h200:1"))
    assert list(found) == [1024, 131_072 // 8, 131_072] and list(found.values()) == sorted(found.values())
    without = dataclasses.replace(work, aux_k=0)
    assert step_cost.aux_seconds(without, parse("h200:1")) == {}
    assert step_cost.seconds(without, parse("h200:1")) == step_cost.seconds(work, parse("h200:1"))
    table = as_table(make_plan(config, "h200:1"))
    assert "AuxK, not in the sum" in table and "up to 1,024 dead" in table


def test_rows_that_take_turns_are_made_twice_but_for_the_last():
    lazy = dataclasses.replace(work_of("h200", sae__d_in=2304, sae__d_sae=2**20, sae__k=64, train__batch=4096), lazy=True)
    assert lazy.room == 2**20 // 8 and lazy.fired > lazy.room and lazy.made == 3
    few = dataclasses.replace(lazy, rows=1024)
    assert few.room == 1024 * 64 and few.made == 1
    dense_rows = dataclasses.replace(lazy, lazy=False)
    assert dense_rows.room == 4096 * 64 and dense_rows.made == 1


def test_gradients_are_reduced_once_whatever_the_parts():
    work = dataclasses.replace(work_of("h200", train__batch=4096), data=2, dict=4)

    def moved(parts: int) -> dict[str, int]:
        found = step_cost.collectives(dataclasses.replace(work, accumulate=parts), "gpu")
        return {c.what: c.bytes for c in found}

    one, four = moved(1), moved(4)
    assert four["gradients"] == one["gradients"] and four["reconstruction"] == one["reconstruction"]
    assert four["rows"] == 2 * one["rows"] and four["error"] == 2 * one["error"]
