"""The plan of a step that goes over tiles of features, against the program."""

import dataclasses

import pytest

from saejax.base import hardware
from saejax.base.records import MeshOptions
from saejax.plan import make_plan
from saejax.plan.hlo import moved
from saejax.sae import tiles
from saejax.train.step_cost import Work, flops, working
from tests.plan.configs import make_config
from tests.plan.test_plan import compiled, spec_of


def test_a_step_in_tiles_of_features_is_what_the_plan_says(monkeypatch):
    """It moves what one tile moves and makes pre-activations twice. (A loop's FLOPs are counted once.)"""
    config, chip = make_config("relu", train__batch=2048), hardware.CHIPS["cpu"]
    work = Work.of(config, spec_of(config), 2, 4, chip)
    whole, memory = flops(work), sum(working(work, "cpu").values())
    monkeypatch.setattr(tiles, "tile_width", lambda rows, features, chip: 256)
    program, _ = compiled(config, 2)
    assert flops(work) == pytest.approx(1.2 * whole)
    measured = program.memory_analysis().temp_size_in_bytes
    assert 0.4 < sum(working(work, "cpu").values()) / measured < 2.5
    assert measured < memory - 4 * 1024 * (2048 - 256), "at least one array of rows and features less"
    expected = make_plan(dataclasses.replace(config, mesh=MeshOptions(2, 4)), "cpu:8")
    assert expected["topology"]["path"] == "dense, in tiles"
    for axis in ("dict", "data"):
        got = sum(m.bytes for m in moved(program.as_text(), 2, 4) if m.axis == axis and not m.branch)
        assert got == pytest.approx(expected["collective_bytes"][axis], rel=0.02)
