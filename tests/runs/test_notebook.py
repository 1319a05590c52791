"""The lines that a notebook begins with, on a finished run and on files of another library."""

import dataclasses
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import saejax
from saejax.base.errors import ConfigError, FeatureIndexError, HookpointError, PromptError, SteeringError
from saejax.cli.main import main
from saejax.config import default_config
from saejax.formats.convert import convert
from saejax.pages import effects
from saejax.sae.inference import SAE
from tests import tiny_experiment as tiny

TEXT = "the cat sat"


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    copy = tmp_path_factory.mktemp("notebook") / "run"
    shutil.copytree(finished[1], copy)
    assert main(["features", str(copy)]) == 0
    return copy


@pytest.fixture(scope="module")
def s(run):
    return saejax.open(run, mesh=None)


@pytest.fixture(scope="module")
def alive(s):
    return int(s.index.column("max").argmax())


def test_the_fifteen_lines(s, run, model_and_text, alive, tmp_path):
    """As somebody types them; every value is looked at below or here."""
    x = s.lm.capture(TEXT, s.sae.hookpoint)
    acts = s.sae.encode(x)
    assert acts.shape == (12, 64) and len(s.top(acts, 5)) <= 60
    assert s.index[alive].number == alive
    frame = s.index.to_pandas()
    assert frame.query("density < .5").sort_values("max").index.isin(range(64)).all() and frame.loc[alive, "max"] > 0
    assert len(s.search(TEXT, by="relative", max_density=1)) > 0
    sets = s.search(positives=["z" * n for n in range(1, 9)], negatives=["a" * n for n in range(1, 9)])
    assert len(sets) > 0 and str(sets).splitlines()[-1] == sets.note and sets.note.startswith("above chance: best score ")
    assert sets.note in sets._repr_html_() and s.search(TEXT).note == ""
    assert len(s.steer("the", {alive: 5, (alive + 1) % 64: 2}, samples=2, seed=1, tokens=4)) == 4
    found = s.attribute("the cat", "a", "b", ablate=5)
    frame = found.to_pandas()
    assert frame.ablation.notna().sum() == 5 and frame.attribution.sum() == pytest.approx(found.sums["sum"])
    with s.spliced(error=True):
        assert s.lm(TEXT).shape[0] == 12
    theirs = saejax.open(convert_to(run, tmp_path / "layers.1", "sparsify"), model=str(model_and_text[0]), text=s.text)
    assert "unknown" not in repr(theirs.sae)
    assert s.index_of(theirs.sae, tmp_path / "theirs", tokens=640).features == 64
    assert saejax.compare(s, theirs).shares()["shared_A"] == 1
    assert saejax.load(s.sae.save(tmp_path / "mine")).cfg.d_sae == 64


def convert_to(run, directory, name):
    convert(str(run), directory, name)
    return directory


def test_every_repr_fits_a_line(s, alive):
    found = [s, s.sae, s.lm, s.text, s.store, s.corpus(), s.lm.tokenizer, s.index, s.index[alive], s.search(TEXT),
             s.top(s.sae.encode(s.lm.capture(TEXT, tiny.HOOKPOINT))), s.attribute("the cat", "a"), saejax.compare(s, s),
             s.steer("the", tokens=2)]
    for one in found:
        assert len(repr(one)) <= 150 and "\n" not in repr(one), type(one)
    assert dir(saejax) == ["__version__", "compare", "evaluate", "lm", "load", "open", "run", "split", "store_of"]
    assert saejax.lm.LM is type(s.lm)


def test_text_or_tokens_one_hookpoint_or_several_bos_once(s):
    ids = s.lm.tokenizer.encode(TEXT)
    bos, hook = s.lm.tokenizer.bos_id, tiny.HOOKPOINT
    expected = np.asarray(saejax.lm.capture(s.lm.model, np.array([[bos, *ids]]), [hook])[hook][0])
    for given in (TEXT, ids, [bos, *ids], np.array(ids), tuple(ids)):
        np.testing.assert_allclose(s.lm.capture(given, hook), expected, atol=1e-5)
    np.testing.assert_allclose(s.lm.capture(TEXT, "model.layers.1"), expected, atol=1e-5)
    both = s.lm.capture(TEXT, [hook, "blocks.0.mlp.hook_post"])
    assert both[hook].shape == (12, 48) and both["blocks.0.mlp.hook_post"].shape == (12, 80)
    several = s.lm.capture([TEXT, "a"], hook)
    np.testing.assert_allclose(several[0], expected, atol=1e-5)
    assert several[1].shape == (2, 48)
    np.testing.assert_allclose(s.lm(TEXT), s.lm.model(np.array([[bos, *ids]]))[0], atol=1e-4)


