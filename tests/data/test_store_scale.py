"""A store of 10^11 rows opens as fast as one of a thousand, and its manifest is as small."""

import json
import os
import sys
import time
import zlib

import pytest

from saejax.base.errors import StoreCorruptError
from saejax.base.storage import json_bytes
from saejax.base.verified import BLOCK, VerifiedFile, block_of, digests
from saejax.data import manifest as mf
from saejax.data.manifest import StoreSpec
from saejax.data.store import CRCS, MANIFEST, Store
from tests.data.making import HOOK, make_store

WIDTH, CONTEXT, SHARD_CONTEXTS = 4096, 1024, 64
N_CONTEXTS = -(-10**11 // CONTEXT)
_FILES = ("open", "os.listdir", "os.scandir", "glob.glob", "pathlib.Path.glob", "pathlib.Path.rglob")
opened: list | None = None


def _hear(event: str, arguments: tuple) -> None:
    if opened is not None and event in _FILES:
        opened.append((event, str(arguments[0])))


sys.addaudithook(_hear)


@pytest.fixture
def huge(tmp_path):
    """A store whose shard files are missing, and whose checksums are a hole in a file."""
    spec = StoreSpec(model="big", model_digest="0" * 64, lm_dtype="bfloat16", tokenizer_digest="1" * 64, text={"sources": ["x"]},
                     hookpoints=((HOOK, WIDTH),), context=CONTEXT, shard_contexts=SHARD_CONTEXTS, chunk_rows=256,
                     target_contexts=N_CONTEXTS)
    block, size = mf.crc_block(spec, N_CONTEXTS), spec.shards(N_CONTEXTS) * spec.crc_bytes
    with open(tmp_path / CRCS, "wb") as f:
        f.truncate(size)
    full, rest = divmod(size, block)
    blocks = [zlib.crc32(bytes(block))] * full + ([zlib.crc32(bytes(rest))] if rest else [])
    crcs = {"bytes": size, "sha256": "0" * 64, "blocks": blocks}
    values = mf.manifest_of(spec, N_CONTEXTS, N_CONTEXTS * CONTEXT, crcs, "0" * 64)
    (tmp_path / MANIFEST).write_bytes(json_bytes(values))
    return tmp_path


def resident() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_store_of_10_to_the_11_rows_opens_at_once(huge, monkeypatch):
    global opened
    assert (huge / MANIFEST).stat().st_size <= 64 << 10
    looked, stat, lstat = [], os.stat, os.lstat
    monkeypatch.setattr(os, "stat", lambda *a, **k: (looked.append(a), stat(*a, **k))[1])
    monkeypatch.setattr(os, "lstat", lambda *a, **k: (looked.append(a), lstat(*a, **k))[1])
    before, began, opened = resident(), time.perf_counter(), []
    try:
        store = Store.open(huge)
        took, operations = time.perf_counter() - began, opened + looked
    finally:
        opened = None
    monkeypatch.undo()
    assert 0 < len(operations) <= 10 and str(huge / CRCS) not in [name for _, name in operations[:len(operations) - len(looked)]]
    assert took <= 1 and resident() - before <= 50 << 20
    assert (store.rows, store.n_shards) == (N_CONTEXTS * CONTEXT, 1_525_879)
    for shard in (0, 777_777, store.n_shards - 1):
        row = shard * store.spec.shard_rows
        with pytest.raises(StoreCorruptError, match=rf"{HOOK}/c/{shard}/0: missing"):
            store.read(HOOK, row, row + 1)
        with pytest.raises(StoreCorruptError, match=rf"tokens/c/{shard}: missing"):
            store.tokens(row, row + 1)
    assert resident() - before <= 50 << 20


def test_checksums_are_checked_a_block_at_a_time(huge):
    store = Store.open(huge)
    with open(huge / CRCS, "r+b") as f:
        f.seek(1_000_000 * store.spec.crc_bytes)
        f.write(b"\1")
    assert not any(store.checksums.row(0))
    with pytest.raises(StoreCorruptError, match="crcs.bin: altered since it was written, at bytes"):
        store.checksums.row(1_000_000)
    (huge / CRCS).unlink()
    with pytest.raises(StoreCorruptError, match="crcs.bin: "):
        Store.open(huge).tokens(0, 1)


def test_a_manifest_does_not_grow_with_the_shards(tmp_path):
    small, large = (make_store(tmp_path / str(n), n) for n in (8, 400))
    assert large.n_shards == 50 * small.n_shards
    assert (large.path / MANIFEST).stat().st_size - (small.path / MANIFEST).stat().st_size < 20


def test_blocks_are_large_enough(tmp_path):
    assert block_of(0, 5) == block_of(5 * BLOCK, 5) == BLOCK and block_of(5 * BLOCK + 1, 5) == 2 * BLOCK
    file = tmp_path / "f"
    file.write_bytes(bytes(range(256)) * 20)
    found = digests(file, block=1000)
    assert len(found["blocks"]) == 6 and json.dumps(found)
    with VerifiedFile(file, found["blocks"], StoreCorruptError, block=1000) as f:
        assert f.readall() == file.read_bytes()
    with file.open("r+b") as f:
        f.seek(3500)
        f.write(b"x")
    with VerifiedFile(file, found["blocks"], StoreCorruptError, block=1000) as f:
        assert len(f.read(3000)) == 3000
        with pytest.raises(StoreCorruptError, match="at bytes 3000 to 4000"):
            f.read(1)
