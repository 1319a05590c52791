import functools
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from saejax.base.errors import DiskError, NonFiniteError, StoreCorruptError, StoreError
from saejax.base.storage import write_json
from saejax.data.shard_writer import ShardFile
from saejax.data.shards import ArrayReader, ArraySpec, ShardTruth
from saejax.data.statistics import median_of_bins, merged_bins, norm_bins
from saejax.data.store import Store, check_matches
from saejax.data.writer import StoreWriter
from tests.data.making import CONTEXT, HOOK, HOOKS, Rows, bits, directory, make_store, spec


def test_reads_back_what_was_written(tmp_path):
    rows, store = Rows(), make_store(tmp_path / "s")
    n = 37 * CONTEXT
    for h, d in HOOKS:
        flat = rows.acts[h].reshape(n, d)
        assert np.array_equal(bits(store.read(h, 0, n)), bits(flat))
        assert np.array_equal(bits(store.read(h, 120, 301)), bits(flat[120:301]))
        assert store.width(h) == d and len(store.read(h, 5, 5)) == 0
    assert np.array_equal(store.tokens(3, n), rows.tokens.ravel()[3:])
    assert np.array_equal(store.keep(0, n), rows.keep.ravel())
    assert (store.rows, store.n_contexts, store.kept_rows) == (n, 37, int(rows.keep.sum()))
    with pytest.raises(IndexError):
        store.read(HOOK, 0, n + 1)


@pytest.fixture
def array_5(tmp_path):
    """(spec, values, what is recorded of its shards): shards of 900 chunks, more than one system call takes."""
    array = ArraySpec("a", "bfloat16", 5, 1800, 2)
    x = np.random.default_rng(0).standard_normal((4001, 5), np.float32).astype(ml_dtypes.bfloat16)
    truth = []
    for shard, part in enumerate(np.split(x, [1800, 3600])):
        file = ShardFile(tmp_path, array, shard, len(part))
        file.write(100, part[200:])
        file.write(0, part[:200])
        file.finish()
        truth.append(ShardTruth(len(part), file.crcs[:array.chunks(len(part))]))
    return array, x, truth


SPANS = ([(0, 4001)], [(3601, 4001), (1, 2), (1799, 3603), (7, 7), (600, 2000)])


def test_reader_equals_tensorstore_on_any_spans(tmp_path, array_5):
    """Spans that start and end inside chunks and cross shards."""
    array, x, truth = array_5
    plain = array.open(tmp_path, len(x), ts.Context())
    with ThreadPoolExecutor(2) as pool:
        reader = ArrayReader(tmp_path, array, len(x), truth.__getitem__, pool)
        for spans in SPANS:
            out = np.empty((sum(b - a for a, b in spans), 5), x.dtype)
            reader.read_into(spans, out)
            expected = np.concatenate([plain[a:b].read().result() for a, b in spans])
            assert np.array_equal(bits(out), bits(expected))
            assert np.array_equal(bits(out), bits(np.concatenate([x[a:b] for a, b in spans])))


def test_shard_files_are_those_that_tensorstore_writes(tmp_path, array_5):
    array, x, _ = array_5
    (tmp_path / "theirs").mkdir()
    array.open(tmp_path / "theirs", len(x), ts.Context()).write(x).result()
    for shard in range(3):
        assert (tmp_path / array.shard_file(shard)).read_bytes() == (tmp_path / "theirs" / array.shard_file(shard)).read_bytes()


