"""A plan against the program that it describes: state, FLOPs and collectives of the compiled step, and what it refuses."""

import dataclasses
import json
import math
import re
import typing
from pathlib import Path

import jax
import pytest

from saejax.base import hardware, sharding
from saejax.base.errors import ConfigError
from saejax.base.hardware import parse
from saejax.base.records import MeshOptions
from saejax.cli.main import main
from saejax.plan import as_json, as_table, make_plan
from saejax.plan import plan as plan_module
from saejax.plan.compiled import lowered
from saejax.plan.hlo import moved
from saejax.sae import SAESpec
from saejax.sae.select import sent
from saejax.train import step_cost
from saejax.train.loop import mesh_options
from saejax.train.step_cost import Work, best_mesh, bytes_per_parameter, flops, working
from tests.plan.configs import make_config, wide

GOLDEN = Path(__file__).parent / "golden.json"


def spec_of(config):
    return SAESpec.from_options(config.sae, {config.sae.hookpoint: config.sae.d_in}, config.train.compute_dtype)


def compiled(config, data):
    mesh, spec = sharding.make_mesh(MeshOptions(data, 8 // data)), spec_of(config)
    return lowered(config, spec, mesh, "cpu").compile(), spec


def rows_of(*core):
    """(recipe, path, data axis, parts) with those not in `core` in the slow tier."""
    cases = [("topk", "sparse", 1, 1), ("topk", "sparse", 2, 1), ("topk", "sparse", 2, 4), ("topk", "dense", 2, 1),
             ("topk", "dense", 8, 1), ("relu", "auto", 4, 1), ("gated", "auto", 2, 1), ("jumprelu", "auto", 2, 1),
             ("batchtopk", "dense", 2, 1), ("matryoshka", "dense", 2, 1)]
    return [pytest.param(*case, marks=() if case in core else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("kind, path, data, parts", rows_of(("topk", "sparse", 2, 1), ("relu", "auto", 4, 1)))
def test_the_compiled_step_has_what_the_plan_says(kind, path, data, parts):
    config = make_config(kind, train__path=path, train__accumulate=parts)
    program, spec = compiled(config, data)
    found, expected = moved(program.as_text(), data, 8 // data), make_plan(
        dataclasses.replace(config, mesh=MeshOptions(data, 8 // data)), "cpu:8")
    for axis in ("dict", "data"):
        got = sum(m.bytes for m in found if m.axis == axis and not m.branch)
        assert got == pytest.approx(expected["collective_bytes"][axis], rel=0.02), (axis, found)
    work = Work.of(config, spec, data, 8 // data, hardware.CHIPS["cpu"])
    assert program.memory_analysis().argument_size_in_bytes == pytest.approx(
        sum(size for name, size in expected["memory"]["by_kind"].items() if name not in working(work, "cpu")), rel=0.02)
    if parts == 1:  # a loop's FLOPs are counted once
        assert program.cost_analysis()["flops"] == pytest.approx(flops(work), rel=0.17)
    measured = program.memory_analysis().temp_size_in_bytes
    assert 0.4 < sum(working(work, "cpu").values()) / measured < 2.5


@pytest.mark.parametrize("data, changes", [(1, {}), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
    (2, {}), (2, {"train__accumulate": 4}), (1, {"train__batch": 2048, "sae__aux_k": 0})))])
def test_memory_of_the_sparse_path_with_aux_is_what_the_plan_says(data, changes):
    config = make_config(**({"sae__d_sae": 65_536, "sae__aux_k": 64, "train__path": "sparse"} | changes))
    program, spec = compiled(config, data)
    work = Work.of(config, spec, data, 8 // data, hardware.CHIPS["cpu"])
    assert 0.5 < sum(working(work, "cpu").values()) / program.memory_analysis().temp_size_in_bytes < 2


@pytest.mark.parametrize("data", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_lazy_rows_in_six_bytes_are_what_the_plan_says(data):
    """The gradients that move along `data` are those of the rows that can fire, fewer than a shard has."""
    options = {"train__path": "sparse"}
    config = make_config(sae__d_sae=65_536, sae__k=4, train__optimizer="lazy_bf16", **options)
    program, spec = compiled(config, data)
    expected = make_plan(dataclasses.replace(config, mesh=MeshOptions(data, 8 // data)), "cpu:8")
    found = moved(program.as_text(), data, 8 // data)
    for axis in ("dict", "data"):
        got = sum(m.bytes for m in found if m.axis == axis and not m.branch)
        assert got == pytest.approx(expected["collective_bytes"][axis], rel=0.02), axis
    work = Work.of(config, spec, data, 8 // data, hardware.CHIPS["cpu"])
    state = sum(size for name, size in expected["memory"]["by_kind"].items() if name not in working(work, "cpu"))
    assert program.memory_analysis().argument_size_in_bytes == pytest.approx(state, rel=0.02)
    assert state == pytest.approx(6 * work.matrices, rel=0.02)
    assert 0.4 < sum(working(work, "cpu").values()) / program.memory_analysis().temp_size_in_bytes < 2.5
    eager = Work.of(make_config(sae__d_sae=65_536, sae__k=4, **options), spec, data, 8 // data, hardware.CHIPS["cpu"])
    many, eager_many = (dataclasses.replace(w, rows=4 * w.rows) for w in (work, eager))
    assert work.gradients <= eager.gradients and many.gradients <= eager_many.gradients / 2, "1/8 of a shard has room"
    assert step_cost.seconds(work, parse("cpu:8"))["optimizer"] < 0.3 * step_cost.seconds(eager, parse("cpu:8"))["optimizer"]


def test_thirty_four_million_features_are_refused_with_twelve_bytes_and_planned_with_six():
    options = {"sae__d_in": 4096, "sae__d_sae": 2**25, "sae__k": 64, "train__batch": 4096, "train__compute_dtype": "bfloat16"}
    with pytest.raises(ConfigError, match=r"each chip of v5e:16x16 .*config.train.optimizer = 'second_bf16',"):
        make_plan(make_config(**options), "v5e:16x16")
    plan = make_plan(make_config(**options, train__optimizer="lazy_bf16"), "v5e:16x16")
    memory = plan["memory"]["by_kind"]
    assert plan["memory"]["fits"] and memory["optimizer bfloat16"] == 2 * 2 * 4096 * 2**25 // 256
    assert plan["sae"]["state_bytes_per_parameter"] == pytest.approx(6, rel=1e-3)


def test_collectives_of_topk_are_three_arrays_of_rows_and_the_candidates():
    config = make_config(sae__d_in=1024, train__batch=512, train__path="sparse", sae__d_sae=4096)
    found = [m for m in moved(compiled(config, 1)[0].as_text(), 1, 8) if not m.branch]
    assert sum(m.bytes for m in found) == pytest.approx(3 * 4 * 512 * 1024 + 4 * 8 * 512 * sent(16, 512, 8, 512), rel=0.05)
    assert {m.axis for m in found} == {"dict"}
    sizes = [math.prod(int(n) for n in re.findall(r"\d+", shape.split("[")[1])) for m in found for shape in m.shapes]
    assert max(sizes) == 512 * 1024  # no gradient and no parameter among them


def test_golden_plan():
    made = json.loads(as_json(make_plan(wide(), "v5p:2x4x4")))
    golden = json.loads(GOLDEN.read_text())
    assert _rounded(made) == _rounded(golden), ("the plan of tests/plan/configs.wide has changed; if that is right: "
                                                "python -m tests.plan.golden > tests/plan/golden.json")


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def test_state_bytes_are_those_of_the_training_state():
    plan = make_plan(wide(), "v5p:2x4x4")
    parameters = 2 * 4096 * 2**22 + 2**22 + 4096
    assert plan["sae"]["parameters"] == parameters
    memory = plan["memory"]["by_kind"]
    on_chip = 4 * (2 * 4096 * 2**22 + 2**22) // 32 + 4 * 4096  # b_dec is on every chip
    assert memory["parameters"] == on_chip and memory["optimizer float32"] == 2 * on_chip
    with_mean = make_plan(make_config(train__ema=0.99), "cpu:8")["memory"]["by_kind"]
    assert with_mean["mean of the parameters"] == with_mean["parameters"]


def test_table_and_json_say_the_same(capsys):
    plan = make_plan(wide(), "v5p:2x4x4")
    table = as_table(plan)
    for text in ("v5p:2x4x4, 32 chips", "1 x 32 (data x dict), sparse path", "candidate values", "tokens/s", "smallest that fit"):
        assert text in table
    assert max(map(len, table.splitlines())) <= 130
    assert json.loads(as_json(plan)) == json.loads(json.dumps(plan))


def test_without_a_topology_it_lists_the_smallest_that_fit():
    plan = make_plan(wide())
    assert "memory" not in plan and "time" not in plan
    by_chip = {}
    for option in plan["fits"]:
        by_chip.setdefault(option["topology"].split(":")[0], []).append(option)
    assert set(by_chip) == {"v5e", "v5p", "v6e", "h100", "h200"} and all(len(options) == 3 for options in by_chip.values())
    for options in by_chip.values():
        chips = [option["chips"] for option in options]
        assert chips == sorted(chips)
        for option in options:
            assert option["bytes_per_chip"] <= step_cost.USABLE * hardware.CHIPS[option["topology"].split(":")[0]].memory
    # The next smaller one would not do.
    with pytest.raises(ConfigError, match=r"GB more than the 88.3 GB that arrays can have; .*smallest v5p .* is v5p:2x2x2"):
        make_plan(wide(), "v5p:2x2x1")


@pytest.mark.parametrize("text, size, name", [
    ("v5p:4x8x8", 256, "v5p:4x8x8"), ("V5E:16", 16, "v5e:4x4"), ("v6e:8x4", 32, "v6e:8x4"), ("h100:8x4", 32, "h100:8x4"),
    ("h200:8", 8, "h200:8"), ("cpu:8", 8, "cpu:8")])
def test_topologies(text, size, name):
    assert parse(text).size == size and parse(text).name == name


@pytest.mark.parametrize("text, message", [
    ("v5:8x8", "unknown chip 'v5'; did you mean 'v5"),
    ("a100:8", "unknown chip 'a100'; did you mean 'h100'"),
    ("tpu", "unknown chip 'tpu'; known are v5e, v5p, v6e, h100, h200, cpu"),
    ("v5p", "the shape is missing or no product of sizes; write for example v5p:8x8x16"),
    ("v5p:4x8x", "the shape is missing or no product of sizes"),
    ("v5p:4x4x5", "v5p has no slice of that shape; nearest are v5p:4x4x4, "),
    ("v5e:32x32", "v5e has no slice of that shape; nearest are v5e:16x16"),
    ("h100:16x4", "the shape of h100 is GPUs per node (at most 8) x nodes"),
    ("cpu:4x2", "the shape of cpu is a number of devices"),
])
def test_unknown_topologies(text, message):
    with pytest.raises(ConfigError) as error:
        make_plan(make_config(), text)
    assert message in str(error.value) and "\n" not in str(error.value)


class Device(typing.NamedTuple):
    device_kind: str
    platform: str
    process_index: int = 0
    coords: tuple | None = None


@pytest.mark.parametrize("devices, name", [
    ([Device("TPU v5 lite", "tpu", 0, (x, y, 0)) for x in range(4) for y in range(2)], "v5e:4x2x1"),
    ([Device("TPU v5p", "tpu", 0, (x, y, z)) for x in range(2) for y in range(2) for z in range(4)], "v5p:2x2x4"),
    ([Device("NVIDIA H100 80GB HBM3", "gpu", i // 8) for i in range(16)], "h100:8x2"),
    ([Device("NVIDIA H200", "gpu", i) for i in range(16)], "h200:8x2"),
    ([Device("NVIDIA A100-SXM4-80GB", "gpu")], "h100:1x1"),
    ([Device("cpu", "cpu")] * 8, "cpu:8"),
])
def test_devices_that_are_here(devices, name):
    assert hardware.present(devices).name == name


def test_a_group_uses_every_axis_that_it_reaches_over():
    v5p, nodes = parse("v5p:4x8x8"), parse("h100:8x4")
    link = v5p.chip.link
    assert [v5p.ring(n) / link for n in (8, 64, 256)] == [1, 2, 3]
    assert v5p.ring(4, stride=64) == link and v5p.ring(32, stride=8) == 2 * link
    assert nodes.ring(8) == nodes.chip.link and nodes.ring(4, stride=8) == nodes.ring(16) == nodes.chip.across


@pytest.mark.parametrize("overrides, topology, message", [
    ({"mesh__data": 3, "mesh__dict": 2}, "cpu:8", "does not use the 8 devices here; .*that divide all are 4x2"),
    ({"train__batch": 100}, "cpu:8", "config.train.batch: 100 rows cannot be split over the 1 x 8 mesh; .*96 or 104"),
    ({"sae__d_sae": 8190, "mesh__dict": 4, "mesh__data": 2}, "cpu:8", "nearest valid value is 8192; .*divide all are 4x2"),
    ({"mesh__data": -1, "train__batch": 100}, "cpu:8", "100 rows cannot rest on 8 devices; the nearest valid value is 96"),
    ({"sae__d_sae": 2**25, "sae__d_in": 4096, "train__batch": 16384}, "v5e:16x16",
     r"33,554,432 features of width 4096 need [\d.]+ GB on each chip of v5e:16x16 \(mesh 1x256\), [\d.]+ GB more than the "
     r"14.7 GB .* the largest dictionary here is about [\d,]+ features; .*accumulate"),
    ({"sae__d_sae": 2**31, "sae__d_in": 4096}, None, "fit none of the known topologies"),
])
def test_what_cannot_be_is_one_line_with_a_way_out(overrides, topology, message):
    with pytest.raises(ConfigError, match=message) as error:
        make_plan(make_config(**overrides), topology)
    assert "\n" not in str(error.value)


def test_the_largest_dictionary_that_it_names_fits():
    config = make_config(sae__d_sae=2**25, sae__d_in=4096, train__batch=16384)
    with pytest.raises(ConfigError) as error:
        make_plan(config, "v5e:16x16")
    largest = int(str(error.value).split("is about ")[1].split(" ")[0].replace(",", ""))
    sae = dataclasses.replace(config.sae, d_sae=largest)
    assert make_plan(dataclasses.replace(config, sae=sae), "v5e:16x16")["memory"]["fits"]


def best(config, topology):
    return best_mesh(config, spec_of(config), parse(topology))


def test_the_mesh_that_it_chooses():
    bfloat16 = {"train__compute_dtype": "bfloat16"}
    # Few features on each chip, many rows: gradients are cheaper to move than rows.
    assert best(make_config(sae__d_in=512, sae__d_sae=16_384, train__batch=2**18, **bfloat16), "v5e:4x4")[0] > 1
    # A wide dictionary and few rows: no gradient travels.
    assert best(wide(), "v5p:2x4x4") == (1, 32)
    # With many rows the dictionary stays inside a node: the network between nodes takes the gradients.
    assert best(make_config(sae__d_in=2304, sae__d_sae=2**17, sae__k=64, train__batch=2**19, **bfloat16), "h100:8x4") == (4, 8)
    # Shapes that divide only.
    assert best(make_config(sae__d_sae=8192 + 2, train__batch=512), "cpu:8")[1] <= 2
    # State that an option adds is seen.
    assert bytes_per_parameter(wide(), spec_of(wide())) == pytest.approx(12, rel=1e-3)
    with_mean = make_config(train__ema=0.9)
    assert bytes_per_parameter(with_mean, spec_of(with_mean)) == pytest.approx(16, rel=1e-3)


def test_training_takes_the_chosen_mesh_where_the_config_leaves_it_open():
    config, devices = make_config(), jax.devices()
    assert mesh_options(config, devices) == config.mesh
    free = dataclasses.replace(config, mesh=MeshOptions(-1, -1))
    chosen = mesh_options(free, devices, lambda hookpoint: 512)
    assert (chosen.data, chosen.dict) == best_mesh(free, spec_of(free), hardware.present(devices))
    assert sharding.make_mesh(chosen).size == 8


def test_collectives_are_read_with_loops_branches_and_groups():
    hlo = """HloModule m
%body (p: f32[8]) -> f32[8] {
  %a = f32[4,8]{1,0} all-reduce(%x), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%sum
}
%left (p: f32[8]) -> f32[8] {
  %g = f32[16,8]{1,0} all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}
%right (p: f32[8]) -> f32[8] {
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %w = f32[8] while(%p), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %c1 = f32[8] conditional(%i, %p, %p), branch_computations={%left, %right}
  %s = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%p), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  %r = f32[2,8]{1,0} reduce-scatter(%p), replica_groups=[2,4]<=[8], dimensions={0}
}
"""
    found = {m.kind + str(m.branch): m for m in moved(hlo, 2, 4)}
    assert len(found) == 4
    reduce, branch = found["all-reduceFalse"], found["all-gatherTrue"]
    assert (reduce.axis, reduce.times, reduce.bytes) == ("data", 5, 2 * 5 * 4 * 8 * 4)
    assert (branch.axis, branch.bytes) == ("dict", 16 * 8 * 4)
    assert (found["all-gatherFalse"].axis, found["all-gatherFalse"].bytes) == ("dict", 8 * 8 * 2)
    assert found["reduce-scatterFalse"].bytes == 4 * 2 * 8 * 4


def test_harvest_and_store(model_and_text, tmp_path):
    from tests import tiny_experiment
    config = tiny_experiment.make_config(*model_and_text, tmp_path / "run")
    plan = make_plan(config, "cpu:1")
    assert plan["sae"]["d_in"] == tiny_experiment.D_IN
    harvest = plan["harvest"]
    assert harvest["store_tokens"] == 4096 and harvest["passes"] == 0.5
    lm, train = harvest["lm_flops_per_token"], harvest["train_flops_per_token"]
    assert harvest["share_of_flops"] == pytest.approx(lm * 4096 / (lm * 4096 + train * 2048), rel=1e-6)
    stages = {"tokenizer": 4096 / (2 * plan_module.TOKENIZED), "model": lm * 4096 / (0.4 * hardware.CHIPS["cpu"].flops),
              "writer": 4096 * (2 * tiny_experiment.D_IN + 4) / (2 * plan_module.WRITTEN)}
    assert harvest["stage_seconds"] == pytest.approx(stages, rel=1e-6) and harvest["slowest"] == "model"
    assert harvest["seconds"] == pytest.approx(stages["tokenizer"] + stages["model"], rel=1e-6)
    assert harvest["shards"] == 4 and harvest["host_bytes"] == 2 * 32 * 36 * 96 + 44 * 32 * 32
    assert "of all FLOPs; about " in as_table(plan)


def test_the_command(model_and_text, tmp_path, capsys):
    from tests import tiny_experiment as tiny
    config = tiny.write_config(tmp_path / "config.py", *model_and_text, tmp_path / "run", "c.sae.aux_k = 0")
    assert main(["plan", f"--config={config}", "--topology=cpu:8", "--compile", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    found = plan["compiled"]
    assert set(found["memory"]) == {"arguments", "temporaries", "outputs beside arguments", "program"}
    assert found["peak_bytes"] == sum(found["memory"].values()) > 0 and found["flops_per_step_per_chip"] > 0
    assert found["collectives"][0]["bytes"] >= found["collectives"][-1]["bytes"]
    assert plan["compiled"]["collective_bytes"]["dict"] == pytest.approx(plan["collective_bytes"]["dict"], rel=0.1)
    assert main(["plan", f"--config={config}"]) == 0 and "smallest that fit" in capsys.readouterr().out
    for arguments, message in ((["--topology=v5x:8"], "unknown chip 'v5x'"), (["--compile"], "--compile needs --topology"),
                               (["--topology=h100:8", "--compile"], "only TPU topologies"),
                               (["--config.lm.model=no/model"], "not known here")):
        assert main(["plan", f"--config={config}", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "run").exists()


def test_without_the_tpu_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "libtpu", None)
    with pytest.raises(ConfigError, match=r"needs the TPU compiler: pip install 'saejax\[tpu-plan\]'"):
        make_plan(make_config(), "v5e:2x4", compiled=True)


def test_the_example_in_the_docs_is_current(capsys):
    root = Path(__file__).parents[2]
    assert main(["plan", f"--config={root / 'configs/smollm2_pod.py'}", "--topology=v5p:4x4x4"]) == 0
    assert capsys.readouterr().out in (root / "docs/how-to/plan.md").read_text(), "put there what the command prints"


@pytest.mark.slow
def test_a_run_on_the_chosen_mesh(tmp_path):
    from saejax.train.loop import train
    from tests.train import synthetic
    store = synthetic.make_store(tmp_path / "store")
    open_, fixed = (synthetic.make_config("topk", tmp_path / name, mesh__data=data, mesh__dict=-1, train__tokens=320)
                    for name, data in (("open", -1), ("fixed", 1)))
    trained = train(open_, store)
    assert trained.mesh.size == 8 and trained.step == 10
    reference = train(fixed, store)
    difference = jax.device_get(trained.state.params.W_dec) - jax.device_get(reference.state.params.W_dec)
    assert abs(difference).max() < 1e-4


def test_checkpoints_and_what_a_failure_costs():
    config = make_config("topk", sae__d_sae=2**20)
    plan = make_plan(dataclasses.replace(config, mesh=MeshOptions(-1, -1)), "v5e:8x8")
    saved, kept = plan["checkpoint"], sum(size for name, size in plan["memory"]["by_kind"].items() if name in (
        "parameters", "counters and scalars", "optimizer float32"))
    assert saved["bytes"] == kept * plan["topology"]["mesh"]["dict"]
    assert saved["interval_seconds"] == pytest.approx(config.checkpoint.every_tokens / plan["time"]["tokens_per_second"])

    def lost(interval):
        return saved["stall_seconds"] / interval + interval / 2 / saved["failure_seconds"]

    assert saved["lost"] == pytest.approx(lost(saved["interval_seconds"]))
    best = saved["best_every_tokens"] / plan["time"]["tokens_per_second"]
    assert saved["best_lost"] == pytest.approx(lost(best)) and all(lost(best) <= lost(best * f) for f in (0.5, 0.9, 1.1, 2))
    assert "of the time is lost" in as_table(plan)
