"""What a path or a name stands for: every form of an SAE gives the same figures, and every part is opened once."""

import dataclasses
import json
import shutil
import time

import jax.numpy as jnp
import numpy as np
import pytest

import saejax
from saejax.base.errors import ConfigError, FeatureIndexError, FormatError, HookpointError, LMError, SaejaxError
from saejax.cli.main import main
from saejax.data.text import Text
from saejax.features.effects.prompting import encoded
from saejax.features.index.build import BuildOptions, build
from saejax.features.index.reader import EXAMPLES, FEATURES, FeatureIndex
from saejax.features.search.prompt import activations, by_prompt
from saejax.formats.convert import convert
from saejax.lm import capture
from saejax.runs.evaluation import evaluated
from saejax.runs.layout import saved_config
from saejax.sae.inference import SAE
from tests import tiny_experiment as tiny


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    """A copy of a finished run, with its index."""
    copy = tmp_path_factory.mktemp("subject") / "run"
    shutil.copytree(finished[1], copy)
    assert main(["features", str(copy)]) == 0
    return copy


@pytest.fixture(scope="module")
def forms(run, tmp_path_factory):
    """{format: directory} of the run's SAE with one threshold a feature, which all of these can express, and with k."""
    folder = tmp_path_factory.mktemp("forms")
    assert main(["release", str(run), "--jumprelu", f"--out={folder / 'saelens'}"]) == 0
    for name in ("gemma_scope", "dictionary_learning"):
        convert(str(folder / "saelens"), folder / name, name)
    convert(str(run), folder / "layers.1", "sparsify")
    return {"saelens": folder / "saelens", "gemma_scope": folder / "gemma_scope", "dictionary_learning":
            folder / "dictionary_learning", "sparsify": folder / "layers.1"}


def opened(run, path, model_and_text, **more):
    """A subject of foreign files, with what they do not say."""
    config = saved_config(run)
    given = {"model": str(model_and_text[0]), "hookpoint": tiny.HOOKPOINT, "text": Text.of(config), "store": run / "store"}
    return saejax.open(path, **given | more)


def indexed(subject, out):
    return build(out, subject.sae, subject.corpus(), subject.lm, BuildOptions(progress=False))


def same(a: dict, b: dict) -> None:
    """Evaluations but for what they say of themselves."""
    for key in a.keys() - {"hookpoint", "density_histogram", "model"}:
        assert a[key] == b[key] if not isinstance(a[key], float) else a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("name", ["gemma_scope", pytest.param("dictionary_learning", marks=pytest.mark.slow), "sparsify"])
def test_files_of_other_libraries_give_what_the_run_gives(run, forms, model_and_text, tmp_path, name):
    reference = saejax.open(run) if name == "sparsify" else opened(run, forms["saelens"], model_and_text)
    theirs = opened(run, forms[name], model_and_text, hookpoint=None if name == "sparsify" else tiny.HOOKPOINT)
    assert theirs.sae.cfg.hookpoints == (tiny.HOOKPOINT,) and theirs.config is None
    a, b = indexed(reference, tmp_path / "a"), indexed(theirs, tmp_path / "b")
    np.testing.assert_array_equal(a.column("fired"), b.column("fired"))
    np.testing.assert_allclose(a.column("max"), b.column("max"), rtol=1e-4)
    for x, y in zip(a.examples(0, 64), b.examples(0, 64), strict=True):
        assert [x[key] for key in ("feature", "interval", "context", "position")] == [y[key] for key in (
            "feature", "interval", "context", "position")]
        np.testing.assert_allclose(x["acts"], y["acts"], rtol=1e-3, atol=1e-4)
    assert a.lists("token_ids") == b.lists("token_ids")
    found = [[(f.feature, f.why) for f in by_prompt(s.lm, s.sae, "the cat")] for s in (reference, theirs)]
    assert found[0] == found[1] and found[0]
    contexts = saved_config(run).eval.contexts
    same(evaluated(reference, contexts), evaluated(theirs, contexts))


