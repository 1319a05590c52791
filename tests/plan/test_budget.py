"""What is recommended for a budget, against a law whose truth is known and a search through all that could be trained."""

import dataclasses
import json
import math

import numpy as np
import pytest

from saejax.base.errors import ConfigError, ScalingError
from saejax.cli.main import main
from saejax.plan import budget_table, make_plan, read, recommend
from saejax.scaling.points import Point, recipe_of
from saejax.scaling.recipe import recipe
from tests.plan.configs import make_config

LAW = {"E": 0.1, "A": 40.0, "a": 0.5, "B": 80.0, "b": 0.6}
CONFIG = make_config()
D, BATCH = CONFIG.sae.d_in, CONFIG.train.batch
EACH = 10 * BATCH * D  # dense FLOPs of a step for each feature


def loss(features, steps):
    return LAW["E"] + LAW["A"] * features ** -LAW["a"] + LAW["B"] * steps ** -LAW["b"]


def point(features, steps, config=CONFIG, factor=1.0, **changes):
    values = {"run": f"{features},{steps},{changes}", "recipe": recipe_of(recipe(config) | {"store": "0f"}), "d_in": D,
              "features": features, "steps": steps, "batch": BATCH, "k": 16, "lr": 1e-4, "loss_name": "fvu",
              "flops_dense": float(EACH * features * steps), "loss": float(loss(features, steps) * factor),
              "flops_sparse": float(BATCH * (2 * D * features + 8 * D * 16) * steps),
              "alive": None, "dead_fraction": None, "dead_tokens": 1000}
    return Point(**values | changes)


def grid(noise=0.0, seed=0, **changes):
    rng = np.random.default_rng(seed)
    return [point(round(1024 * 10 ** (i / 5)), round(1000 * 10 ** (j / 5)), factor=math.exp(noise * rng.standard_normal()),
                  **changes) for i in range(6) for j in range(6)]


def swept():
    """Five learning rates at three budgets; the best one is 2e-4, 1e-4, 5e-5."""
    return [point(1024 * 4 ** i, 1000 * 4 ** i, lr=best * 2.0 ** j, factor=math.exp(0.03 * (j * math.log(2)) ** 2))
            for i, best in enumerate((2e-4, 1e-4, 5e-5)) for j in range(-2, 3) if best * 2.0 ** j != 1e-4]


def best_features(compute):
    """In closed form, dense FLOPs."""
    return (LAW["a"] * LAW["A"] / (LAW["b"] * LAW["B"]) * (compute / EACH) ** LAW["b"]) ** (1 / (LAW["a"] + LAW["b"]))


def covers(e, truth):
    return e["low"] <= truth <= e["high"]


@pytest.mark.parametrize("decades", [0, 2, 4])
def test_the_optimum_of_flops_is_the_true_one(decades):
    compute = EACH * 1e7 * 10 ** decades
    found = recommend(CONFIG, grid(), read(f"{compute:.17g}"))
    what, truth = found["recommended"], best_features(compute)
    assert found["optimum"]["features"]["value"] == pytest.approx(truth, rel=0.02)
    assert found["optimum"]["steps"]["value"] == pytest.approx(compute / EACH / truth, rel=0.02)
    assert found["same_flops"][0]["features"]["value"] == pytest.approx(truth, rel=0.02)
    assert abs(math.log2(what["features"] / truth)) < 0.25 and what["features"] % 64 == 0
    assert what["steps"] == int(compute / EACH / what["features"]) and what["tokens"] == what["steps"] * BATCH
    assert what["loss"]["value"] == pytest.approx(loss(what["features"], what["steps"]), rel=1e-3)
    assert found["budget"]["compute"] == pytest.approx(compute, rel=1e-3) and found["topology"] is None
    assert (found["law"]["decades"] > decades - 1.1) if decades else found["law"]["decades"] == 0
    said = budget_table(found)
    assert (f"extrapolated by {found['law']['decades']:.1f} decades" if decades else "inside the fitted budgets") in said


def test_intervals_hold_the_truth():
    """Of 12 draws at 1 % noise, two decades beyond the grid."""
    compute, hits = EACH * 1e9, {"features": 0, "loss": 0}
    for seed in range(12):
        found = recommend(CONFIG, grid(0.01, seed), read(f"{compute:.17g}"))
        what, interval = found["recommended"], found["optimum"]["features"]
        hits["features"] += covers(interval, best_features(compute)) and interval["high"] < 4 * interval["low"]
        hits["loss"] += covers(what["loss"], loss(what["features"], what["steps"]))
    assert min(hits.values()) >= 9, hits


