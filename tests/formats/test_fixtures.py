"""Files that the peers themselves wrote, with what they compute from them: same support, and 1e-4 at most."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import saejax
from saejax.base import sharding
from saejax.base.errors import FormatError
from saejax.base.records import MeshOptions
from saejax.formats.convert import convert
from saejax.formats.loading import FORMATS, recognise
from saejax.sae import tensors
from saejax.sae.folding import fold_decoder_norms
from saejax.sae.inference import SAE
from tests.formats.building import check

ROOT = Path(__file__).parent / "fixtures"
FIXTURES = sorted(path.parent for path in ROOT.glob("*/*/io.npz"))


def name(path):
    return f"{path.parent.name}-{path.name}"


@pytest.fixture(scope="module", params=FIXTURES, ids=name)
def fixture(request):
    return request.param, saejax.load(request.param), dict(np.load(request.param / "io.npz"))


def test_agrees_with_the_peer(fixture):
    path, sae, io = fixture
    assert recognise(path) == path.parent.name == sae.cfg.metadata["source"]["format"]
    check(sae, io["x"], io["feature_acts"], io["x_hat"])


def test_each_device_reads_its_own_rows(fixture):
    path, one, io = fixture
    sae = saejax.load(path, mesh=sharding.make_mesh(MeshOptions(1, 8)))
    assert {s.data.shape[0] for s in sae.params.W_enc.addressable_shards} == {16}
    for parameter, value in tensors(one.params).items():
        if sae.cfg.metadata.get("folding") is None:
            np.testing.assert_array_equal(value, tensors(sae.params)[parameter])


@pytest.mark.parametrize("path", [ROOT / "saelens/standard__layer_norm", ROOT / "dictionary_learning/topk"], ids=name)
def test_same_values_on_a_mesh(path):
    io = np.load(path / "io.npz")
    check(saejax.load(path, mesh=sharding.make_mesh(MeshOptions(2, 4))), io["x"], io["feature_acts"], io["x_hat"])


def test_dictionary_learning_normalises_when_it_loads():
    path = ROOT / "dictionary_learning/standard"
    io = np.load(path / "io_normalised_on_load.npz")
    sae = saejax.load(path)
    check(SAE(fold_decoder_norms("relu", sae.params), sae.cfg), io["x"], io["feature_acts"], io["x_hat"])


def test_written_again_is_the_same(fixture, tmp_path):
    path, sae, _ = fixture
    out = tmp_path / path.name
    FORMATS[path.parent.name].write(out, sae)
    again = saejax.load(out)
    assert tensors(again.params).keys() == tensors(sae.params).keys()
    for parameter, value in tensors(sae.params).items():
        np.testing.assert_array_equal(value, tensors(again.params)[parameter])
    for key in ("kind", "d_in", "d_sae", "k", "pre_bias", "input_norm", "d_out", "skip", "model"):
        assert getattr(again.cfg, key) == getattr(sae.cfg, key)


REASONS = {
    "saelens": "no architecture",
    "sparsify": "cannot be written for sparsify",
    "gemma_scope": "cannot be written for Gemma Scope",
    "dictionary_learning": "cannot be written for dictionary_learning",
}
KINDS_OF = {
    "saelens": {"relu", "topk", "gated", "jumprelu"},
    "sparsify": {"topk"},
    "gemma_scope": {"relu", "jumprelu"},
    "dictionary_learning": {"relu", "topk", "gated", "jumprelu"},
}


def expressible(cfg, to):
    """What the layouts can say, from their description."""
    plain = cfg.d_out is None and cfg.input_norm == "none"
    if to == "saelens":
        return cfg.d_out is None or cfg.kind in ("relu", "jumprelu")
    if to == "dictionary_learning":
        return plain
    if cfg.kind not in KINDS_OF[to] or cfg.input_norm != "none":
        return False
    return not cfg.skip and (to != "gemma_scope" or cfg.d_out is None) or to == "sparsify"


@pytest.mark.slow
@pytest.mark.parametrize("to", REASONS)
def test_every_pair_is_the_same_function_or_refused(fixture, to, tmp_path):
    path, sae, io = fixture
    if expressible(sae.cfg, to):
        convert(path, tmp_path / "out", to)
        check(saejax.load(tmp_path / "out", format=to), io["x"], io["feature_acts"], io["x_hat"])
    else:
        with pytest.raises(FormatError, match=f"{REASONS[to]}|a transcoder is told"):
            convert(path, tmp_path / "out", to)
        assert not (tmp_path / "out").exists()


def test_two_formats_in_one_folder(tmp_path):
    shutil.copytree(ROOT / "saelens/standard", tmp_path / "both")
    shutil.copy(ROOT / "sparsify/topk/sae.safetensors", tmp_path / "both")
    with pytest.raises(FormatError, match="holds files of saelens and of sparsify; say which with format="):
        saejax.load(tmp_path / "both")
    assert saejax.load(tmp_path / "both", format="saelens").cfg.kind == "relu"
    with pytest.raises(FormatError, match="format='nope' is not one of auto, run"):
        saejax.load(tmp_path / "both", format="nope")


def test_says_what_was_looked_for(tmp_path):
    with pytest.raises(FormatError) as error:
        saejax.load(tmp_path)
    for known in FORMATS.values():
        assert known.needs in str(error.value)


@pytest.mark.parametrize("format", ["auto", "saelens"])
def test_a_folder_of_many(tmp_path, format):
    """Ten of them are named, in the order of their numbers; not what lies inside one of them, or in a folder without any."""
    for n in range(12):
        shutil.copytree(ROOT / "saelens" / "topk", tmp_path / f"layer_{n}" / "width_16k")
    (tmp_path / "layer_0" / "width_16k" / "inside").mkdir()
    (tmp_path / "notes").mkdir()
    with pytest.raises(FormatError) as error:
        saejax.load(tmp_path, format=format)
    names = ", ".join(f"layer_{n}/width_16k" for n in range(10))
    assert str(error.value) == (f"{tmp_path}: no SAE itself, but it holds 12 in folders of their own; give {tmp_path}/ and "
                                f"one of {names} and 2 more")
