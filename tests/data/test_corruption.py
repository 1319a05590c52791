"""Whatever happens to a file of a store: the right values or a typed error that names the file, never a wrong value."""

import copy
import hashlib
import json
import re
import shutil

import numpy as np
import pytest

from saejax.base.errors import StoreCorruptError, StoreError
from saejax.config import StreamOptions
from saejax.data.manifest import self_digest
from saejax.data.store import Store
from saejax.data.stream import Stream
from saejax.data.verify import checks, verify
from tests.data.making import HOOK, HOOKS, bits, make_store

ROWS = 37 * 16


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "s")


def values_of(store: Store) -> dict[str, np.ndarray]:
    out = {"tokens": store.tokens(0, ROWS), "keep": store.keep(0, ROWS)}
    for h, _ in HOOKS:
        out[h] = bits(store.read(h, 0, ROWS))
        out["stats " + h], out["median " + h] = store.stats(h).mean_D, np.float64(store.stats(h).median_norm)
    return out


def flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)


def truncate(path, rng):
    path.write_bytes(path.read_bytes()[:rng.integers(path.stat().st_size)])


def append(path, rng):
    path.write_bytes(path.read_bytes() + rng.bytes(rng.integers(1, 9)))


def delete(path, rng):
    path.unlink()


def swap(path, rng):
    """With another file of its kind and size; which one is returned."""
    others = [p for p in path.parent.parent.rglob(path.name if path.name == "0" else "*")
              if p.is_file() and p != path and p.stat().st_size == path.stat().st_size]
    if not others:
        return None
    other = others[rng.integers(len(others))]
    a, b = path.read_bytes(), other.read_bytes()
    path.write_bytes(b)
    other.write_bytes(a)
    return other


@pytest.mark.parametrize("change", [flip, truncate, append, delete, swap])
def test_every_file_under_every_change(original, tmp_path, change):
    """Full verification names the file; without it, reading everything gives the right values or names the file."""
    rng = np.random.default_rng(len(change.__name__))
    expected = values_of(original)
    files = sorted(str(p.relative_to(original.path)) for p in original.path.rglob("*") if p.is_file())
    assert len(files) == 4 + 3 + 5 * (1 + 3)  # of the store, of each array, of each shard and its arrays
    for file in files:
        for trial in range(3 if change is flip else 1):
            copied = tmp_path / "s"
            shutil.copytree(original.path, copied)
            other = change(copied / file, rng)
            damaged = (file, str(other.relative_to(copied))) if other else (file,)
            here = copied / file
            if here.exists() and here.read_bytes() == (original.path / file).read_bytes():
                shutil.rmtree(copied)
                continue
            with pytest.raises(StoreError) as error:
                verify(Store.open(copied))
            assert any(d in str(error.value) for d in damaged), (damaged, trial, str(error.value))
            try:
                got = values_of(Store.open(copied))
                assert all(np.array_equal(got[k], expected[k]) for k in expected), (damaged, trial)
            except StoreError as e:
                assert any(d in str(e) for d in damaged), (damaged, trial, str(e))
            shutil.rmtree(copied)