def test_a_text_is_compiled_once_for_each_shape(s):
    from saejax.lm import prompts
    s.lm.capture("abc", tiny.HOOKPOINT)
    before = prompts.values._cache_size()
    for text in ("xyz", "the quick one", [1, 5, 6], "hm"):
        s.lm.capture(text, tiny.HOOKPOINT)
    assert prompts.values._cache_size() == before


@pytest.mark.parametrize("call, error, message", [
    (lambda s: s.lm.capture("", tiny.HOOKPOINT), PromptError, "empty"),
    (lambda s: s.lm.capture([3, 999], tiny.HOOKPOINT), PromptError, "token id 999: the model has ids 0 to"),
    (lambda s: s.lm("a" * 64), PromptError, "65 tokens, the model's context 64"),
    (lambda s: s.lm([[1.5]]), PromptError, "whole numbers"),
    (lambda s: s.lm.capture(TEXT, "blocks.3.hook_resid_post"), HookpointError, "use blocks.0 to blocks.2"),
    (lambda s: s.lm.capture(TEXT, 3), HookpointError, "a list of names"),
    (lambda s: s.search(like="king"), ConfigError, "like: 'king'"),
    (lambda s: s.search(like=np.zeros(3)), ConfigError, "of 48 finite"),
    (lambda s: s.search(like=np.full(48, np.nan)), ConfigError, "finite numbers"),
    (lambda s: s.search(like=True), ConfigError, "like:"),
    (lambda s: s.search(TEXT, n=0), ConfigError, "n=0"), (lambda s: s.search(find=3), ConfigError, "find=3"),
    (lambda s: s.search(positives="a cat"), ConfigError, "lists of prompts"),
    (lambda s: s.steer("a", [3]), SteeringError, "got int"), (lambda s: s.steer("a", {"3": 1}), SteeringError, "'3'"),
    (lambda s: s.steer("a", {3: float("nan")}, values=True), SteeringError, "a finite number"),
    (lambda s: s.steer("a", {3: 1}, values=True, samples=0), SteeringError, "samples=0"),
    (lambda s: s.steer("a", {3: 1}, values=True, positions="first"), SteeringError, "position first"),
    (lambda s: s.attribute("a", "b", "b"), PromptError, "against itself"),
    (lambda s: s.attribute("a", "b", ablate=-1), SteeringError, "ablate=-1"),
    (lambda s: s.attribute("a", 3), PromptError, "3 is 0 tokens"),
    (lambda s: s.index["3"], FeatureIndexError, "'3': expected the number"), (lambda s: s.index[1:3], FeatureIndexError, "slice"),
    (lambda s: s.index[True], FeatureIndexError, "True: expected"),
    (lambda s: s.top(np.zeros(3)), ConfigError, r"\[tokens, 64\]"),
    (lambda s: s.top(np.zeros((1, 2, 64))), ConfigError, r"shape \(1, 2, 64\)"),
    (lambda s: saejax.open(3), ConfigError, "int: expected"),
    (lambda s: saejax.open(s.run, modell="x"), ConfigError, "modell=...: expected some of model, hookpoint"),
    (lambda s: saejax.open(s.run, context=0).text, ConfigError, "context=0"),
    (lambda s: saejax.compare(s, 3), ConfigError, "a path"),
    (lambda s: saejax.compare(s, s, rows=0), ConfigError, "rows=0"),
    (lambda s: saejax.compare(s, s, least=2), FeatureIndexError, "least=2"),
    (lambda s: s.search(), ConfigError, "give one of"), (lambda s: s.search(TEXT, find="a"), ConfigError, "give one of"),
    (lambda s: s.search(find="a", by="relative"), ConfigError, "with by"),
    (lambda s: s.search(find="a", max_density=0.1), ConfigError, "with by, max_density"),
    (lambda s: s.search(TEXT, max_density=2), ConfigError, "a share from 0 to 1"),
    (lambda s: s.search(positives=["a"], negatives=["b"]), FeatureIndexError, "1 pair of prompts .* at least 5 pairs"),
    (lambda s: s.search(TEXT, by="size"), ConfigError, "by='size'"),
    (lambda s: s.search(negatives=["a"]), ConfigError, "give one of"),
    (lambda s: s.steer("a", {64: 1.0}), FeatureIndexError, "features 0 to 63"),
    (lambda s: s.steer("a", {64: 1.0}, values=True), SteeringError, "numbered 0 to 63"),
    (lambda s: s.index[64], FeatureIndexError, "features 0 to 63"), (lambda s: s.index[-1], FeatureIndexError, "0 to 63")])
