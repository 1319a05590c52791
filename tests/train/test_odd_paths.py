"""No name of a directory makes a checkpoint unreadable: libraries take some characters for patterns or parts of an address."""

import shutil
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

import saejax
from saejax.base.fingerprints import fingerprints
from saejax.base.storage import plain_path
from saejax.train import loop
from saejax.train.checkpoint import Checkpoints, read_meta, restore_step
from saejax.train.state import abstract_state
from tests.train.synthetic import make_config, make_store

ODD = ["a[b]", "[", "]", "a\\b", "*", "?", "**", "100%", "%41", "#1", "a b", " a", "a:b", "gs:", "~", "$HOME", "'\"", "a\nb",
       "é漢😀", "{0}", "-x", "a&b;c", "ocdbt.process_0", ".hidden", b"\xff\xfe".decode("utf-8", "surrogateescape")]
ANY = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=40)
NAMES = st.one_of(st.sampled_from(ODD), ANY.filter(lambda name: name not in (".", "..")))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(config, end of a run, its directory)"""
    folder = tmp_path_factory.mktemp("odd")
    config = make_config("batchtopk", folder / "run", train__tokens=32 * 4)
    return config, loop.train(config, make_store(folder / "store")), folder / "run"


def check(trained, folder: Path) -> None:
    """A checkpoint written below `folder` is read there, and a run that is brought there too."""
    config, end, run = trained
    checkpoints, meta = Checkpoints(folder / "checkpoints"), read_meta(run / "checkpoints" / str(end.step))
    with jax.set_mesh(end.mesh):
        checkpoints.save(7, end.state, end.spec, meta.data, meta.counters)
        checkpoints.wait()
        assert checkpoints.steps() == [7]
        checkpoints.close()
        state, _ = restore_step(folder / "checkpoints/7", abstract_state(config, end.spec, end.mesh))
    assert fingerprints(state) == fingerprints(end.state)
    shutil.copytree(run, folder / "run")
    x = np.random.default_rng(0).standard_normal((3, end.spec.d_in)).astype(np.float32)
    loaded = saejax.load(folder / "run")
    np.testing.assert_array_equal(loaded.encode(x), saejax.load(run).encode(x))
    loaded.save(folder / "release")
    np.testing.assert_array_equal(saejax.load(folder / "release").encode(x), loaded.encode(x))


@pytest.mark.parametrize("name", ["a [b]\\ü\n%41", pytest.param(None, marks=pytest.mark.slow)])
def test_checkpoints_and_releases_below_any_name(trained, tmp_path_factory, name):
    def below(name):
        if len(name.encode(errors="surrogateescape")) <= 200:
            check(trained, tmp_path_factory.mktemp("below") / name)

    if name is not None:
        below(name)
        return
    hypothesis.given(NAMES)(hypothesis.settings(max_examples=40, deadline=None)(below))()


@hypothesis.given(NAMES)
@hypothesis.settings(deadline=None)
def test_a_plain_path_leads_to_the_same_place(name):
    with plain_path(Path("/tmp") / name) as place:
        assert place.name == "link" or str(place) == f"/tmp/{name}"
        assert place == Path("/tmp") / name or place.readlink() == Path("/tmp") / name
    assert not place.is_symlink()

