import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import saejax
from saejax.base import sharding
from saejax.base.errors import StoreError
from saejax.base.records import StreamState
from saejax.cli import config_flag
from saejax.config import StreamOptions
from saejax.data import order as order_module
from saejax.data.order import RowOrder
from saejax.data.shards import ArrayReader
from saejax.data.stream import Stream
from tests.data.making import CONTEXT, HOOK, HOOKS, Rows, bits, make_store

OPTIONS, ROOT = StreamOptions(2, 150), Path(saejax.__file__).parents[1]


@pytest.fixture(scope="module")
def rows():
    return Rows()


@pytest.fixture(scope="module")
def store(tmp_path_factory, rows):
    return make_store(tmp_path_factory.mktemp("store") / "s", rows=rows)


@pytest.fixture(scope="module")
def number_of(rows):
    """Which row of the store has these bytes."""
    flat = bits(rows.acts[HOOK]).reshape(-1, HOOKS[0][1])
    found = {row.tobytes(): n for n, row in enumerate(flat)}
    assert len(found) == len(flat)
    return lambda x_BD: np.array([found[row.tobytes()] for row in bits(x_BD)])


def take(store, n, batch=48, options=OPTIONS, state=0, lanes=None, hooks=(HOOK,)):
    """[(values, state behind)] of n batches."""
    with Stream(store, hooks, batch, options, state, lanes) as stream:
        return [(next(stream).copy(), stream.state) for _ in range(n)]


def same(a, b):
    assert len(a) == len(b)
    assert all(np.array_equal(bits(x), bits(y)) and s == t for (x, s), (y, t) in zip(a, b, strict=True))


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.one_of(st.integers(1, 700), st.sampled_from([8, 16, 32, 64, 128, 256])), block=st.sampled_from([1, 2, 3, 4, 64]),
       window=st.integers(1, 900), seed=st.integers(0, 9))