def test_mistakes_are_one_line(s, call, error, message):
    with pytest.raises(error, match=message) as raised:
        call(s)
    assert "\n" not in str(raised.value)


def test_spliced_is_the_reconstruction_and_with_the_error_the_model(s):
    clean = s.lm(TEXT)
    tokens = s.lm.tokens(TEXT)[None]

    def tap(x):
        return jnp.concatenate([x[:, :1], s.sae(x)[:, 1:]], axis=1)

    with s.spliced():
        spliced = s.lm(TEXT)
    np.testing.assert_allclose(spliced, s.lm.model(tokens, taps={tiny.HOOKPOINT: tap})[0], atol=1e-4)
    assert np.abs(np.asarray(spliced - clean)).max() > 0.01
    with s.spliced(error=True):
        np.testing.assert_allclose(s.lm(TEXT), clean, atol=1e-4)
    np.testing.assert_array_equal(s.lm(TEXT), clean)


def test_the_top_of_each_token(s):
    acts = np.asarray(s.sae.encode(s.lm.capture(TEXT, tiny.HOOKPOINT)))
    found = s.top(acts, 3)
    for position in range(len(acts)):
        best = [row for row in found if row[0] == position]
        highest = np.sort(acts[position])[::-1][:3]
        np.testing.assert_allclose([row[2] for row in best], highest[highest > 0])
        for _, feature, value, share, tokens in best:
            assert share == pytest.approx(value / s.index.column("max")[feature]) and tokens == s.index.fires_on(feature)
    assert len(s.top(acts[1], 3)) == 3


def test_search_relative_to_the_maximum(s):
    found = s.search(TEXT, by="relative", max_density=1, n=64)
    acts = np.asarray(s.sae.encode(s.lm.capture(TEXT, tiny.HOOKPOINT)))[1:].max(0)
    relative = acts / s.index.column("max")
    np.testing.assert_allclose(found.column("score"), np.sort(relative[relative > 0])[::-1], rtol=0.03)
    assert found.column("feature") != s.search(TEXT, by="activation", max_density=1, n=64).column("feature")
    density = s.index.column("density")
    limit = float(np.median(density[found.column("feature")]))
    rare = [f for f in found.column("feature") if density[f] <= limit]
    assert s.search(TEXT, max_density=limit, n=64).column("feature") == rare


def test_steering_several_features_and_samples(s, alive):
    other = int(np.argsort(s.index.column("max"))[-2])
    both = s.steer("the", {alive: 9, other: -9}, tokens=6)
    assert both.column("change") == ["unsteered", f"{alive} at {9 * s.index.column('max')[alive]:.4g}, "
                                     f"{other} at {-9 * s.index.column('max')[other]:.4g}"]
    values = {alive: 9 * float(s.index.column("max")[alive]), other: -9 * float(s.index.column("max")[other])}
    assert s.steer("the", values, values=True, tokens=6).column("text") == both.column("text")
    drawn = [s.steer("the", {alive: 2}, samples=3, seed=seed, tokens=8).column("text") for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) > 1


def test_several_changes_beside_each_other(s, alive):
    texts = s.steer("the", [{alive: -5}, {alive: 5}, {}], tokens=6)
    assert texts.column("text")[0] == s.steer("the", tokens=6).column("text")[0]
    for row, scale in zip(texts.rows[1:], (-5, 5), strict=True):
        assert row == s.steer("the", {alive: scale}, tokens=6)[1]
    effects = s.next_tokens("the", [{alive: 0.5}, {alive: 20}], n=2)
    few, much = effects.column("KL")
    assert 0 <= few < much and effects[1][0] == f"{alive} at {20 * s.index.column('max')[alive]:.4g}"
    assert all(row[2].count("->") == row[3].count("->") == 2 for row in effects)
    assert s.next_tokens("the", {alive: 0.0}, values=True).columns == effects.columns


