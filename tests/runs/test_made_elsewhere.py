"""A run on activations made elsewhere: trained, measured, released; what needs a model, a text or token ids says so in a line."""

import json

import numpy as np
import pytest

import saejax
from saejax.cli.main import main
from saejax.formats.keys import read_small_json
from tests import tiny_experiment as tiny

ROWS, CONTEXT = 1000, 32


@pytest.fixture(scope="module")
def made(model_and_text, tmp_path_factory):
    """(folder, run without token ids, run with them): `saejax train` on rows of nobody knows what model."""
    folder = tmp_path_factory.mktemp("elsewhere")
    rng, runs = np.random.default_rng(0), []
    np.save(folder / "acts.npy", rng.standard_normal((ROWS, tiny.D_IN)).astype(np.float32))
    for name, ids in (("bare", None), ("ids", rng.integers(3, 20, ROWS))):
        saejax.store_of({tiny.HOOKPOINT: folder / "acts.npy"}, folder / f"{name}_store", context=CONTEXT, tokens=ids)
        more = f"c.lm.model, c.harvest.store = 'unknown', {str(folder / f'{name}_store')!r}"
        config = tiny.write_config(folder / f"{name}.py", *model_and_text, folder / name, more)
        assert main(["train", f"--config={config}"]) == 0
        runs.append(folder / name)
    return folder, *runs


def refused(capsys, *command) -> str:
    """What a command says that ends with exit code 2, in one line."""
    capsys.readouterr()
    assert main([str(word) for word in command]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_reconstruction_is_measured_on_its_rows_and_released(made, capsys):
    folder, run, _ = made
    assert main(["eval", str(run), "--json"]) == 0
    said = capsys.readouterr()
    [found] = json.loads(said.out)
    assert "measured on rows of the training store, nothing is spliced; for held-out text give a model and a text" in said.err
    assert (found["measured_on"], found["model"]) == ("rows of the training store", "unknown") and "ce_recovered" not in found
    assert (found["contexts"], found["tokens"]) == (8, 8 * CONTEXT - 24)  # the last one is 8 rows and 24 that fill it up
    x = np.load(folder / "acts.npy")
    chosen = np.concatenate([np.arange(c * CONTEXT, min((c + 1) * CONTEXT, ROWS)) for c in np.linspace(0, 31, 8).astype(int)])
    sae = saejax.load(run)
    errors, centred = np.asarray(sae.reconstruct(x[chosen])[0]) - x[chosen], x[chosen] - x[chosen].mean(0)
    assert abs(found["fvu"] - np.square(errors).sum() / np.square(centred).sum()) < 0.01
    assert main(["eval", str(run)]) == 0
    assert "rows of the training store" in (out := capsys.readouterr().out) and "CE" not in out
    assert main(["release", str(run)]) == 0
    assert "measured on rows of the training store" in (run / "release" / "README.md").read_text()
    written = read_small_json(run / "release" / "cfg.json")["metadata"]
    assert written["model_name"] == "unknown" and written["saejax"]["text"] == {"context": CONTEXT}  # not the config's text


def test_what_needs_a_model_a_text_or_token_ids_says_so(made, model_and_text, capsys):
    _, bare, ids = made
    model, text = model_and_text
    for run in (bare, ids):
        assert "do not say which model it is for; give model=NAME" in refused(capsys, "features", run)
        assert "do not say what text it is for; give text=SOURCES" in refused(capsys, "eval", run, f"--model={model}")
        assert "which model it is for and what text it is for" in refused(capsys, "neurons", run)
    assert "holds no token ids, and features are shown on tokens" in refused(capsys, "features", bare, f"--model={model}")
    assert "there is nothing to harvest" in refused(capsys, "run", f"--config={bare.with_suffix('.py')}")


def test_with_token_ids_and_a_model_features_work(made, model_and_text, capsys):
    _, _, run = made
    model, text = model_and_text
    assert main(["features", str(run), f"--model={model}"]) == 0
    subject = saejax.open(run, model=str(model))
    assert len(subject.index.tokens_NT) == 32 and subject.index.keep_NT.sum() == ROWS
    feature = int(np.flatnonzero(subject.index.column("fired"))[0])
    assert repr(subject.index[feature])
    capsys.readouterr()
    assert main(["eval", str(run), f"--model={model}", f"--text={text}", "--json"]) == 0
    assert "ce_recovered" in json.loads(capsys.readouterr().out)[0]


def test_fewer_rows_than_a_batch(made, capsys):
    _, run, _ = made
    said = refused(capsys, "train", f"--config={run.with_suffix('.py')}", "--config.train.batch=1024",
                   f"--config.run_dir={run}_2")
    assert "config.train.batch is 1024 rows, the store has 1000 that are not masked" in said


def test_concepts_need_the_text_that_it_was_trained_on(made, tmp_path, capsys):
    assert "made elsewhere, and the run does not know of which text" in refused(
        capsys, "concepts", made[2], f"--out={tmp_path / 'out'}")
