"""Config errors name the key and the fix; what is saved is what was run."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saejax import config as config_lib
from saejax.base.errors import ConfigError
from saejax.config import Config, default_config, differences, from_json, resolve, to_json
from saejax.config.reference import reference


@pytest.mark.parametrize("name", config_lib.RECIPES)
def test_recipes_resolve_and_round_trip(name):
    config = resolve(default_config(name))
    assert config.sae.kind == config_lib.RECIPES[name]["sae.kind"]
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    assert config.run_dir == "runs/run" and config.harvest.store == "runs/run/store"


@pytest.mark.parametrize("key, value, message", [
    ("train.batch", "many", "config.train.batch: expected int, got str 'many'"),
    ("train.batch", True, "config.train.batch: expected int, got bool True"),
    ("train.batch", 0, "config.train.batch: 0 must be greater than 0"),
    ("train.lr_decay", 1.5, "config.train.lr_decay: 1.5 must be at most 1.0"),
    ("sae.kind", "jump", "config.sae.kind: 'jump' is not one of relu, topk, "),
    ("harvest.hookpoints", [], "config.harvest.hookpoints: expected a non-empty tuple of strings"),
    ("sae.k", 9999, "config.sae.k: 9999 active features of config.sae.d_sae = 4608"),
    ("sae.penalty", "log", "config.sae.penalty: 'log' does not belong to kind 'topk'; set it to 'l1'"),
    ("sae.groups", (0.5, 0.5), "config.sae.groups: nested prefixes belong to kind 'batchtopk' or 'jumprelu'"),
    ("sae.groups", "half", "config.sae.groups: expected a tuple of numbers, got 'half'"),
    ("sae.kind", "jumprelu", "config.sae.penalty: 'l1' does not belong to kind 'jumprelu'; set it to 'tanh' or 'l0' or"),
    ("train.clip", 0.0, "config.train.clip: 0.0 must be greater than 0"),
    ("sae.kind", "gated", "config.sae.aux_k: 256, but AuxK belongs to kinds topk, batchtopk, jumprelu (dead features of 'gated'"),
    ("sae.k_start", 16, "config.sae.k_start: 16 belongs to kinds with k (topk, batchtopk), above config.sae.k = 32"),
    ("train.accumulate", 3, "config.train.accumulate: 3 parts do not divide config.train.batch = 4096"),
    ("train.target_l0", 50.0, "config.train.target_l0: 50, but kind 'topk' has as many active features as config.sae.k says"),
    ("sae.init", "tied", "config.sae.init: 'tied' starts with decoder rows of norm 0.1, but config.sae.unit_decoder keeps"),
    ("sae.hookpoint", "blocks.3.hook_resid_post", "is not harvested; add it to config.harvest.hookpoints"),
    ("sae.target", "blocks.9.hook_mlp_out", "config.sae.target: 'blocks.9.hook_mlp_out' is not harvested; add it to config"),
    ("sae.target", "blocks.9.hook_resid_post", "is config.sae.hookpoint itself; leave it empty for a plain SAE"),
    ("sae.target", "blocks.9.hook_mlp_out", "config.sae.pre_bias: b_dec of a transcoder belongs to its target"),
    ("sae.skip", True, "config.sae.skip: a skip connection belongs to a transcoder; set config.sae.target, or skip to False"),
    ("sae.crosscoder", ("blocks.9.hook_resid_post",), "should be at least two different hookpoints"),
    ("sae.crosscoder", ("blocks.9.hook_resid_post", "blocks.3.hook_resid_post"), "'blocks.3.hook_resid_post' is not harvested"),
    ("stream.window_rows", 100, "config.stream.window_rows: 100 is less than one block"),
    ("mesh.data", 0, "config.mesh: data and dict are device counts or -1, not 0"),
])
def test_wrong_values_are_named(key, value, message):
    values = dataclasses.asdict(Config())
    *path, leaf = key.split(".")
    node = values
    for part in path:
        node = node[part]
    node[leaf] = value
    with pytest.raises(ConfigError) as error:
        resolve(values)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_unknown_keys_and_all_problems_at_once():
    values = dataclasses.asdict(Config())
    values["train"]["learning_rate"] = 1.0
    values["train"]["bacth"] = 2
    values["sae"]["k"] = "x"
    with pytest.raises(ConfigError) as error:
        resolve(values)
    for part in ("unknown key 'train.learning_rate'", "unknown key 'train.bacth'; did you mean 'train.batch'?",
                 "config.sae.k: expected int"):
        assert part in str(error.value)


def test_one_way_to_aim_at_an_l0():
    for penalty, message in (("target_l0", "pulls towards config.sae.k by itself"), ("l0", "is the penalty 'target_l0'")):
        values = default_config("jumprelu")
        values.train.target_l0, values.sae.penalty = 50.0, penalty
        with pytest.raises(ConfigError, match=message):
            resolve(values)
    values = default_config("relu")
    values.train.target_l0 = 5000.0
    with pytest.raises(ConfigError, match="5000 active features of config.sae.d_sae = 4608; lower it"):
        resolve(values)


@pytest.mark.parametrize("shares", [(0.5, 0.4), (1e-9, 1.0), (1.5, -0.5)])
def test_shares_of_nested_prefixes_must_make_sense(shares):
    values = default_config("matryoshka")
    values.sae.groups = shares
    with pytest.raises(ConfigError, match="are not shares that add up to 1 with at least one feature"):
        resolve(values)


def test_multi_topk_needs_room_for_four_times_k():
    values = default_config("topk")
    values.sae.multi_topk, values.sae.k, values.sae.d_sae = True, 17, 64
    with pytest.raises(ConfigError, match="config.sae.multi_topk: belongs to kind 'topk' with 4 x config.sae.k"):
        resolve(values)


def test_config_dict_is_locked():
    with pytest.raises(AttributeError, match="Did you mean.*batch"):
        default_config().train.bach = 3


def test_newer_schema_is_refused():
    with pytest.raises(ConfigError, match="schema version 99"):
        from_json(to_json(Config()) | {"schema_version": 99})


def test_differences_leave_out_what_changes_nothing():
    a = resolve(default_config())
    b = dataclasses.replace(a, seed=1, run_dir="elsewhere", log=dataclasses.replace(a.log, every_steps=3))
    assert differences(a, b) == ["seed: 0 -> 1"]


def test_a_run_may_go_on_on_another_path_and_not_with_another_optimizer():
    a = resolve(default_config())
    b = dataclasses.replace(a, train=dataclasses.replace(a.train, path="sparse", optimizer="lazy"))
    assert differences(a, b) == ["train.optimizer: 'adam' -> 'lazy'"]


@pytest.mark.parametrize("optimizer, beta1, state_bytes, lazy", [
    ("adam", 0.9, 12, False), ("adam_bf16", 0.9, 8, False), ("second", 0.0, 8, False), ("second_bf16", 0.0, 6, False),
    ("lazy", 0.0, 8, True), ("lazy_bf16", 0.0, 6, True)])
def test_what_an_optimizer_stands_for(optimizer, beta1, state_bytes, lazy):
    config = default_config()
    config.train.optimizer = optimizer
    train = resolve(config).train
    assert (train.beta1, train.state_bytes, train.lazy) == (beta1, state_bytes, lazy)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=4)))
def test_any_json_is_a_config_or_a_config_error(values):
    if not isinstance(values, dict):
        values = {"train": values}
    try:
        resolve(values)
    except ConfigError as error:
        assert "\n" not in str(error).replace("\\n", "")


def test_reference_is_current():
    path = Path(__file__).parents[2] / "docs" / "reference" / "config.md"
    assert path.read_text() == reference() + "\n", "run: python -m saejax.config.reference > docs/reference/config.md"