def _config(model_and_text, run_dir):
    model, text = model_and_text
    config = default_config("topk")
    own = {"lm.model": str(model), "text.source": (str(text),), "run_dir": str(run_dir)}
    config.update_from_flattened_dict(tiny.SETTINGS | own)
    return config


def test_from_a_config_to_an_index(model_and_text, tmp_path):
    """Trained, measured and indexed without the command; called again it is only opened."""
    mine = saejax.run(_config(model_and_text, tmp_path / "run"))
    lines = mine.metrics
    assert lines[-1]["tokens_seen"] == 2048 and mine.sae.cfg.d_sae == 64
    measured = saejax.evaluate(mine)
    assert measured["contexts"] == 8 and (tmp_path / "run/report.html").is_file()
    assert saejax.evaluate(tmp_path / "run", contexts=2)["contexts"] == 2
    assert "" == mine.search(TEXT).column("fires on")[0]
    index = mine.build_index(tokens=640)
    assert index is mine.index is mine.build_index(tokens=640) and mine.search(TEXT, max_density=1).column("fires on")[0] != ""
    assert saejax.run(_config(model_and_text, tmp_path / "run")).metrics == lines
    files = saejax.open(tmp_path / "run/release", mesh=None)
    alone = saejax.open(shutil.copytree(tmp_path / "run/release", tmp_path / "alone"), mesh=None)
    assert files.metrics == lines
    for wish, error in ((lambda: alone.metrics, ConfigError), (alone.build_index, FeatureIndexError)):
        with pytest.raises(error, match="is no run"):
            wish()


def test_a_sweep_is_a_list(model_and_text, tmp_path):
    config = _config(model_and_text, tmp_path / "sweep")
    config.sweep.product = ("sae.k=4,8",)
    assert [found.sae.cfg.k for found in saejax.run(config)] == [4, 8]


def test_a_table_as_pandas(s):
    found = s.search(TEXT, max_density=1)
    frame = found.to_pandas()
    assert list(frame.columns) == list(found.columns) and frame["feature"].tolist() == found.column("feature")


def test_a_feature_is_what_the_tables_say(s, alive):
    feature, row = s.index[alive], s.index.rows(alive, alive + 1)[0]
    assert (feature.fired, feature.density, feature.max) == (row["fired"], row["density"], row["max"])
    assert [text for text, _ in feature.tokens] == [s.index.token(t) for t in row["token_ids"]]
    assert [effect for _, effect in feature.promotes + feature.demotes] == row["logit_effects"]
    top = next(e for e in feature.examples if e.interval == 0)
    assert top.value == pytest.approx(feature.max, rel=1e-3) and top.acts.max() == pytest.approx(top.value, rel=0.02)
    assert len(top.texts) == len(top.acts) or len(top.texts) < s.index.window


def test_cards_are_escaped(s, alive, run):
    page = s.index[alive]._repr_html_()
    assert f"<b>Feature {alive}</b>" in page and "rgba(255, 140, 0" in page
    from saejax.pages.cards import Table
    hostile = "<script>alert(1)</script>"
    table = Table(("a",), [(hostile,)])._repr_html_()
    assert hostile not in table and "&lt;script&gt;" in table
    assert str(run) in s._repr_html_() and "features" in s._repr_html_()


def rows_of_card(page: str) -> dict[str, str]:
    return dict(re.findall(r"opacity: .7\">(.*?)</td><td style=\"text-align: left\">(.*?)</td>", page))


def test_an_sae_and_a_language_model_show_themselves(s, run, tmp_path):
    found = rows_of_card(s.sae._repr_html_())
    assert found.keys() == {"kind", "shape", "hookpoint", "model", "norm", "files"}
    assert (found["kind"], found["hookpoint"], found["files"]) == ("topk, k = 8", tiny.HOOKPOINT, str(run))
    assert found["shape"] == "64 features, 48 wide" and "of the training" in found["norm"]
    read = saejax.load(run / "release")
    assert rows_of_card(read._repr_html_()) == found | {"files": str(run / "release")}
    model = rows_of_card(s.lm._repr_html_())
    assert (model["layers"], model["width"], model["context"], model["dtype"]) == ("3", "48", "64 tokens", "float32")
    assert model["name"] == s.lm.name and "hook_resid_post" in model[""] and "hook_embed" in model["hookpoints"]
    cfg = dataclasses.replace(s.sae.cfg, model="<script>", hookpoints=("<b>",) * 5, d_in=240, layers=(48,) * 5)
    hostile = SAE(s.sae.params, cfg)
    assert hostile._repr_html_() is None, "made in Python: nobody draws it"
    hostile.card = read.card
    assert "<script>" not in hostile._repr_html_() and "&lt;b&gt; ... &lt;b&gt;" in hostile._repr_html_()