@pytest.mark.parametrize("most", [1, 7, 1000])
def test_reads_that_give_less_than_was_asked_for_go_on(tmp_path, array_5, monkeypatch, most):
    """As reads of network file systems do, and of more than 2 GB everywhere; the end of the file stays an error."""
    array, x, truth = array_5
    preadv, calls = os.preadv, []

    def short(fd, buffers, offset):
        calls.append(offset)
        for buffer in buffers:
            if len(buffer):
                return preadv(fd, [buffer[:most]], offset)

    monkeypatch.setattr(os, "preadv", short)
    with ThreadPoolExecutor(2) as pool:
        reader = ArrayReader(tmp_path, array, len(x), truth.__getitem__, pool)
        for spans in SPANS:
            assert np.array_equal(bits(np.concatenate([reader.read(a, b) for a, b in spans])),
                                  bits(np.concatenate([x[a:b] for a, b in spans])))
        assert len(calls) > 1000
        os.truncate(tmp_path / array.shard_file(1), 1003)
        with pytest.raises(StoreCorruptError, match="a/c/1/0: ends in the middle of a chunk"):
            reader.read(1800, 3600)


@pytest.mark.parametrize("most", [1, 1000])
def test_writes_that_take_less_than_was_given_go_on(tmp_path, monkeypatch, most):
    make_store(tmp_path / "whole")
    pwritev = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: pwritev(fd, [buffers[0][:most]], offset))
    make_store(tmp_path / "s")
    assert directory(tmp_path / "s") == directory(tmp_path / "whole")


def test_the_number_of_threads_does_not_change_a_byte(tmp_path):
    """Shards of many pieces, of which several are under way at a time."""
    hooks = tuple((f"h{i}", 300) for i in range(3))
    wide = spec(96, hookpoints=hooks, shard_contexts=64, chunk_rows=8)
    rows = Rows(96, hooks=hooks)
    for threads in (1, 2, 7):
        writer = StoreWriter(tmp_path / str(threads), wide, threads=threads)
        for s in writer.missing_shards():
            writer.write_shard(*rows.shard(s, 64))
        writer.finalize(96)
    one = directory(tmp_path / "1")
    assert one == directory(tmp_path / "2") == directory(tmp_path / "7")


def test_statistics_are_of_the_kept_rows(tmp_path):
    rows = Rows()
    rows.acts[HOOK][5, 3] = 300.0
    rows.keep[5, 3] = True
    rows.acts[HOOK][6, 3] = 10_000.0
    rows.keep[6, 3] = False
    store = make_store(tmp_path / "s", rows=rows)
    x = rows.acts[HOOK].astype(np.float64)[rows.keep]
    norms = np.linalg.norm(x, axis=1)
    stats = store.stats(HOOK)
    assert np.allclose(stats.mean_D, x.mean(0), rtol=1e-5, atol=1e-6)
    assert np.isclose(stats.mean_norm, norms.mean(), rtol=1e-6)
    assert np.isclose(stats.mean_sq_norm, (norms**2).mean(), rtol=1e-6)
    assert stats.median_norm == pytest.approx(np.median(norms), rel=2**-7)
    assert (norms > store.outlier_bound(HOOK)).sum() == 1


