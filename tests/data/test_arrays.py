"""Activations made elsewhere: every row of the arrays is in the store as it was, and what does not fit is one line."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

import saejax
from saejax import lm
from saejax.base.errors import HookpointError, NonFiniteError, SaejaxError, StoreError
from saejax.base.records import UNKNOWN
from saejax.config import StreamOptions
from saejax.data.arrays import store_of
from saejax.data.harvest import harvest
from saejax.data.store import Store, check_matches
from saejax.data.stream import Stream
from saejax.data.verify import verify
from tests.data.making import bits, tiny_config, tiny_model

HOOK, WIDE = "blocks.0.hook_resid_post", 48


def rows_of(n: int, width: int = WIDE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)


def stored(x: np.ndarray) -> np.ndarray:
    return bits(x.reshape(-1, x.shape[-1]).astype(ml_dtypes.bfloat16))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return lm.load(str(tiny_model(tmp_path_factory.mktemp("tiny") / "model")))


def test_files_and_arrays_of_several_hookpoints(tmp_path, monkeypatch):
    """Files one behind the other are what one array is; several shards; the last context is filled up with masked rows."""
    monkeypatch.setattr("saejax.data.arrays._SHARD_ROWS", 256)
    monkeypatch.setattr("saejax.data.arrays._PIECE", 100)
    x, y = rows_of(1000), rows_of(1000, 12, seed=1).astype(np.float16)
    files = []
    for i, part in enumerate(np.split(x, [1, 700])):
        files.append(tmp_path / f"{i}.npy")
        np.save(files[-1], part)
    a = saejax.store_of({HOOK: files, "b": y}, tmp_path / "a", context=16)
    b = store_of({HOOK: x.astype(np.float64), "b": [y[:3], y[3:]]}, tmp_path / "b", context=16)
    for store in (a, b):
        assert (store.rows, store.kept_rows, store.has_tokens, store.n_shards) == (1008, 1000, False, 4)
        for name, values in ((HOOK, x), ("b", y)):
            assert np.array_equal(bits(store.read(name, 0, 1000)), stored(values))
        assert np.array_equal(store.keep(0, 1008), np.arange(1008) < 1000)
    assert (a.spec.model, a.spec.model_digest, a.spec.tokenizer_digest, a.spec.lm_dtype) == (UNKNOWN,) * 4
    assert a.spec.text["sources"] == ["0.npy", "1.npy", "2.npy"] and str(tmp_path) not in (a.path / "manifest.json").read_text()
    verify(Store.open(a.path))
    with Stream(a, (HOOK,), 125, StreamOptions(block_contexts=2, window_rows=128), 0) as stream:
        seen = np.concatenate([bits(next(stream)).copy() for _ in range(8)])
    assert sorted(map(bytes, seen)) == sorted(map(bytes, stored(x))) and not np.array_equal(seen, stored(x))


@pytest.mark.parametrize("flat", [False, True])
def test_token_ids_and_a_loaded_model(tmp_path, tiny, flat):
    """Its digests are kept and its special tokens are masked; so is the first of a row, where rows are known."""
    x, ids = rows_of(320), np.random.default_rng(0).integers(0, 9, (20, 16))
    given = (x, ids.ravel()) if flat else (x.reshape(20, 16, WIDE), ids)
    store = store_of({HOOK: given[0]}, tmp_path / "s", model=tiny, tokens=given[1], context=16 if flat else None)
    assert store.has_tokens and np.array_equal(store.tokens(0, 320), ids.ravel()) and store.context == 16
    assert np.array_equal(bits(store.read(HOOK, 0, 320)), stored(x))
    keep = ~np.isin(ids, sorted(tiny.tokenizer.special_ids))
    keep[:, 0] &= flat
    assert np.array_equal(store.keep(0, 320), keep.ravel()) and not keep.all()
    assert (store.spec.model, store.spec.model_digest) == (tiny.name, tiny.digest)
    assert store.spec.tokenizer_digest == tiny.tokenizer.digest


BAD = {
    "shape (10,), expected [N, D] or [contexts, T, D]": {"activations": {HOOK: np.ones(10)}},
    "shape (0, 4), expected": {"activations": {HOOK: np.ones((0, 4))}},
    "shape (9, 5), expected [N, D] or [contexts, T, D] like the first one, (9, 4)": {
        "activations": {HOOK: [np.ones((9, 4)), np.ones((9, 5))]}},
    "dtype int64 is no float": {"activations": {HOOK: np.ones((9, 4), np.int64)}},
    "no arrays": {"activations": {HOOK: []}},
    "missing.npy is no readable .npy file (": {"activations": {HOOK: "missing.npy"}},
    "expected activations as {hookpoint: rows}, got ndarray": {"activations": np.ones((9, 4))},
    "tokens: dtype float64 is no integer": {"tokens": np.ones(40)},
    "of 39 and of 40 rows": {"tokens": np.ones(39, int)},
    "contexts of 8 and of 16 tokens": {"tokens": np.ones((5, 8), int), "context": 16},
    "contexts of 0 tokens": {"context": 0},
    "'../x' is not a safe file name": {"activations": {"../x": np.ones((9, 4))}},
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_one_line(tmp_path, monkeypatch, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError) as error:
        store_of(**{"activations": {HOOK: np.ones((40, 4))}, "path": "s", **BAD[message]})
    assert message in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "s").exists()


def test_all_that_does_not_fit_at_once(tmp_path):
    with pytest.raises(StoreError, match="a: dtype int64 is no float; b: shape .*; tokens: dtype float64 is no integer"):
        store_of({"a": np.ones((9, 4), int), "b": np.ones(9)}, tmp_path / "s", tokens=np.ones(9))


@pytest.mark.parametrize("value", [np.nan, np.inf, 3.4e38])
def test_rows_that_are_not_finite_are_named(tmp_path, value):
    x = rows_of(9000)
    x[[4100, 5000], 3] = value
    with pytest.raises(NonFiniteError, match=f"{HOOK}: rows 4100, 5000 hold NaN, Inf"):
        store_of({HOOK: x}, tmp_path / "s")
    store = store_of({HOOK: np.nan_to_num(x, nan=0, posinf=0) * (np.abs(x) < 1e30)}, tmp_path / "s")  # again, mended
    assert store.kept_rows == 9000
    with pytest.raises(StoreError, match="is a finished store already"):
        store_of({HOOK: x}, tmp_path / "s")


def test_a_model_that_is_not_the_rows_own(tmp_path, tiny):
    for activations, tokens, error, message in (
            ({"blocks.9.hook_resid_post": rows_of(9)}, None, HookpointError, "blocks.9"),
            ({HOOK: rows_of(9, 32)}, None, StoreError, "is 48 wide in model, the rows are 32"),
            ({HOOK: rows_of(9)}, np.full(9, 300), StoreError, "ids 300 to 300, model has 0 to 299")):
        with pytest.raises(error, match=message):
            store_of(activations, tmp_path / "s", model=tiny, tokens=tokens)


def test_what_a_config_must_say_of_it(tmp_path, tiny):
    store = store_of({HOOK: rows_of(40)}, tmp_path / "s", context=16)
    check_matches(store, hookpoints=(HOOK,), model=UNKNOWN, context=16, batch=40)
    with pytest.raises(StoreError, match="config.lm.model is 'gpt2', the store does not say which it is of: set 'unknown'; "
                                         "config.train.batch is 41 rows, the store has 40 that are not masked"):
        check_matches(store, model="gpt2", batch=41)
    config = tiny_config(tmp_path, tmp_path, store.path)
    with pytest.raises(SaejaxError, match="holds activations made elsewhere, there is nothing to harvest"):
        harvest(config, tiny)
    unknown = dataclasses.replace(config, lm=dataclasses.replace(config.lm, model=UNKNOWN),
                                  harvest=dataclasses.replace(config.harvest, store=str(tmp_path / "t")))
    with pytest.raises(SaejaxError, match="config.lm.model: 'unknown' is for activations made elsewhere"):
        harvest(unknown)
