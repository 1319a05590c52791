import gc
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saejax.base.errors import NonFiniteError, StoreError
from saejax.base.records import StreamState
from saejax.config import StreamOptions
from saejax.data import stream as stream_module
from saejax.data.shards import ArrayReader
from saejax.data.stream import Stream, _Recycled
from saejax.data.writer import StoreWriter
from tests.data.making import CONTEXT, HOOK, Rows, bits, make_store, spec

START = StreamState(0, 0, 0)


@pytest.fixture(scope="module")
def rows():
    return Rows()


@pytest.fixture(scope="module")
def store(tmp_path_factory, rows):
    return make_store(tmp_path_factory.mktemp("store") / "s", rows=rows)


OPTIONS = StreamOptions(4, 150)


def take(store, n, batch=50, options=OPTIONS, state=START, hook=HOOK):
    """[(store rows, values as bits, state behind)] of n batches."""
    with Stream(store, (hook,), batch, options, state) as stream:
        out = []
        for _ in range(n):
            b = next(stream)
            out.append((b.contexts_B * CONTEXT + b.positions_B, bits(b.x_BW).copy(), b.token_ids_B, stream.state))
        return out


def same(a, b):
    assert len(a) == len(b)
    for one, two in zip(a, b, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(one[:3], two[:3], strict=True)) and one[3] == two[3]


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.integers(1, 700), block=st.sampled_from([1, 2, 3, 4, 8, 64]), window=st.integers(1, 900),
       seed=st.integers(0, 9))