def test_no_part_of_any_file_is_left_out(tmp_path):
    """About 60 bytes all over every file, one after the other, and the last one."""
    store = make_store(tmp_path / "s", 9)
    files = {check.file for check in checks(store)} | {store.path / "manifest.json"}
    assert files == {p for p in store.path.rglob("*") if p.is_file()}
    for file in files:
        before = file.read_bytes()
        for place in {*range(0, len(before), len(before) // 60 + 1), len(before) - 1}:
            with open(file, "r+b") as f:
                f.seek(place)
                f.write(bytes([before[place] ^ 1 << place % 8]))
            with pytest.raises(StoreError, match=re.escape(str(file))):
                opened = Store.open(store.path)
                next(check for check in checks(opened) if check.file == file).run()
            file.write_bytes(before)
    verify(Store.open(store.path))


def test_flips_in_a_shard_are_found_by_the_stream(original, tmp_path):
    shutil.copytree(original.path, tmp_path / "s")
    file = tmp_path / "s" / f"acts/{HOOK}/c/2/0"
    data = bytearray(file.read_bytes())
    data[700] ^= 4
    file.write_bytes(data)
    with Stream(Store.open(tmp_path / "s"), (HOOK,), 20, StreamOptions(2, 64), 0) as stream:
        with pytest.raises(StoreCorruptError, match=r"hook_resid_post/c/2/0: does not read back \(rows from 0 of this shard"):
            for _ in range(ROWS // 20):
                next(stream)
        with pytest.raises(StoreCorruptError):
            next(stream)


def test_a_stale_shard_of_another_store_is_caught(original, tmp_path):
    """Valid in itself, of the right size: only the recorded checksums tell."""
    shutil.copytree(original.path, tmp_path / "s")
    other = make_store(tmp_path / "other", seed=1)
    shutil.copy(other.path / f"acts/{HOOK}/c/1/0", tmp_path / f"s/acts/{HOOK}/c/1/0")
    store = Store.open(tmp_path / "s")
    assert np.array_equal(bits(store.read(HOOK, 0, 128)), bits(original.read(HOOK, 0, 128)))
    words = "c/1/0: its checksums are not the ones recorded.*; mend the store with `saejax harvest` and its option repair"
    for a in range(128, 256, 8):
        with pytest.raises(StoreCorruptError, match=words):
            store.read(HOOK, a, a + 8)


def test_a_stale_record_is_caught(original, tmp_path):
    shutil.copytree(original.path, tmp_path / "s")
    other = make_store(tmp_path / "other", seed=1)
    shutil.copy(other.path / "shards/00001.bin", tmp_path / "s/shards/00001.bin")
    with pytest.raises(StoreCorruptError, match="shards/00001.bin: its checksums are not those of crcs.bin"):
        verify(Store.open(tmp_path / "s"))


HOSTILE_FIGURES = [{}, {"sums": np.zeros(3)}, {"sums": np.full(26, np.nan)}, {"sums": np.zeros(26, np.float32)},
                   {"sums": np.array([None] * 26)}, {"norms": np.zeros((0, 2), np.int64)},
                   {"norms": np.array([[16500.0, 500]])}, {"norms": np.array([[16500, 10**9]])}, {"norms": np.array([1, 2])},
                   {"norms": np.array([[0x7F80, 1]])}, {"norms": np.array([[5, 300], [4, 204]])}, {"norms": np.array([[-1, 1]])}]


@pytest.mark.parametrize("changes", HOSTILE_FIGURES, ids=str)
def test_hostile_statistics_are_refused_in_one_line(original, tmp_path, changes):
    """With a digest that fits."""
    shutil.copytree(original.path, tmp_path / "s")
    file = tmp_path / "s" / "statistics.npz"
    with np.load(file) as arrays:
        values = {key: arrays[key] for key in arrays if changes or not key.startswith(HOOK)}
    np.savez(file, **values | {f"{HOOK}.{key}": value for key, value in changes.items()})
    manifest = original.manifest | {"statistics_sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    (tmp_path / "s" / "manifest.json").write_text(json.dumps(manifest | {"sha256": self_digest(manifest)}))
    with pytest.raises(StoreCorruptError, match="statistics.npz") as error:
        Store.open(tmp_path / "s").stats(HOOK)
    assert "\n" not in str(error.value)


def change_at(values, path, value):
    *parents, leaf = path
    for parent in parents:
        values = values[parent]
    values[leaf] = value


HOSTILE = [
    (("spec", "hookpoints", 0, "name"), "../../etc"), (("spec", "hookpoints", 0, "name"), "/etc"),
    (("spec", "hookpoints", 0, "name"), "a/b"), (("spec", "hookpoints", 0, "name"), {"driver": "http"}),
    (("spec", "hookpoints", 0, "width"), 2**60), (("spec", "hookpoints", 0, "width"), -1),
    (("spec", "hookpoints"), []), (("spec", "context"), 0), (("spec", "context"), "16"), (("spec", "chunk_rows"), 7),
    (("spec", "shard_contexts"), True), (("spec", "extra"), 1), (("n_contexts",), 2**47), (("n_contexts",), 38),
    (("rows",), 10**15), (("kept_rows",), -5), (("kind",), "other"), (("schema_version",), "1"), (("shards",), {}),
    (("crcs",), []), (("crcs", "bytes"), 1), (("crcs", "bytes"), 2**60), (("crcs", "sha256"), "00"), (("crcs", "blocks"), {}),
    (("crcs", "blocks"), []), (("crcs", "blocks", 0), 2**32), (("crcs", "blocks", 0), "x"), (("crcs", "file"), "/dev/zero"),
    (("statistics_sha256",), "x"), (("sha256",), "0" * 64),
]


@pytest.mark.parametrize("path, value", HOSTILE, ids=[".".join(map(str, p)) + f"={v!r:.20}" for p, v in HOSTILE])
def test_hostile_manifests_are_refused_in_one_line(original, tmp_path, path, value):
    """With a digest that fits: validation does not lean on it."""
    shutil.copytree(original.path, tmp_path / "s")
    values = copy.deepcopy(original.manifest)
    change_at(values, path, value)
    if path != ("sha256",):
        values["sha256"] = self_digest(values)
    (tmp_path / "s" / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(StoreCorruptError, match="manifest.json|safe file name") as error:
        Store.open(tmp_path / "s")
    assert "\n" not in str(error.value)


def test_links_out_of_the_store_are_refused(original, tmp_path):
    shutil.copytree(original.path, tmp_path / "s")
    shutil.move(tmp_path / "s" / "tokens", tmp_path / "elsewhere")
    (tmp_path / "s" / "tokens").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreCorruptError, match="tokens.*leads outside"):
        Store.open(tmp_path / "s").tokens(0, 1)
    with pytest.raises(StoreCorruptError, match="tokens.*leads outside"):
        verify(Store.open(tmp_path / "s"))


@pytest.mark.parametrize("content", [b"", b"[1", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_anything_else_in_place_of_the_manifest(original, tmp_path, content):
    shutil.copytree(original.path, tmp_path / "s")
    (tmp_path / "s" / "manifest.json").write_bytes(content)
    with pytest.raises(StoreCorruptError, match="manifest.json"):
        Store.open(tmp_path / "s")
