"""Stores, runs, indices, dashboards, releases and exports below any name of a directory: libraries take some characters for
patterns or parts of an address. Checkpoints alone: tests/train/test_odd_paths.py.
"""

import shutil

import hypothesis
import numpy as np
import pytest

import saejax
from saejax.cli.main import main
from saejax.features.index.reader import FeatureIndex
from tests import tiny_experiment as tiny
from tests.train.test_odd_paths import NAMES


@pytest.fixture(scope="module")
def plain(model_and_text, tmp_path_factory):
    """What the jobs write below a plain name, and where."""
    folder = tmp_path_factory.mktemp("plain")
    return results(model_and_text, folder)


def results(model_and_text, folder) -> dict:
    """All jobs, each with its own directory below `folder`: what is read back from there."""
    folder.mkdir(exist_ok=True)
    run, index, page, theirs = (str(folder / name) for name in ("run", "index", "page", "theirs"))
    elsewhere = f"c.harvest.store = {str(folder / 'store')!r}"
    config = tiny.write_config(folder / "config.py", *model_and_text, folder / "run", elsewhere)
    for words in (["run", f"--config={config}"], ["features", run, f"--out={index}", "--export=neuronpedia"],
                  ["dashboard", run, f"--index={index}", f"--out={page}"], ["eval", run, f"--out={folder / 'figures'}"],
                  ["convert", run, theirs, "--to=sparsify"], ["inspect", run], ["inspect", index], ["inspect", theirs],
                  ["steer", run, "--prompt=abc", "--feature=1", "--max=1", f"--html={folder / 'steer.html'}"],
                  ["features", theirs, f"--model={model_and_text[0]}", f"--text={model_and_text[1]}", "--tokens=1000",
                   "--hookpoint=blocks.1.hook_resid_post", f"--out={folder / 'of_theirs'}"]):
        assert main(words) == 0, words
    x = np.random.default_rng(0).standard_normal((3, 48)).astype(np.float32)
    exported = sorted(p.relative_to(index).as_posix() for p in (folder / "index/neuronpedia").rglob("*.json*"))
    return {"fires": FeatureIndex.open(folder / "index", full=True).column("fired").tolist(), "exported": exported,
            "page": len(list((folder / "page").rglob("*"))), "figures": sorted(p.name for p in (folder / "figures").rglob("*")),
            "codes": [saejax.load(where).encode(x).tolist() for where in (run, theirs)],
            "of_theirs": FeatureIndex.open(folder / "of_theirs").column("max").tolist()}


@pytest.mark.slow
def test_all_jobs_below_any_name(model_and_text, plain, tmp_path_factory):
    @hypothesis.given(NAMES)
    @hypothesis.settings(max_examples=5, deadline=None)
    @hypothesis.example("a [b]\\ü:\n%41")
    def below(name):
        if len(name.encode(errors="surrogateescape")) > 200:
            return
        folder = tmp_path_factory.mktemp("below")
        assert results(model_and_text, folder / name) == plain
        shutil.rmtree(folder)

    below()
