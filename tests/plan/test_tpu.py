"""The real training step, compiled for TPU slices that are not there, by the TPU compiler: what users book a pod on."""

import functools
import importlib.util
import math
from dataclasses import dataclass, field

import pytest

from saejax.base.errors import ConfigError
from saejax.base.hardware import parse
from saejax.plan import make_plan
from saejax.plan.compiled import lowered, mesh_for, read
from saejax.plan.hlo import moved
from tests.hlo import arrays
from tests.plan.configs import make_config
from tests.plan.test_plan import spec_of

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: the extra tpu-plan")]

# The keys of the options that these tests are about, in one place.
SIX_BYTES, LAZY = {"train__optimizer": "second_bf16"}, {"train__optimizer": "lazy_bf16"}
SPARSE = {"train__path": "sparse"}
MILLION, MILLIONS, MANY = 2**20, 2**22, 2**25  # features: 1, 4.2 and 34 million


@dataclass(frozen=True)
class Case:
    """factor: between the compiler's peak of a device's bytes and the plan's total, at most, either way. alternatives: branches
    that decode, of which a step takes one.
    """

    kind: str
    topology: str
    d_in: int
    d_sae: int
    batch: int
    options: dict = field(default_factory=dict)
    factor: float = 1.5
    alternatives: int = 1

    @property
    def config(self):
        k = {} if self.kind == "relu" else {"sae__k": 8 if self.options == LAZY else 32}
        return make_config(self.kind, sae__d_in=self.d_in, sae__d_sae=self.d_sae, train__batch=self.batch,
                           train__compute_dtype="bfloat16", **k, **self.options)


CASES = {
    "topk": Case("topk", "v5e:4x4", 1024, MILLION, 2048),
    "topk on v5p": Case("topk", "v5p:4x8x8", 4096, MANY, 1024),
    "topk with a data axis": Case("topk", "v5e:2x4", 256, 2**14, 1024, SPARSE | {"mesh__data": 2, "mesh__dict": 4}, factor=2),
    # Room for a batch with more pairs than expected is reserved, and not planned.
    "matryoshka": Case("matryoshka", "v5e:4x4", 1024, MILLION // 4, 2048, factor=2, alternatives=2),
    "lazy": Case("topk", "v5e:8x8", 4096, MILLIONS, 1024, LAZY),
    "relu": Case("relu", "v5e:4x4", 2304, MILLION, 4096),
    "relu in tiles": Case("relu", "v5e:16x16", 4096, MANY, 8192, SIX_BYTES),
}


@dataclass(frozen=True)
class Compiled:
    """features: of a device. hlo: None where this version of the compiler cannot print its program."""

    plan: dict
    found: dict
    features: int
    hlo: str | None

    @property
    def text(self) -> str:
        if self.hlo is None:
            pytest.skip(f"this TPU compiler cannot print the program: {self.found['collectives_unknown']}")
        return self.hlo


@functools.cache
def compiled(name: str) -> Compiled:
    case = CASES[name]
    plan = make_plan(case.config, case.topology)
    mesh = plan["topology"]["mesh"]
    program = lowered(case.config, spec_of(case.config), mesh_for(parse(case.topology), **_sizes(mesh)), "tpu").compile()
    found = read(program, **_sizes(mesh))
    return Compiled(plan, found, case.d_sae // mesh["dict"], None if "collectives_unknown" in found else program.as_text())


def _sizes(mesh: dict) -> dict:
    return {"data": mesh["data"], "dict_": mesh["dict"]}


every_case = pytest.mark.parametrize("name", CASES)


@every_case
def test_it_compiles_fits_and_takes_the_memory_that_is_planned(name):
    case, it = CASES[name], compiled(name)
    planned = it.plan["memory"]
    state = sum(size for kind, size in planned["by_kind"].items() if kind.startswith(("parameters", "optimizer", "counters")))
    assert it.found["memory"]["arguments"] == pytest.approx(state, rel=0.01)
    peak = it.found["peak_bytes"]
    assert state < peak < parse(case.topology).chip.memory
    assert 1 / case.factor < peak / planned["total"] < case.factor, (it.found["memory"], planned)


@every_case
def test_it_moves_what_is_planned(name):
    """The compiler makes all-reduces, which move twice as much, of reduce-scatters, and on many chips of gathers too."""
    case, it = CASES[name], compiled(name)
    assert it.text
    got, planned = it.found["collective_bytes"], it.plan["collectives"]
    along = {axis: [c for c in planned if c["axis"] == axis] for axis in ("dict", "data")}
    least = sum(c["bytes"] for c in along["dict"])
    most = sum(c["bytes"] * (2 if c["kind"] in ("reduce-scatter", "all-gather") else 1) for c in along["dict"])
    branches = got.get("dict in branches", 0) if case.alternatives > 1 else 0
    assert 0.97 * least < got["dict"] + branches < 1.05 * case.alternatives * most, (got, planned)
    assert got.get("data", 0) == pytest.approx(sum(c["bytes"] for c in along["data"]), rel=0.05)


@every_case
def test_nothing_as_wide_as_the_dictionary_is_gathered(name):
    """No device has an array of all rows and all features, no gradient and no parameter travels along `dict`."""
    case, it = CASES[name], compiled(name)
    assert max(math.prod(shape) for _, shape, _ in arrays(it.text)) < case.batch * case.d_sae
    groups = len(case.config.sae.groups) or 1
    for m in moved(it.text, **_sizes(it.plan["topology"]["mesh"])):
        for shape in m.shapes if m.axis != "data" else ():
            sizes = [int(n) for n in shape.split("[")[1].rstrip("]").split(",") if n]
            assert math.prod(sizes) <= groups * case.batch * case.d_in and it.features not in sizes, m


IN_PLACE = {"scatter", "dynamic-update-slice"}
PASSED_ON = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "fusion"}


def made(name: str) -> set[str]:
    """The instructions that make a float32 array of all rows of a device; a fusion is what it is made of."""
    it = compiled(name)
    size = (it.features, CASES[name].d_in)
    return {how for dtype, shape, how in arrays(it.text) if (dtype, shape) == ("f32", size)} - PASSED_ON


def test_lazy_rows_make_no_gradient_of_the_dictionary():
    """Rows of it are written in place; the step of all rows adds and multiplies as many as there are."""
    assert made("lazy") <= IN_PLACE
    assert {"add", "multiply"} < made("topk")
    case, it = CASES["lazy"], compiled("lazy")
    assert it.found["peak_bytes"] - it.found["memory"]["arguments"] < 2 * 4 * it.features * case.d_in


def test_in_tiles_no_device_has_its_features_of_all_rows():
    case, it = CASES["relu in tiles"], compiled("relu in tiles")
    assert it.plan["topology"]["path"] == "dense, in tiles"
    assert not [shape for _, shape, _ in arrays(it.text) if sorted(shape) == sorted((case.batch, it.features))]


def test_the_compilers_estimate_of_a_dense_step_is_the_sum_of_rooflines():
    it = compiled("relu")
    assert it.plan["topology"]["path"] == "dense"
    ratio = it.found["step_seconds"] / it.plan["time"]["step_seconds_at_peak"]
    assert 1 / 1.3 < ratio < 1.3, ratio


def test_what_the_plan_refuses_the_compiler_refuses():
    config = CASES["topk on v5p"].config
    with pytest.raises(ConfigError, match="GB on each chip of v5e:16x16"):
        make_plan(config, "v5e:16x16")
    assert "Ran out of memory" in make_plan(config, "v5e:16x16", compiled=True)["compiled"]["refused"]