def test_every_kept_row_once_per_epoch_with_its_values(store, rows, batch, block, window, seed):
    n = store.kept_rows
    seen = take(store, -(-2 * n // batch), batch, StreamOptions(block, window), StreamState(seed, 0, 0))
    numbers = np.concatenate([r for r, *_ in seen])
    kept = np.flatnonzero(rows.keep)
    for e in range(2):
        assert np.array_equal(np.sort(numbers[e * n:(e + 1) * n]), kept)
    flat, tokens = bits(rows.acts[HOOK]).reshape(-1, 24), rows.tokens.ravel()
    for r, x, t, _ in seen:
        assert len(r) == batch and np.array_equal(x, flat[r]) and np.array_equal(t, tokens[r])


def test_epochs_and_seeds_have_different_orders(store):
    n = store.kept_rows
    one, other = (np.concatenate([r for r, *_ in take(store, 2, n, state=StreamState(s, 0, 0))]) for s in (0, 1))
    assert not np.array_equal(one[:n], one[n:]) and not np.array_equal(one[:n], other[:n])
    assert not np.array_equal(one[:n], np.sort(one[:n]))


@pytest.mark.parametrize("batch, options", [(50, OPTIONS), (7, StreamOptions(1, 16)), (600, OPTIONS)])
def test_state_before_every_batch_restores_all_that_follows(store, batch, options):
    n = 14
    straight = take(store, n, batch, options)
    states = [START] + [s for *_, s in straight]
    for i in range(n):
        same(take(store, n - i, batch, options, states[i]), straight[i:])
    assert states[-1].epoch >= 1 or batch == 7


def test_the_end_of_an_epoch_is_the_start_of_the_next(store):
    n = store.kept_rows
    assert take(store, 1, n)[0][3] == StreamState(0, 1, 0)
    same(take(store, 2, 40, state=StreamState(0, 0, n)), take(store, 2, 40, state=StreamState(0, 1, 0)))


def test_batch_size_does_not_change_the_order(store):
    a, b = (np.concatenate([r for r, *_ in take(store, k, batch)]) for k, batch in ((30, 20), (6, 100)))
    assert np.array_equal(a, b)


def test_order_does_not_depend_on_timing(store, monkeypatch):
    straight = take(store, 20)
    read = ArrayReader._read_part

    def slow(self, *args):
        time.sleep(np.random.default_rng().uniform(0, 0.01))
        read(self, *args)

    monkeypatch.setattr(ArrayReader, "_read_part", slow)
    with Stream(store, (HOOK,), 50, StreamOptions(4, 150), START) as stream:
        again = []
        for i in range(20):
            time.sleep(0.005 * (i % 3))
            b = next(stream)
            again.append((b.contexts_B * CONTEXT + b.positions_B, bits(b.x_BW), b.token_ids_B, stream.state))
        assert stream.wait_seconds > 0
    same(again, straight)


def test_restoring_reads_no_skipped_window(store, monkeypatch):
    read = []
    read_into = type(store).read_into
    monkeypatch.setattr(type(store), "read_into", lambda self, array, spans, out: (
        read.append((array, sum(b - a for a, b in spans))), read_into(self, array, spans, out))[1])
    with Stream(store, (HOOK,), 10, StreamOptions(1, 32), StreamState(0, 3, 400)) as stream:
        next(stream)
        stream.close()
    assert sum(n for array, n in read if array.startswith("acts")) <= 32 * (3 + stream._queue.maxsize * 10 // 25)


def test_outliers_are_left_out_on_request(tmp_path):
    rows = Rows()
    rows.acts[HOOK][[3, 20], 5] = 100.0
    rows.keep[[3, 20], 5] = True
    store = make_store(tmp_path / "s", rows=rows)
    n = store.kept_rows
    with_them = np.concatenate([r for r, *_ in take(store, 1, n)])
    without = np.concatenate([r for r, *_ in take(store, 1, n - 2, StreamOptions(4, 150, mask_outliers=True))])
    assert set(with_them) - set(without) == {3 * CONTEXT + 5, 20 * CONTEXT + 5}
    assert take(store, 1, n - 2, StreamOptions(4, 150, mask_outliers=True))[0][3] == StreamState(0, 1, 0)


def test_two_streams_over_one_store_do_not_disturb_each_other(store):
    alone = take(store, 10), take(store, 10, 33, state=StreamState(7, 0, 0))
    with Stream(store, (HOOK,), 50, StreamOptions(4, 150), START) as a, \
            Stream(store, (HOOK,), 33, StreamOptions(4, 150), StreamState(7, 0, 0)) as b:
        for one, two in zip(*alone, strict=True):
            assert np.array_equal(bits(next(a).x_BW), one[1]) and np.array_equal(bits(next(b).x_BW), two[1])


def test_batches_held_by_the_consumer_are_never_overwritten(store):
    """The memory of a batch is used again, but only when nothing refers to it: arrays, views, jax arrays of them."""
    with Stream(store, (HOOK,), 20, StreamOptions(4, 150), START) as stream:
        held = []
        for i in range(120):
            b = next(stream)
            kind = [b.x_BW, b.x_BW[3:].T, b.x_BW.view(np.uint16).reshape(-1), jnp.asarray(b.x_BW),
                    jax.device_put(b.x_BW), memoryview(b.x_BW.view(np.uint8))][i % 6]
            held.append((kind, np.array(kind).copy()))
            if i % 10 == 9:
                held = held[::2]
        del b
        gc.collect()
        for kind, copy in held:
            assert np.array_equal(np.array(kind).view(np.uint8), copy.view(np.uint8))


def test_memory_is_recycled_only_when_the_last_view_is_gone():
    memory = _Recycled(8, 2)
    one = memory.array(4)
    one[:] = 7
    view, address = one[1:, 2:].T, one.__array_interface__["data"][0]
    del one
    two = memory.array(4)
    two[:] = 9
    assert (view == 7).all()
    del view
    assert memory.array(4).__array_interface__["data"][0] == address


def test_non_finite_rows_are_counted_and_named(tmp_path, monkeypatch):
    """The writer refuses such rows; a store from elsewhere may hold them."""
    rows = Rows()
    rows.acts[HOOK][9, 4, 3], rows.acts[HOOK][30, 0, 0] = np.nan, np.inf
    rows.keep[9, 4] = rows.keep[30, 0] = True
    with monkeypatch.context() as m:
        m.setattr("saejax.data.shard_writer.check_finite", lambda *_: None)
        m.setattr("saejax.data.shard_writer.row_statistics", lambda x, keep: (np.ones(len(x)), np.zeros(x.shape[1])))
        writer = StoreWriter(tmp_path / "s", spec())
        for s in range(5):
            writer.write_shard(*rows.shard(s))
        store = writer.finalize(37)
    with Stream(store, (HOOK,), 10, StreamOptions(64, 2000), START) as stream:
        with pytest.raises(NonFiniteError, match=r"2 of \d+ .* \(9, 4\), \(30, 0\)"):
            for batch in stream:
                assert np.isfinite(batch.x_BW.astype(np.float32)).all()


def test_an_error_in_the_thread_reaches_the_consumer(store, monkeypatch):
    def fail(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(Stream, "_gather", fail)
    with Stream(store, (HOOK,), 10, StreamOptions(4, 150), START) as stream:
        with pytest.raises(MemoryError, match="no room"):
            next(stream)


def test_close_joins_the_thread_and_ends_the_stream(store):
    before = threading.active_count()
    stream = Stream(store, (HOOK,), 10, StreamOptions(4, 150), START)
    next(stream)
    stream.close()
    stream.close()
    assert threading.active_count() <= before
    with pytest.raises(StopIteration):
        next(stream)


def test_bad_requests_say_so(store):
    with pytest.raises(StoreError, match="config.train.batch"):
        Stream(store, (HOOK,), 10, StreamOptions(4, 150), StreamState(0, 0, 10**6))
    with pytest.raises(StoreError, match="holds blocks.0"):
        Stream(store, ("blocks.7.hook_resid_post",), 10, StreamOptions(4, 150), START)


def test_golden_order(store):
    """Resuming relies on this order: if it changes on purpose, raise ORDER_VERSION in stream.py."""
    assert stream_module.ORDER_VERSION == 1
    assert take(store, 1, 8, StreamOptions(2, 64))[0][0].tolist() == [32, 19, 7, 44, 28, 13, 55, 42]