def test_cards_say_what_a_preset_is(s, tmp_path):
    said = "HuggingFaceTB/SmolLM2-135M-Instruct in 4 bits (GGUF Q4_1)"
    sae = SAE(s.sae.params, dataclasses.replace(s.sae.cfg, model="smollm2-135m"))
    sae.card, lm_ = s.sae.card, dataclasses.replace(s.lm, name="smollm2-135m")
    assert rows_of_card(sae._repr_html_())["model"] == said
    assert rows_of_card(lm_._repr_html_())["what it is"] == said and "what it is" not in rows_of_card(s.lm._repr_html_())
    assert rows_of_card(s._repr_html_())["language model"] == s.sae.cfg.model
    effects.write_steering(tmp_path / "steered.html", lm_, title="t", prompt=TEXT, settings=(), rows=())
    assert said in (tmp_path / "steered.html").read_text()


def test_long_names_fit_a_line(s):
    cfg = dataclasses.replace(s.sae.cfg, model="m" * 200, hookpoints=tuple(f"blocks.{n}.hook_resid_post" for n in range(12)),
                              d_in=12 * 48, layers=(48,) * 12)
    for one in (SAE(s.sae.params, cfg), dataclasses.replace(s.lm, name="/long" * 100)):
        assert len(repr(one)) <= 150 and "\n" not in repr(one)
    assert "blocks.0.hook_resid_post ... blocks.11.hook_resid_post" in repr(SAE(s.sae.params, cfg))


def test_two_dictionaries(s):
    """B is A in another order, with two features more, one of them a copy: shared, alone, split."""
    from saejax.features.compare.dictionaries import compare
    from saejax.sae.inference import SAEConfig
    order = np.random.default_rng(0).permutation(64)
    W = np.asarray(s.sae.params.W_dec)
    new = np.linalg.svd(W)[2][-1] if np.linalg.matrix_rank(W) < 48 else np.random.default_rng(1).standard_normal(48)
    rows = np.concatenate([W[order], W[order[:1]] + 0.05 * new / np.linalg.norm(new), new[None]]).astype(np.float32)
    params = s.sae.params.replace(W_enc=jnp.asarray(rows), b_enc=jnp.zeros(66), W_dec=jnp.asarray(rows))
    other = SAE(params, SAEConfig(**{**vars(s.sae.cfg), "d_sae": 66}))
    x = np.asarray(s.lm.capture(TEXT, tiny.HOOKPOINT))
    found = compare(s.sae, other, [x, x], progress=False)
    np.testing.assert_array_equal(found.match_A[order], np.arange(64))
    assert found.shares()["shared_A"] == 1 and found.shared.shape == (64, 2)
    assert found.split[int(order[0])] == [0, 64] and 65 in found.only_B and len(found.only_A) == 0
    same = compare(s.sae, s.sae, [x], progress=False)
    assert same.shares()["cosine"] == pytest.approx(1) and np.nanmin(same.firing.pair_A) == pytest.approx(1)
    with pytest.raises(FeatureIndexError, match="directions of two places"):
        compare(s.sae, SAE(params, SAEConfig(**{**vars(s.sae.cfg), "d_sae": 66, "hookpoints": ("blocks.0.hook_resid_post",)})))


def test_gradients_pass_through_a_spliced_sae(s):
    """With the error the value is the model's own, its derivative that of the reconstruction."""
    from saejax.features.effects import splicing
    tokens = jnp.asarray(s.lm.tokens(TEXT)[None])
    made = splicing.plan(s.lm, s.sae, error=True)

    def loss(scale):
        taps = made()
        change = taps[tiny.HOOKPOINT]
        return s.lm.model(tokens, taps={tiny.HOOKPOINT: lambda x, positions: change(scale * x, positions)})[0, -1, 5]

    value, slope = jax.value_and_grad(loss)(1.0)
    assert value == pytest.approx(float(s.lm(TEXT)[-1, 5]), abs=1e-4) and slope != 0