def test_every_kept_row_once_per_epoch_of_its_lane(store, rows, number_of, batch, block, window, seed):
    options = StreamOptions(block, window)
    order = RowOrder.for_batches(store.rows, CONTEXT, options, batch)
    n = -(-2 * order.lanes * max(int(rows.keep.sum()) // order.lanes, 1) // batch) + 1
    seen = [number_of(x).reshape(order.lanes, -1) for x, _ in take(store, n, batch, options, seed)]
    blocks = np.arange(store.rows) // (block * CONTEXT)
    for lane, numbers in enumerate(np.concatenate(seen, axis=1)):
        mine = np.flatnonzero(rows.keep.ravel() & (blocks % order.lanes == lane))
        for e in range(len(numbers) // len(mine)):
            assert np.array_equal(np.sort(numbers[e * len(mine):(e + 1) * len(mine)]), mine)
        rest = numbers[len(numbers) // len(mine) * len(mine):]
        assert len(set(rest)) == len(rest) and set(rest) <= set(mine)


def test_epochs_seeds_and_lanes_have_different_orders(store, number_of):
    n = store.kept_rows
    one, other = (np.concatenate([number_of(x) for x, _ in take(store, 2 * n, 1, state=seed)]) for seed in (0, 1))
    assert not np.array_equal(one[:n], one[n:]) and not np.array_equal(one[:n], other[:n])
    assert not np.array_equal(one[:n], np.sort(one[:n]))


@pytest.mark.parametrize("batch, options", [(48, OPTIONS), (7, StreamOptions(1, 16)), (600, OPTIONS), (64, StreamOptions(1, 64)),
                                            (512, StreamOptions(1, 16))])
def test_state_before_every_batch_restores_all_that_follows(store, batch, options):
    n = 14
    straight = take(store, n, batch, options)
    states = [0] + [s for *_, s in straight]
    for i in range(n):
        same(take(store, n - i, batch, options, states[i]), straight[i:])
    assert all(type(v) is int for lane in states[-1].lanes for v in lane)


def test_the_end_of_an_epoch_is_the_start_of_the_next(store):
    n = store.kept_rows
    options = StreamOptions(2, 10_000)
    assert take(store, 1, n, options)[0][1] == StreamState(0, ((1, 0, 0),))
    same(take(store, 2, 40, options, StreamState(0, ((0, 0, n),))), take(store, 2, 40, options, StreamState(0, ((1, 0, 0),))))


def test_batches_of_other_sizes_have_the_same_order_in_every_lane(store, number_of):
    def lanes(k, batch):
        return np.concatenate([number_of(x).reshape(4, -1) for x, _ in take(store, k, batch)], axis=1)

    assert np.array_equal(lanes(30, 20), lanes(6, 100))


@pytest.mark.parametrize("lanes", [(0,), (1, 2), (0, 3), (0, 1, 2, 3)])
def test_some_lanes_are_a_part_of_all(store, lanes, monkeypatch):
    """With the state of all; no activations of other lanes are read."""
    options, read, place = StreamOptions(2, 150), [], ArrayReader._place_part
    whole = take(store, 20, 48, options)
    monkeypatch.setattr(ArrayReader, "_place_part", lambda self, shard, a, b, *rest: (
        read.append((int(shard[0].split("/")[-2]) * self.spec.shard_rows + a, b - a)), place(self, shard, a, b, *rest))[1])
    part = take(store, 20, 48, options, lanes=lanes)
    for (x, state), (y, behind) in zip(whole, part, strict=True):
        assert np.array_equal(bits(x).reshape(4, 12, -1)[list(lanes)].reshape(len(y), -1), bits(y)) and state == behind
    assert {first // (2 * CONTEXT) % 4 for first, _ in read} == set(lanes)
    handed = 20 * 12 * len(lanes) / rows_kept(store)
    assert sum(n for _, n in read) <= handed * 1.3 + 3 * len(lanes) * 2 * CONTEXT


def rows_kept(store):
    """Share of rows that are kept."""
    return store.kept_rows / store.rows


def test_order_does_not_depend_on_timing(store, monkeypatch):
    straight = take(store, 20)
    read = ArrayReader._read_part

    def slow(self, *args):
        time.sleep(np.random.default_rng().uniform(0, 0.01))
        read(self, *args)

    monkeypatch.setattr(ArrayReader, "_read_part", slow)
    with Stream(store, (HOOK,), 48, OPTIONS, 0) as stream:
        again = []
        for i in range(20):
            time.sleep(0.005 * (i % 3))
            again.append((next(stream).copy(), stream.state))
        assert stream.wait_seconds > 0
    same(again, straight)


def test_restoring_reads_no_skipped_window(store, monkeypatch):
    read, scatter = [], type(store).scatter
    monkeypatch.setattr(type(store), "scatter", lambda self, array, spans, slots, out: (
        read.append(sum(b - a for a, b in spans)), scatter(self, array, spans, slots, out))[1])
    with Stream(store, (HOOK,), 5, StreamOptions(1, 32), StreamState(3, ((0, 15, 4),))) as stream:
        next(stream)
    assert sum(read) <= 32 * 3


def test_several_hookpoints_side_by_side(store, rows, number_of):
    hooks, order = tuple(name for name, _ in HOOKS), []
    for x, _ in take(store, 8, hooks=hooks):
        n = number_of(x[:, :24])
        assert np.array_equal(bits(x[:, 24:]), bits(rows.acts[hooks[1]]).reshape(-1, 12)[n])
        order.append(n)
    assert np.array_equal(np.concatenate(order), np.concatenate([number_of(x) for x, _ in take(store, 8)]))


def test_outliers_are_left_out_on_request(tmp_path, number_of):
    rows = Rows()
    rows.acts[HOOK][3, 5], rows.acts[HOOK][20, 5] = 100.0, 200.0
    rows.keep[[3, 20], 5] = True
    store = make_store(tmp_path / "s", rows=rows)
    number = {row.tobytes(): n for n, row in enumerate(bits(rows.acts[HOOK]).reshape(-1, 24))}
    n, options = store.kept_rows, StreamOptions(4, 10_000)
    with_them, without = ([number[row.tobytes()] for row in bits(take(store, 1, n, o)[0][0])]
                          for o in (options, StreamOptions(4, 10_000, mask_outliers=True)))
    unusual = {3 * CONTEXT + 5, 20 * CONTEXT + 5}
    assert sorted(with_them) == sorted(set(with_them)) and set(with_them) - set(without) == unusual
    for i, (one, other) in enumerate(zip(with_them, without, strict=True)):  # another row of the window in their place only
        assert other == (with_them[(i + 1) % n] if one in unusual else one)


@pytest.mark.parametrize("size", [16, 24])
def test_a_stream_that_leaves_outliers_out_goes_on_with_the_same_bits(tmp_path, size):
    rows = Rows()
    rows.acts[HOOK][::3, 5], rows.keep[::3, 5] = 100.0, True
    store, options = make_store(tmp_path / "s", rows=rows), StreamOptions(2, 64, mask_outliers=True)
    straight = take(store, 30, size, options)
    assert max(np.abs(x.astype(np.float32)).max() for x, _ in straight) < 100
    for i in (1, 2, 5, 17):
        same(take(store, 30 - i, size, options, state=straight[i - 1][1]), straight[i:])


def test_two_streams_over_one_store_do_not_disturb_each_other(store):
    alone = take(store, 10), take(store, 10, 33, state=7)
    with Stream(store, (HOOK,), 48, OPTIONS, 0) as a, Stream(store, (HOOK,), 33, OPTIONS, 7) as b:
        for one, two in zip(*alone, strict=True):
            assert np.array_equal(bits(next(a)), bits(one[0])) and np.array_equal(bits(next(b)), bits(two[0]))


@pytest.mark.parametrize("data", [1, 2, 8])
def test_batches_on_devices_are_not_overwritten(store, data):
    """The memory of a batch is used again: what lies on devices is a copy."""
    where = sharding.sharding(sharding.make_mesh(sharding.MeshOptions(data, 8 // data)), "rows_at_rest", None)
    with Stream(store, (HOOK,), 48, OPTIONS, 0, sharding.pieces_here(where, 48, 12)) as stream:
        held = [sharding.place_pieces(next(stream), where, 48, stream.lanes, stream.lane_rows) for _ in range(60)]
    for x_BD, (wanted, _) in zip(held, take(store, 60), strict=True):
        assert np.array_equal(np.asarray(x_BD.astype(jnp.float32)), wanted.astype(np.float32))


@pytest.mark.parametrize("devices, size, pieces", [(range(8), 4, range(8)), (range(4, 8), 4, range(4, 8)), (range(2, 3), 16, [0]),
                                                   ([1, 6], 2, [2, 3, 12, 13])])
def test_pieces_of_a_process(devices, size, pieces):
    """32 rows over 8 devices, of which a process holds some."""
    class Some:
        def addressable_devices_indices_map(self, shape):
            return {d: (slice(4 * d, 4 * d + 4), slice(None)) for d in devices}

    assert sharding.pieces_here(Some(), 32, size) == list(pieces)


@pytest.mark.parametrize("rows, options, batch, lanes", [
    (10**6, StreamOptions(4, 65_536), 4096, 64),
    (10**6, StreamOptions(4, 65_536), 4096 + 32, 32),
    (10**6, StreamOptions(4, 65_536), 4097, 1),
    (10**6, StreamOptions(4, 10_000), 4096, 16),    # 19 blocks to a window
    (10**6, StreamOptions(4, 400), 4096, 1),        # no whole block
    (70_000, StreamOptions(4, 65_536), 4096, 64),   # two blocks of 512 rows for every lane
    (60_000, StreamOptions(4, 65_536), 4096, 1),    # all of it is one window
])
def test_lanes_that_fit(rows, options, batch, lanes):
    assert RowOrder.for_batches(rows, 128, options, batch).lanes == lanes


@pytest.mark.parametrize("batch, lanes, processes, times", [(4096, 64, 16, 1.0), (4096, 64, 64, 1.0), (4096, 64, 128, 2.0),
                                                            (4096, 1, 4, 4.0), (6144, 64, 3, 66 / 64)])
def test_reading_over(batch, lanes, processes, times):
    found = order_module.amplification(batch, lanes, processes)
    assert found == pytest.approx(times) and found <= 1 + processes / lanes


@pytest.mark.parametrize("name", ["demo", "demo_relu", "quality", "frontier", "smollm2_pod"])
def test_batches_of_the_shipped_configs_are_drawn_from_many_contexts(name):
    [config] = config_flag.config_of("plan", [f"--config={ROOT / 'configs' / name}.py"], takes_config=True)[:1]
    assert order_module.contexts_of_a_batch(config) >= min(config.train.batch / 16, 4096)


def test_an_error_in_a_thread_reaches_the_consumer(store, monkeypatch):
    def fail(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(ArrayReader, "_place_part", fail)
    with Stream(store, (HOOK,), 10, OPTIONS, 0) as stream:
        for _ in range(2):
            with pytest.raises(MemoryError, match="no room"):
                next(stream)


def test_close_joins_the_threads_and_ends_the_stream(store):
    before = threading.active_count()
    stream = Stream(store, (HOOK,), 10, OPTIONS, 0)
    next(stream)
    stream.close()
    stream.close()
    assert threading.active_count() <= before
    with pytest.raises(StopIteration):
        next(stream)


@pytest.mark.parametrize("lanes, batch, message", [
    (((0, 99, 0),), 10, "window 99"), (((0, 0, 10**6),), 10, "row 1000000"), (((-1, 0, 0),), 10, "epoch -1"),
    (((0, 0, 0),) * 64, 64, "fewer than 64 lanes"), (((0, 0, 0),) * 4, 50, "use a multiple of 4"),
    (((0, 0, 0),), 0, "of 0 rows")])
def test_bad_states_say_so(store, lanes, batch, message):
    with pytest.raises(StoreError, match=message):
        Stream(store, (HOOK,), batch, OPTIONS, StreamState(0, lanes))


def test_bad_requests_say_so(store, tmp_path):
    with pytest.raises(StoreError, match="holds blocks.0"):
        Stream(store, ("blocks.7.hook_resid_post",), 10, OPTIONS, 0)
    rows = Rows()
    rows.keep[:] = False
    rows.keep[0, 3] = True
    with Stream(make_store(tmp_path / "s", rows=rows), (HOOK,), 2, StreamOptions(1, 64), 0) as stream:
        assert stream.order.lanes == 2
        with pytest.raises(StoreError, match="in lane 1 is masked"):
            next(stream)


def test_one_row_in_a_lane_is_enough(tmp_path):
    """Where its window is the first of an epoch and the last of the next one, all those between are empty."""
    rows = Rows()
    rows.keep[:] = False
    rows.keep[:2, 3] = True
    with Stream(make_store(tmp_path / "s", rows=rows), (HOOK,), 2, StreamOptions(1, 64), 0) as stream:
        assert stream.order.lanes == 2 and stream.order.windows_of(0) == 10
        for epoch in range(30):
            assert np.array_equal(bits(next(stream)), bits(rows.acts[HOOK][:2, 3])), epoch


def test_golden_order(store, number_of):
    """Resuming relies on this order: if it changes on purpose, raise ORDER_VERSION in order.py."""
    assert order_module.ORDER_VERSION == 3
    assert number_of(take(store, 1, 8, StreamOptions(2, 64))[0][0]).tolist() == [524, 530, 523, 543, 187, 184, 161, 178]