@pytest.mark.parametrize("topology, given", [("h200:1", "1h"), ("v5e:2x4", "30m"), ("cpu:1", "2d")])
def test_a_budget_of_time_is_a_search_over_what_can_be_trained(topology, given):
    """The step times are those of the plan itself; FLOPs alone would choose otherwise."""
    open_mesh = make_config(mesh__data=-1, mesh__dict=-1)
    found, seconds = recommend(open_mesh, grid(), read(given), topology=topology), read(given).amount
    sizes, losses = [m << e for e in range(5, 26) for m in (4, 5, 6, 7)], {}
    for features in sizes:
        config = dataclasses.replace(open_mesh, sae=dataclasses.replace(open_mesh.sae, d_sae=features))
        try:
            plan = make_plan(config, topology)
        except ConfigError:  # it does not fit, or does not divide
            continue
        losses[features] = loss(features, seconds / plan["time"]["step_seconds"]), plan
    best = min(losses, key=lambda features: losses[features][0])
    what, at, plan = found["recommended"], found["topology"], losses[best][1]
    assert (what["features"], at["mesh"], at["step_seconds"]) == (best, plan["topology"]["mesh"], plan["time"]["step_seconds"])
    assert what["steps"] == int(seconds / plan["time"]["step_seconds"]) and at["seconds"] <= seconds
    assert found["optimum"]["features"]["value"] == pytest.approx(best, rel=0.3)


def test_money_is_time_times_price_times_chips():
    by_time = recommend(CONFIG, grid(), read("3h"), topology="h200:8")
    by_money = recommend(CONFIG, grid(), read("60 USD"), topology="h200:8", price=2.5)
    assert by_money["budget"]["seconds"] == 3 * 3600 and by_money["budget"]["chip_hours"] == 24
    assert {k: v for k, v in by_money.items() if k != "budget"} == {k: v for k, v in by_time.items() if k != "budget"}
    assert "24 chip hours at 2.5 each: 3 hours" in budget_table(by_money)


def test_what_does_not_fit_is_said_with_what_it_costs():
    found = recommend(CONFIG, grid(), read("400d"), topology="v5e:1x1")
    limit, what = found["without_memory_limit"], found["recommended"]
    assert limit["features"] > what["features"] and limit["loss"] < what["loss"]["value"]
    assert limit["bytes_per_chip"] > found["topology"]["usable"] >= found["topology"]["bytes_per_chip"]
    assert "do not fit" in budget_table(found)
    for features, fits in ((what["features"], True), (limit["features"], False)):
        config = dataclasses.replace(CONFIG, sae=dataclasses.replace(CONFIG.sae, d_sae=features))
        if fits:
            make_plan(config, "v5e:1x1")
        else:
            with pytest.raises(ConfigError, match="GB more than"):
                make_plan(config, "v5e:1x1")


def test_features_are_what_the_mesh_divides():
    found = recommend(make_config(train__batch=516), grid(batch=516), read("1h"), topology="h200:6")
    assert found["topology"]["mesh"] == {"data": 1, "dict": 6} and found["recommended"]["features"] % 6 == 0


def test_the_learning_rate():
    budget = read(f"{EACH * 1e9:.17g}")
    one = recommend(CONFIG, grid(), budget)["recommended"]["lr"]
    assert (one["value"], one["by"], one["low"]) == (1e-4, "runs", None)
    several = recommend(CONFIG, [*grid(), *swept()], budget)
    rate = several["recommended"]["lr"]
    assert rate["by"] == "law" and covers(rate, 1e-4 * (EACH * 1e9 / (EACH * 16 * 1024e3)) ** -0.25)
    assert rate["decades"] == pytest.approx(math.log10(1e9 / (256 * 1024e3)), abs=0.01)
    assert "by the law of the learning rate, extrapolated by 0.6 decades" in budget_table(several)
    other = recommend(make_config(train__lr=5e-4), grid(), budget)
    assert other["recommended"]["lr"]["value"] == 1e-4 and "the config has 0.0005" in budget_table(other)


def test_k_is_the_configs():
    both = [*grid(), *[dataclasses.replace(p, k=32, run=f"{p.run} 32", loss=p.loss * 0.9) for p in grid()]]
    found = recommend(CONFIG, both, read("1e15"))
    assert found["recommended"] == recommend(CONFIG, grid(), read("1e15"))["recommended"]
    assert "loss alone cannot choose it" in budget_table(found)
    with pytest.raises(ScalingError, match="its runs have k = 16, 32, and config.sae.k is 64"):
        recommend(make_config(sae__k=64), both, read("1e15"))


def test_what_weighs_little_is_named_and_the_rest_refused():
    found = recommend(make_config(train__accumulate=2, data_seed=7), grid(), read("1e15"))
    assert found["law"]["differs"] == ["train.accumulate: 1 -> 2", "data_seed: 0 -> 7"]
    assert "train.accumulate: 1 -> 2" in budget_table(found)


@pytest.mark.parametrize("changes, why", [
    ({"train__batch": 1024}, "train.batch: 512 -> 1024"), ({"sae__d_in": 256}, "d_in: 512 -> 256"),
    ({"lm__model": "another/model"}, "lm.model: 'somebody/some-model' -> 'another/model'"),
    ({"sae__kind": "batchtopk"}, "sae.kind: 'topk' -> 'batchtopk'"), ({"sae__init": "small_encoder"}, "sae.init")])