@pytest.mark.parametrize("n", [1, 2, 7, 1000, 1001])
@pytest.mark.parametrize("spread", [0.0, 1e-5, 0.3, 3.0])
def test_median_is_within_a_bin_of_numpys(n, spread):
    """With all norms in one bin too, and with some of 0."""
    values = np.random.default_rng(n).lognormal(3, spread, n).astype(np.float32)
    values[n // 2 + 1:n // 2 + 3] = 0.0
    exact = float(np.median(values.astype(np.float64)))
    assert median_of_bins(norm_bins(values)) == pytest.approx(exact, rel=2**-7)


def test_median_of_many_norms_is_far_better_than_a_bin():
    values = np.linalg.norm(np.random.default_rng(0).standard_normal((200_000, 8)), axis=1)
    parts = functools.reduce(merged_bins, map(norm_bins, np.array_split(values, 7)))
    assert np.array_equal(parts, norm_bins(values))
    assert median_of_bins(parts) == pytest.approx(np.median(values), rel=3e-4)


def test_median_of_the_largest_norms_is_finite():
    assert median_of_bins(norm_bins(np.full(3, np.finfo(np.float32).max))) < np.finfo(np.float32).max


def test_the_sums_of_a_record_are_not_kept_in_memory(tmp_path):
    """At a width of 4096 the parsed sums of 48 shards are 6 MB."""
    hooks = (("wide", 4096),)
    wide = spec(48, hookpoints=hooks, shard_contexts=1, chunk_rows=CONTEXT)
    writer, rows = StoreWriter(tmp_path / "s", wide), Rows(48, hooks=hooks)
    for s in writer.missing_shards():
        writer.write_shard(*rows.shard(s, 1))
    tracemalloc.start()
    try:
        store = writer.finalize(48)
        assert np.array_equal(store.tokens(0, store.rows), rows.tokens.ravel())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 << 20


def test_any_zarr3_reader_reads_it(tmp_path):
    store = make_store(tmp_path / "s")
    ids = np.where(store.keep(0, store.rows), store.tokens(0, store.rows), -1 - store.tokens(0, store.rows))
    for name, expected in ((f"acts/{HOOK}", store.read(HOOK, 0, store.rows)), ("tokens", ids)):
        array = ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "s" / name)}}).result()
        assert np.array_equal(array.read().result(), expected)


def test_order_and_number_of_writers_do_not_change_a_byte(tmp_path):
    make_store(tmp_path / "one")
    rows, two = Rows(), tmp_path / "two"
    a, b = StoreWriter(two, spec()), StoreWriter(two, spec())
    assert a.missing_shards(0, 2) == [0, 2, 4] and b.missing_shards(1, 2) == [1, 3]
    for writer, s in ((b, 3), (a, 4), (a, 0), (b, 1), (a, 2)):
        writer.write_shard(*rows.shard(s))
    assert a.missing_shards() == []
    a.finalize(37)
    assert directory(two) == directory(tmp_path / "one")
    texts = b"".join(directory(two).values())
    assert str(tmp_path).encode() not in texts


def test_the_shards_of_a_shorter_store_are_those_of_a_longer_one(tmp_path):
    """What is finished needs nothing but a larger target to be continued, and gives the store of one harvest."""
    rows = Rows()
    make_store(tmp_path / "short", 24, rows=rows)
    writer = StoreWriter(tmp_path / "long", spec(37))
    for part in ("shards", "acts", "tokens"):
        shutil.copytree(tmp_path / "short" / part, tmp_path / "long" / part, dirs_exist_ok=True)
    assert writer.missing_shards() == [3, 4]
    for s in writer.missing_shards():
        writer.write_shard(*rows.shard(s))
    writer.finalize(37)
    make_store(tmp_path / "whole", rows=rows)
    assert directory(tmp_path / "long") == directory(tmp_path / "whole")


def test_an_unfinished_store_says_how_far_it_is(tmp_path):
    with pytest.raises(StoreError, match="no activation store here"):
        Store.open(tmp_path / "s")
    writer, rows = StoreWriter(tmp_path / "s", spec()), Rows()
    for s in (0, 3):
        writer.write_shard(*rows.shard(s))
    with pytest.raises(StoreError, match="2 of 5 shards"):
        Store.open(tmp_path / "s")
    with pytest.raises(StoreError, match=r"shards \[1, 2, 4\] of 5"):
        writer.finalize(37)
    assert not (tmp_path / "s" / "manifest.json").exists()


def test_lost_or_cut_shard_files_are_written_again(tmp_path):
    make_store(tmp_path / "whole")
    writer, rows = StoreWriter(tmp_path / "s", spec()), Rows()
    for s in range(5):
        writer.write_shard(*rows.shard(s))
    (tmp_path / "s/tokens/c/1").unlink()
    os.truncate(tmp_path / f"s/acts/{HOOK}/c/2/0", 100)
    (tmp_path / "s/shards/00003.bin").write_bytes(b"{")
    (tmp_path / "s/shards/.00004.bin.tmp-77").touch()
    (tmp_path / "s/.crcs.bin.tmp-77").touch()
    writer = StoreWriter(tmp_path / "s", spec())
    assert writer.missing_shards() == [1, 2, 3]
    for s in writer.missing_shards():
        writer.write_shard(*rows.shard(s))
    writer.finalize(37)
    assert directory(tmp_path / "s") == directory(tmp_path / "whole")