def test_a_release_in_its_run_has_the_index_of_the_run(run, forms, tmp_path, capsys):
    subject = saejax.open(run / "release")
    assert subject.index.path == run / "features" and subject.config.name == "tiny" and not subject.trained_here
    assert main(["search", "text", str(run / "release"), "a", "--json"]) == 0
    inside = json.loads(capsys.readouterr().out)
    assert main(["search", "text", str(run), "a", "--json"]) == 0 and json.loads(capsys.readouterr().out) == inside
    shutil.copytree(run / "release", tmp_path / "alone")
    assert main(["search", "text", str(tmp_path / "alone"), "a"]) == 2 and "give index=DIR" in capsys.readouterr().err
    assert main(["search", "text", str(tmp_path / "alone"), "a", f"--index={run / 'features'}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == inside


def test_commands_on_files(run, forms, model_and_text, tmp_path, capsys):
    """From the index to the page, with what the files do not say as options; a second --rebuild begins anew."""
    where = [f"--model={model_and_text[0]}", "--hookpoint=model.layers.1", f"--text={model_and_text[1]}", "--context=32"]
    source, index = str(forms["gemma_scope"]), tmp_path / "index"
    assert main(["features", source, *where, f"--out={index}", "--tokens=2048", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["alive"] > 0 and FeatureIndex.open(index, full=True).manifest["sae"]["hookpoints"] == [tiny.HOOKPOINT]
    assert main(["features", source, *where, f"--out={index}", "--tokens=1024"]) == 2
    assert "build it anew" in capsys.readouterr().err
    assert main(["features", source, *where, f"--out={index}", "--tokens=1024", "--rebuild", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 1024
    assert main(["dashboard", source, f"--index={index}"]) == 0 and (tmp_path / "dashboard" / "index.html").is_file()
    capsys.readouterr()
    named = where[:2]  # no text is read from here on
    assert main(["search", "prompt", source, "the cat", *where, f"--index={index}"]) == 2
    assert "unknown option --text" in capsys.readouterr().err
    assert main(["search", "prompt", source, "the cat", "--max-density=1", *named, f"--index={index}"]) == 0
    assert "fires on: " in capsys.readouterr().out
    alive = int(FeatureIndex.open(index).column("max").argmax())
    steered = ["steer", source, *named, f"--index={index}", "--prompt=the cat", f"--feature={alive}", "--tokens=4"]
    assert main([*steered, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 3
    attributed = ["attribute", source, *named, f"--index={index}", "--prompt=the cat", "--token=a", "--ablate=random:3"]
    assert main([*attributed, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["agreement"]["pairs"] == 3
    judged = ["judge", source, *where, f"--index={index}", f"--judge=csv:{tmp_path / 'sheets'}", f"--features={alive}"]
    assert main([*judged, "--do=explain"]) == 0 and (tmp_path / "sheets" / "round_1.html").is_file()
    capsys.readouterr()
    assert main(["neurons", source, *where, "--tokens=640", f"--out={tmp_path / 'neurons'}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["features"] >= 0
    assert main(["eval", source, *where, "--contexts=4", "--json"]) == 0
    [figures] = json.loads(capsys.readouterr().out)
    assert figures["sae"] == source and figures["contexts"] == 4 and 0 < figures["explained_variance"] < 1


@pytest.fixture
def counted(monkeypatch):
    """How often a checkpoint was restored, a language model loaded, an index opened."""
    from saejax import lm
    from saejax.formats import loading
    from saejax.runs.subject import forget_language_model
    forget_language_model()
    counts = {"restored": 0, "loaded": 0, "opened": 0}

    def counting(what, function):
        def called(*arguments, **more):
            counts[what] += 1
            return function(*arguments, **more)
        return called

    monkeypatch.setattr(loading, "restore_params", counting("restored", loading.restore_params))
    monkeypatch.setattr(lm, "load", counting("loaded", lm.load))
    monkeypatch.setattr(FeatureIndex, "__init__", counting("opened", FeatureIndex.__init__))
    yield counts
    forget_language_model()


@pytest.mark.parametrize("command, expected", [
    (["search", "prompt", "RUN", "the cat"], (1, 1, 1)), (["search", "text", "RUN", "a"], (1, 0, 1)),
    (["features", "RUN"], (1, 1, 1)), (["dashboard", "RUN"], (1, 0, 1)), (["eval", "RUN"], (1, 0, 0)),
    (["eval", "RUN", "--contexts=3"], (1, 1, 0)), (["release", "RUN"], (1, 0, 0)),
    (["steer", "RUN", "--prompt=a", "--feature=ALIVE", "--tokens=2"], (1, 1, 1)),
    (["attribute", "RUN", "--prompt=the cat", "--token=a", "--ablate=top:2"], (1, 1, 1)),
    (["neurons", "RUN", "--tokens=320"], (1, 1, 0)), (["run", "RUN"], (1, 0, 0))])
def test_every_part_is_opened_once(run, counted, command, expected, capsys):
    alive = str(int(FeatureIndex.open(run / "features").column("max").argmax()))
    counted["opened"] = 0
    assert main([part.replace("RUN", str(run)).replace("ALIVE", alive) for part in command]) == 0
    assert tuple(counted.values()) == expected


def test_an_index_is_checked_as_it_is_read(run, tmp_path):
    """One flipped bit in any file, at the beginning, in the middle and at the end."""
    for name in (FEATURES, EXAMPLES, "vocabulary.parquet", "tokens.npy", "keep.npy"):
        for place in (8, 0.5, -1):
            copy = tmp_path / f"{name}{place}"
            shutil.copytree(run / "features", copy)
            data = bytearray((copy / name).read_bytes())
            data[int(len(data) * place) if isinstance(place, float) else place] ^= 4
            (copy / name).write_bytes(data)
            with pytest.raises(FeatureIndexError, match=f"{name}: altered"):
                index = FeatureIndex.open(copy)
                index.rows(0, 64), index.examples(0, 64), index.vocabulary, index.tokens_NT, index.column("max")


def test_an_altered_index_is_found_in_its_run(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "features" / FEATURES
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert main(["inspect", str(tmp_path / "run")]) == 2 and f"BAD  {file}" in capsys.readouterr().out


@pytest.mark.parametrize("given, error, message", [
    ({"hookpoint": "blocks.1.mlp.hook_post"}, FormatError, "48 wide at blocks.1.mlp.hook_post, which 80 is in model"),
    ({"hookpoint": "blocks.9.hook_resid_post"}, HookpointError, "use blocks.0 to blocks"),
    ({"hookpoint": "encoder.3"}, HookpointError, "encoder.3"), ({"model": None}, ConfigError, "give model=NAME"),
    ({"hookpoint": None}, ConfigError, "give hookpoint=NAME"),
    ({"hookpoint": None, "model": None}, ConfigError, "model=NAME and hook"),
    ({"text": None}, ConfigError, "give text=SOURCES"), ({"index": "INDEX"}, FeatureIndexError, "another checkpoint")])
def test_what_is_missing_or_does_not_fit(run, forms, model_and_text, given, error, message):
    given = {key: run / "features" if value == "INDEX" else value for key, value in given.items()}
    with pytest.raises(error, match=message):
        subject = opened(run, forms["gemma_scope"], model_and_text, **given)
        subject.lm, subject.text, subject.index  # noqa: B018


@pytest.mark.parametrize("job, more, options", [
    ("features", [], ["model", "hookpoint", "text", "out"]), ("features", ["--out=OUT", "--model=m"], ["hookpoint", "text"]),
    ("features", ["--out=OUT", "--store=STORE"], ["model", "hookpoint"]), ("eval", [], ["model", "hookpoint", "text"]),
    ("eval", ["--text=x", "--hookpoint=layers.1"], ["model"]), ("neurons", ["--model=m"], ["hookpoint", "text", "out"]),
    ("steer", ["--prompt=a", "--feature=1"], ["model", "hookpoint", "index"]), ("steer", ["--prompt=a", "--feature=1", "--max=2"],
    ["model", "hookpoint"]), ("attribute", ["--prompt=a", "--token=b"], ["model", "hookpoint"]),
    ("judge", ["--judge=csv:OUT", "--features=1"], ["model", "hookpoint", "text", "index"])])
def test_all_that_is_missing_is_named_at_once(run, forms, tmp_path, capsys, job, more, options):
    more = [option.replace("STORE", str(run / "store")).replace("OUT", str(tmp_path / "out")) for option in more]
    capsys.readouterr()
    assert main([job, str(forms["gemma_scope"]), *more]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{forms['gemma_scope']}: its files do not say " in said
    asked = said.split("; give ")[1]
    assert [name for name in ("model", "hookpoint", "text", "index", "out") if f"{name}=" in asked] == options
    assert not (tmp_path / "out").exists()


def test_another_model_than_the_named_one_is_said(run, model_and_text, tmp_path, capsys):
    shutil.copytree(model_and_text[0], tmp_path / "another")
    assert saejax.open(run, model=str(tmp_path / "another")).lm.name == "another"
    assert "made for" in (err := capsys.readouterr().err) and "used with another" in err


def test_paths_that_are_nothing(run, forms, model_and_text, tmp_path, monkeypatch):
    """One line each, and none of them asks the network."""
    clock = time.monotonic()
    shutil.copytree(forms["sparsify"], tmp_path / "two")
    shutil.copy(forms["gemma_scope"] / "params.npz", tmp_path / "two")
    (tmp_path / "many").mkdir()
    for name in ("layers.10", "layers.2"):
        shutil.copytree(forms["sparsify"], tmp_path / "many" / name)
    for path, error, message in ((tmp_path / "two", FormatError, "sparsify and of gemma_scope; say which with format="),
                                 (tmp_path / "many", FormatError, "holds 2 in folders of their own; give .*many/ and one of "
                                  "layers.2, layers.10$"),
                                 (f"{run}x", FormatError, "does not exist"), ("runs/no_such", FormatError, "does not exist")):
        with pytest.raises(error, match=message) as raised:
            saejax.open(path).sae  # noqa: B018
        assert "\n" not in str(raised.value)
    assert saejax.open(tmp_path / "two", format="sparsify").sae.cfg.k == 8
    monkeypatch.chdir(model_and_text[0].parent.parent)
    with pytest.raises(LMError, match="no such file or directory in .*; did you mean .*/model"):
        saejax.open(run, model=f"{model_and_text[0].parent.name}/modle").lm  # noqa: B018
    assert time.monotonic() - clock < 20


def test_a_place_on_the_hub_without_the_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    subject, clock = saejax.open("nobody/nothing:layer_1"), time.monotonic()
    with pytest.raises(SaejaxError, match="could not be fetched"):
        subject.sae  # noqa: B018
    assert time.monotonic() - clock < 10 and repr(subject) == "Subject('nobody/nothing:layer_1')"


def test_rows_normalised_one_by_one_go_through_the_encoder_of_the_sae(run, tmp_path):
    """Index, search and evaluation have the activations of `SAE.encode`."""
    subject = saejax.open(run)
    sae = SAE(subject.sae.params, dataclasses.replace(subject.sae.cfg, input_norm="layer_norm"), subject.sae.mesh)
    index = build(tmp_path / "index", sae, subject.corpus(tokens=2048), subject.lm, BuildOptions(progress=False))
    rows = subject.store.read(tiny.HOOKPOINT, 0, 2048)[subject.store.keep(0, 2048)].astype(np.float32)
    np.testing.assert_allclose(index.column("max"), np.asarray(sae.encode(rows)).max(0), rtol=1e-3)
    assert not np.allclose(index.column("max"), np.asarray(subject.sae.encode(rows)).max(0), rtol=0.01)
    tokens_T = encoded(subject.lm, "the cat")
    x = capture(subject.lm.model, tokens_T[None], [tiny.HOOKPOINT])[tiny.HOOKPOINT][0].astype(jnp.bfloat16)
    expected = np.where(np.arange(len(tokens_T))[:, None] == 0, 0, np.asarray(sae.encode(x)))
    np.testing.assert_allclose(activations(subject.lm, sae, tokens_T), expected, rtol=0.02, atol=1e-3)
