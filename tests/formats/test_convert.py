"""`saejax convert`: the command, what it refuses, and the approximate way."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import saejax
from saejax.base.errors import FormatError
from saejax.cli.main import main
from saejax.formats.convert import Agreement, agreement, convert
from tests.formats.building import check

ROOT = Path(__file__).parent / "fixtures"


def test_command(tmp_path, capsys):
    source = ROOT / "saelens" / "jumprelu"
    assert main(["convert", str(source), str(tmp_path / "out"), "--to=dictionary_learning"]) == 0
    said = capsys.readouterr()
    assert "dictionary_learning, SAE(jumprelu" in said.out and "0 other features active" in said.out
    assert f"{source}: saelens, SAE(jumprelu" in said.err
    io = np.load(source / "io.npz")
    check(saejax.load(tmp_path / "out"), io["x"], io["feature_acts"], io["x_hat"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give --to=FORMAT"),
        (["x", "--to=saelens"], "give SRC DST --to=FORMAT"),
        (["x", "y", "--to=saelens"], "x: does not exist"),
        (["x", "y", "--to=zarr"], "choose one of saelens, sparsify"),
        (["x", "y", "--to=gemma_scope", "--approximate"], "--approximate and --rows=FILE.npy go together"),
        (["x", "y", "--to=gemma_scope", "--approximate", "--rows=none.npy"], "--rows=none.npy: not a readable .npy file"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert main(["convert", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_directory_that_is_not_empty(tmp_path):
    shutil.copytree(ROOT / "sparsify" / "topk", tmp_path / "out")
    with pytest.raises(FormatError, match="is not empty"):
        convert(ROOT / "saelens" / "topk", tmp_path / "out", "saelens")


def test_topk_with_a_threshold(tmp_path):
    source = ROOT / "saelens" / "topk"
    rows = np.load(source / "io.npz")["x"]
    cfg, said = convert(source, tmp_path / "out", "gemma_scope", rows)
    sae = saejax.load(tmp_path / "out")
    acts = np.asarray(sae.encode(rows))
    assert cfg.kind == sae.cfg.kind == "jumprelu" and (acts > 0).sum() == 8 * len(rows)
    exact = np.asarray(saejax.load(source).encode(rows))
    changed = ((acts > 0) != (exact > 0)).sum() / (exact > 0).sum()
    assert f"mean L0 8.00, {100 * changed:.1f} % of the active features differ" in said
    with pytest.raises(FormatError, match="with one threshold .approximate"):
        convert(source, tmp_path / "other", "gemma_scope")
    with pytest.raises(FormatError, match="expected numbers"):
        convert(source, tmp_path / "other", "gemma_scope", rows[:, :-1])
    with pytest.raises(FormatError, match="rows: only a topk SAE for Gemma Scope is approximated"):
        convert(source, tmp_path / "other", "saelens", rows)


def test_agreement_sees_a_difference():
    one, other = saejax.load(ROOT / "saelens" / "standard"), saejax.load(ROOT / "saelens" / "jumprelu")
    x = np.load(ROOT / "saelens" / "standard" / "io.npz")["x"]
    assert agreement(one, one, x) == Agreement(len(x), 0.0, 0.0, 0) and agreement(one, one, x).good
    assert not agreement(one, other, x).good and agreement(one, other, x).other_features > 0


def test_gemma_scope_tells_shapes_by_place(tmp_path):
    with pytest.raises(FormatError, match="with 'transcoder' in its name"):
        convert(ROOT / "saelens" / "transcoder", tmp_path / "out", "gemma_scope")
    written, _ = convert(ROOT / "saelens" / "transcoder", tmp_path / "transcoder", "gemma_scope")
    assert written.d_out == 24