def test_another_config_is_refused_with_the_differences(tmp_path):
    writer = StoreWriter(tmp_path / "s", spec())
    writer.write_shard(*Rows().shard(2))
    with pytest.raises(StoreError, match="context: 16 -> 32; model_digest: 'd0' -> 'd1'; text.digest: 'x0' -> 'x1'"):
        StoreWriter(tmp_path / "s", spec(context=32, model_digest="d1", text={"digest": "x1"}))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match="not an activation store"):
        StoreWriter(tmp_path / "other", spec())
    (tmp_path / "other" / "spec.json").write_text('{"kind": "mine"}')
    with pytest.raises(StoreCorruptError, match="spec.json"):
        StoreWriter(tmp_path / "other", spec())
    assert (tmp_path / "other" / "spec.json").read_text() == '{"kind": "mine"}'


def test_a_directory_without_a_finished_shard_goes_to_the_corrected_config(tmp_path):
    writer = StoreWriter(tmp_path / "s", spec(model_digest="d1", hookpoints=(("typo", 24), *HOOKS)))
    (tmp_path / "s/acts/typo/c/0").mkdir(parents=True)
    (tmp_path / "s/acts/typo/c/0/0").write_bytes(b"of a shard that was not finished")
    make_store(tmp_path / "s")
    make_store(tmp_path / "straight")
    assert directory(tmp_path / "s") == directory(tmp_path / "straight")
    with pytest.raises(StoreError, match="belongs to another config"):
        StoreWriter(tmp_path / "s", writer.spec)


def test_temporary_files_of_hosts_with_equal_process_ids_differ(tmp_path, monkeypatch):
    seen, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(a), replace(a, b)))
    for _ in range(2):
        write_json(tmp_path / "a.json", 1)
    assert len(set(seen)) == 2 and all(path.match(".*.tmp-*") for path in seen)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_refused_with_their_rows(tmp_path, bad):
    rows = Rows()
    rows.acts[HOOK][9, 4, 3] = rows.acts[HOOK][11, 0, 0] = bad
    writer = StoreWriter(tmp_path / "s", spec())
    with pytest.raises(NonFiniteError, match=rf"{HOOK}: 2 of 128 .* \(9, 4\), \(11, 0\)"):
        writer.write_shard(*rows.shard(1))
    assert list(directory(tmp_path / "s")) == ["spec.json"]


def test_huge_but_finite_rows_are_kept(tmp_path):
    rows = Rows()
    rows.acts[HOOK][0, 1] = ml_dtypes.finfo(ml_dtypes.bfloat16).max
    store = make_store(tmp_path / "s", rows=rows)
    largest = int(np.float32([np.finfo(np.float32).max]).view(np.uint32)[0] >> 16)
    assert store.totals[HOOK].bins[-1].tolist() == [largest, int(rows.keep[0, 1])]
    assert np.array_equal(bits(store.read(HOOK, 1, 2)), bits(rows.acts[HOOK][0, 1:2]))


def test_check_matches_names_key_and_both_values(tmp_path):
    store = make_store(tmp_path / "s")
    check_matches(store, hookpoints=(HOOK,), d_in=24, model="tiny", context=16)
    with pytest.raises(StoreError, match="config.sae.d_in is 32, the store's blocks.0.hook_resid_post is 24 wide"):
        check_matches(store, hookpoints=(HOOK,), d_in=32)
    with pytest.raises(StoreError, match="config.sae reads 'x'.*lm.model is 'big', .* from 'tiny'.*config.text.context is 8"):
        check_matches(store, hookpoints=("x",), model="big", context=8)
    with pytest.raises(StoreError, match="not 'x'"):
        store.read("x", 0, 1)


