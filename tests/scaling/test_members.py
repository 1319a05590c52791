"""What a sweep's product and variations mean, and that every mistake in them is named at once."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saejax import config as config_lib
from saejax.base.errors import ConfigError
from saejax.config import Config, default_config, from_json, resolve, to_json
from saejax.config.recipes import RECIPES
from saejax.scaling.sweep import COMMON, members
from saejax.train.hyperparameters import alike


def sweep(product=(), variations=(), base="topk", **changes) -> Config:
    c = default_config(base)
    c.run_dir, c.harvest.hookpoints = "runs/x", ("blocks.9.hook_resid_post", "blocks.3.hook_mlp_out")
    c.sweep.product, c.sweep.variations = product, variations
    for key, value in changes.items():
        section, name = key.split("__")
        c[section][name] = value
    return resolve(c)


def names(config):
    return [Path(member.run_dir).name for member in members(config)]


def test_a_product_is_all_combinations_in_order():
    config = sweep(("sae.k=16,32,64", "train.lr=1e-4,3e-4"))
    assert names(config) == [f"k={k},lr={lr}" for k in (16, 32, 64) for lr in ("0.0001", "0.0003")]
    assert [(m.sae.k, m.train.lr) for m in members(config)] == [(k, lr) for k in (16, 32, 64) for lr in (1e-4, 3e-4)]
    assert len({alike(m) for m in members(config)}) == 3


def test_variations_and_their_product():
    config = sweep(("seed=0,1",), ("recipe=relu sae.penalty_coef=3", "sae.kind=topk  sae.k=8", ""))
    assert names(config) == ["recipe=relu,penalty_coef=3,seed=0", "recipe=relu,penalty_coef=3,seed=1",
                             "kind=topk,k=8,seed=0", "kind=topk,k=8,seed=1",
                             "seed=0", "seed=1"]
    relu = members(config)[0]
    assert relu.sae.penalty_coef == 3 and relu.sae.init == "tied" and relu.train.lr == RECIPES["relu"]["train.lr"]


def test_members_share_text_rows_and_store():
    base = sweep(("seed=0,5",))
    first, second = members(base)
    assert first.harvest.store == second.harvest.store == "runs/x/store"
    assert (first.seed_of_data, second.seed_of_data, second.seed) == (0, 0, 5)
    assert second.sweep == Config().sweep and second.run_dir == "runs/x/seed=5"
    assert from_json(json.loads(json.dumps(to_json(second)))) == second


def test_a_recipe_leaves_the_batch_of_the_stream():
    [member] = members(sweep(variations=("recipe=matryoshka",)))
    assert member.train.batch == Config().train.batch != RECIPES["matryoshka"]["train.batch"] and member.sae.groups


def test_no_sweep_is_one_member():
    config = resolve(default_config())
    assert members(config) == [config]


@pytest.mark.parametrize("text, key, value", [
    ("sae.groups=0.5+0.25+0.25 sae.kind=batchtopk", "sae.groups", (0.5, 0.25, 0.25)),
    ("sae.crosscoder=blocks.9.hook_resid_post+blocks.3.hook_mlp_out", "sae.crosscoder",
     ("blocks.9.hook_resid_post", "blocks.3.hook_mlp_out")),
    ("sae.center=true", "sae.center", True), ("sae.multi_topk=False", "sae.multi_topk", False),
    ("sae.d_in=576", "sae.d_in", 576), ("sae.d_in=none", "sae.d_in", None), ("sae.target=", "sae.target", ""),
    ("train.lr=2", "train.lr", 2.0), ("train.resample.every_tokens=4096", "train.resample.every_tokens", 4096),
])
def test_values_have_the_type_of_their_key(text, key, value):
    [member] = members(sweep(variations=(text,)))
    got = config_lib.flat(member)[key]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("product, variations, message", [
    (("sae.k=16,many",), (), "config.sweep.product: sae.k: expected int, got 'many'"),
    (("train.tokens=1e6",), (), "train.tokens: expected int, got '1e6'; write 1000000"),
    (("train.lr=nan",), (), "train.lr: expected a number, got 'nan'"),
    (("sae.center=yes",), (), "sae.center: expected true or false, got 'yes'"),
    (("sae.kk=3",), (), "unknown key 'sae.kk'; did you mean sae.k?"),
    (("sae=3",), (), "unknown key 'sae'"),
    (("sae.k",), (), "'sae.k' is not KEY=VALUE,VALUE"),
    (("sae.k=8,8",), (), "names a value twice"),
    (("sae.k=8,16",), ("sae.k=4",), "config.sweep: sae.k is set twice for the same SAE"),
    (("sae.k=8,16", "sae.k=4"), (), "config.sweep: sae.k is set twice for the same SAE"),
    ((), ("sae.k=8 sae.k=9",), "sae.k is set twice in 'sae.k=8 sae.k=9'"),
    ((), ("sae.k 8",), "'sae.k' in 'sae.k 8' is not KEY=VALUE"),
    ((), ("recipe=relo",), "no recipe 'relo'; choose one of relu"),
    (("sae.k=8,9999",), (), "config.sweep, k=9999: config.sae.k: 9999 active features of config.sae.d_sae"),
    (("sae.kind=topk,jump",), (), "config.sweep, kind=jump: config.sae.kind: 'jump' is not one of"),
    ((), ("sae.k=8", "sae.k=8 sae.kind=topk"), "k=8 and k=8,kind=topk are the same SAE"),
])
def test_mistakes_are_named(product, variations, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        members(sweep(product, variations))


def test_all_mistakes_at_once():
    with pytest.raises(ConfigError) as caught:
        members(sweep(("sae.k=a", "train.batch=1,2", "sae.q=3"), ("recipe=none",)))
    assert all(word in str(caught.value) for word in ("sae.k: ", "train.batch cannot", "'sae.q'", "'none'"))
    with pytest.raises(ConfigError) as caught:
        members(sweep(("sae.k=8,9998,9999",)))
    assert "k=9998" in str(caught.value) and "k=9999" in str(caught.value)


@pytest.mark.parametrize("key", [key for key in config_lib.flat(Config())
                                 if any(key == c or (c[-1] == "." and key.startswith(c)) for c in COMMON)])
def test_what_decides_stream_or_text_may_not_vary(key):
    with pytest.raises(ConfigError, match=f"config.sweep.product: {key} cannot vary: "):
        members(sweep((f"{key}=1",)))


def test_common_keys_exist():
    known = config_lib.flat(Config())
    assert all(key in known or any(k.startswith(key) for k in known) and key.endswith(".") for key in COMMON)


def test_rows_that_depend_on_hookpoints():
    different = ("sae.hookpoint=blocks.9.hook_resid_post,blocks.3.hook_mlp_out",)
    assert len(members(sweep(different))) == 2
    with pytest.raises(ConfigError, match="config.stream.mask_outliers: which rows are left out depends on the hookpoints"):
        members(sweep(different, stream__mask_outliers=True))
    with pytest.raises(ConfigError, match="config.log.wandb: one process"):
        members(sweep(different, log__wandb="mine"))


values = st.one_of(
    st.tuples(st.just("train.lr"), st.floats(1e-9, 1.0).map(repr)),
    st.tuples(st.just("sae.k"), st.integers(1, 4000).map(str)),
    st.tuples(st.just("sae.dead_tokens"), st.integers(1, 10**30).map(str)),
    st.tuples(st.just("seed"), st.integers(0, 10**9).map(str)),
    st.tuples(st.just("sae.hookpoint"), st.text("aAbB/.:é-~$", min_size=1, max_size=200)),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(values, min_size=1, max_size=4, unique_by=lambda v: v[0]).map(dict), min_size=1, max_size=6))
def test_names_are_unique_and_safe(chosen):
    hookpoints = tuple(dict.fromkeys(c["sae.hookpoint"] for c in chosen if "sae.hookpoint" in c))
    base = sweep(variations=tuple(" ".join(f"{k}={v}" for k, v in c.items()) for c in chosen))
    base = dataclasses.replace(base, harvest=dataclasses.replace(
        base.harvest, hookpoints=base.harvest.hookpoints + tuple(h for h in hookpoints if h not in base.harvest.hookpoints)))
    try:
        found = names(base)
    except ConfigError as error:
        assert "are the same SAE" in str(error)
        return
    assert len({name.lower() for name in found}) == len(chosen)
    for name in found:
        assert re.fullmatch(r"[A-Za-z0-9_.+=,~-]+", name) and name[0].isalpha() and len(name) <= 140
        assert Path("runs/x", name).parent == Path("runs/x")