def test_a_law_of_another_recipe_is_refused(changes, why):
    with pytest.raises(ScalingError, match=why) as caught:
        recommend(make_config(**changes), grid(), read("1e15"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "h", "24x", "-3h", "0h", "1e999", "24", "3 h 4", "usd", "nan"])
def test_other_texts_are_no_budget(text):
    with pytest.raises(ConfigError, match=f"budget={text}"):
        read(text)


def test_budgets_are_read():
    assert [(read(t).kind, read(t).amount) for t in ("1e20", "2.5E19 FLOPs", "24h", "3d", "90m", "1.5 h", "500usd", "500 $")] == [
        ("flops", 1e20), ("flops", 2.5e19), ("time", 86_400), ("time", 3 * 86_400), ("time", 5400), ("time", 5400),
        ("money", 500), ("money", 500)]


@pytest.mark.parametrize("given, more, why", [
    ("24h", {}, "give a topology"), ("500usd", {"price": 2.0}, "give a topology"),
    ("500usd", {"topology": "h200:1"}, "what one chip costs"), ("500usd", {"topology": "h200:1", "price": 0.0}, "price above 0"),
    ("24h", {"topology": "h200:1", "price": 2.0}, "is not money"), ("24h", {"topology": "h300:1"}, "unknown chip")])
def test_what_a_budget_takes(given, more, why):
    with pytest.raises(ConfigError, match=why):
        recommend(CONFIG, grid(), read(given), **more)


def test_budgets_and_points_that_give_nothing():
    with pytest.raises(ScalingError, match="no points"):
        recommend(CONFIG, [], read("1e15"))
    with pytest.raises(ScalingError, match="no scaling laws: .*too few"):
        recommend(CONFIG, grid()[:8], read("1e15"))
    with pytest.raises(ScalingError, match="sparse FLOPs were not counted"):
        recommend(CONFIG, grid(flops_sparse=None), read("1e15"), compute="sparse")
    with pytest.raises(ScalingError, match="no optimum between 64 and 320 features"):
        recommend(CONFIG, grid(), read("1e9"))
    with pytest.raises(ScalingError, match="pays for no step"):
        recommend(CONFIG, grid(), read("0.000001s"), topology="h200:1")
    with pytest.raises(ConfigError, match="features fit these chips"):
        recommend(make_config(train__batch=2**22), grid(batch=2**22), read("9000d"), topology="v5e:1x1")


def test_an_offset_of_nothing_is_none():
    """Where no irreducible loss fits best, the envelope's law falls to 0, and that is said."""
    found = recommend(CONFIG, grid(0.01, 2), read(f"{EACH * 1e10:.6g}"))
    assert "(no offset was fitted: too low far out)" in budget_table(found)
    assert "no offset" not in budget_table(recommend(CONFIG, grid(), read(f"{EACH * 1e10:.6g}")))


def test_the_command(tmp_path, capsys):
    points, config = tmp_path / "points.json", tmp_path / "config.py"
    points.write_text(json.dumps([p.to_json() for p in grid()]))
    config.write_text("from saejax.config import default_config\n\n\ndef get_config():\n    c = default_config('topk')\n"
                      "    c.lm.model, c.mesh.data = 'somebody/some-model', 1\n"
                      "    c.sae.d_in, c.sae.d_sae, c.train.batch, c.sae.k, c.sae.aux_k = 512, 8192, 512, 16, 0\n    return c\n")
    common = ["plan", f"--config={config}", "--topology=h200:1"]
    assert main([*common, "--budget=1h", f"--law={points}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recommended"] == recommend(CONFIG, grid(), read("1h"), topology="h200:1")["recommended"]
    assert main([*common, "--budget=1h", f"--law={points}", "--leave-out=10240,0", "--json"]) == 0
    fewer = json.loads(capsys.readouterr().out)["law"]
    assert (fewer["points"], found["law"]["points"]) == (30, 36)
    assert fewer["features_range"][1] < 10240 == found["law"]["features_range"][1]
    assert main([*common, "--budget=1h", f"--law={points}"]) == 0
    said = capsys.readouterr().out
    assert f"config.sae.d_sae={found['recommended']['features']} " in said and "1h on h200:1" in said
    for more, why in ((["--budget=1h"], "add --law"), ([f"--law={points}"], "add --budget"), (["--price=2"], "no effect without"),
                      (["--leave-out=1,1"], "--leave-out has no effect without a budget"),
                      (["--budget=1h", f"--law={points}", "--compile"], "--compile has no effect with a budget"),
                      (["--budget=soon", f"--law={points}"], "not a budget")):
        assert main([*common, *more]) == 2
        assert why in capsys.readouterr().err