_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from saejax.data.writer import StoreWriter
from saejax.base.errors import DiskError
from tests.data.making import Rows, spec
path, limit = Path(sys.argv[1]), int(sys.argv[2])
writer, rows = StoreWriter(path, spec()), Rows()
writer.write_shard(*rows.shard(0))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    writer.write_shard(*rows.shard(1))
except DiskError as e:
    print("DiskError", e)
"""


@pytest.mark.parametrize("limit", [100, 2000])
def test_full_disk_is_a_disk_error_and_the_rerun_completes(tmp_path, limit):
    """The file size limit stops every file of a shard, or the activations alone."""
    run = subprocess.run([sys.executable, "-c", _FULL_DISK, str(tmp_path / "s"), str(limit)], capture_output=True,
                         text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}, timeout=120)
    assert run.stdout.startswith("DiskError") and "File too large" in run.stdout, run.stdout + run.stderr
    writer, rows = StoreWriter(tmp_path / "s", spec()), Rows()
    assert writer.missing_shards() == [1, 2, 3, 4]
    assert not any("c/1" in name for name in directory(tmp_path / "s"))
    for s in writer.missing_shards():
        writer.write_shard(*rows.shard(s))
    writer.finalize(37)
    make_store(tmp_path / "whole")
    assert directory(tmp_path / "s") == directory(tmp_path / "whole")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_read_only_directory_is_a_disk_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(DiskError):
        StoreWriter(tmp_path / "s", spec())


_KILLED = """
import sys
from pathlib import Path
from saejax.data.writer import StoreWriter
from tests.data.making import Rows, spec
path = Path(sys.argv[1])
writer, rows = StoreWriter(path, spec(400, target_contexts=400)), Rows(400)
print("started", flush=True)
for s in writer.missing_shards():
    writer.write_shard(*rows.shard(s))
writer.finalize(400)
"""


@pytest.mark.slow
def test_killed_at_random_times_it_becomes_the_same_store(tmp_path):
    rng = np.random.default_rng(0)
    kills = 0
    for _ in range(40):
        run = subprocess.Popen([sys.executable, "-c", _KILLED, str(tmp_path / "s")], stdout=subprocess.PIPE,
                               env={**os.environ, "JAX_PLATFORMS": "cpu"})
        run.stdout.readline()
        try:
            run.wait(rng.uniform(0.01, 0.15) if kills < 3 else 120)
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
            kills += 1
            with pytest.raises(StoreError, match="not finished"):
                Store.open(tmp_path / "s")
            continue
        break
    assert kills >= 1
    rows, writer = Rows(400), StoreWriter(tmp_path / "whole", spec(400))
    for s in writer.missing_shards():
        writer.write_shard(*rows.shard(s))
    writer.finalize(400)
    assert directory(tmp_path / "s") == directory(tmp_path / "whole")


@pytest.mark.parametrize("version, words", [
    (4, "schema version 4 is newer"),
    *((n, f"schema version {n} is no longer read.*`saejax harvest` again into another directory") for n in (1, 2))])
def test_another_schema_is_refused_before_anything_else(tmp_path, version, words):
    store = make_store(tmp_path / "s")
    values = {**store.manifest, "schema_version": version, "something": "new"}
    (tmp_path / "s" / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(StoreError, match=words) as error:
        Store.open(tmp_path / "s")
    assert not isinstance(error.value, StoreCorruptError) and "\n" not in str(error.value)
    write_json(tmp_path / "s" / "spec.json", json.loads((tmp_path / "s" / "spec.json").read_text()) | {"schema_version": version})
    with pytest.raises(StoreError, match=words):
        StoreWriter(tmp_path / "s", spec())
