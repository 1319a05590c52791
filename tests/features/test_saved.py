"""What an interrupted build leaves: states file by file, on any mesh and by any number of processes, of one source only."""

import dataclasses
import shutil
import subprocess
import sys
import tracemalloc

import jax
import numpy as np
import pytest

from saejax.base import sharding
from saejax.base.errors import FeatureIndexError
from saejax.base.records import MeshOptions
from saejax.features.index import saved, tables
from saejax.features.index import state as st
from saejax.features.index.build import PROGRESS, BuildOptions, build
from saejax.features.index.saved import SavedState, save
from saejax.features.index.state import FIELDS, FeatureState
from tests.features.conftest import make_sae, other_lm
from tests.processes import environment, free_port

SOURCE = {"sae": {"fingerprint": "a" * 64}, "corpus": {"digest": "b" * 64}}
F, PART = 48, 7


def mesh_of(data: int, dict_: int):
    return sharding.make_mesh(MeshOptions(data, dict_), jax.devices()[:data * dict_])


def host_state(features: int = F) -> FeatureState:
    """Any bits: what is saved is not looked at."""
    rng = np.random.default_rng(features)
    return FeatureState(**{name: rng.integers(0, 2**30, (features, *shape)).astype(dtype)
                           for name, (shape, dtype, _) in ((name, getattr(st.SHAPES, name)) for name in FIELDS)})


def on(mesh, state: FeatureState) -> FeatureState:
    return FeatureState(**{name: sharding.place(getattr(state, name), sharding.sharding(mesh, *logical))
                           for name, logical in st.LOGICAL.items()})


def assert_same(a, b) -> None:
    for name in FIELDS:
        np.testing.assert_array_equal(np.asarray(getattr(a, name)), np.asarray(getattr(b, name)), err_msg=name)


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (1, 8), (8, 1)])
def test_a_saved_state_is_read_onto_any_mesh(shape, tmp_path, monkeypatch):
    monkeypatch.setattr(saved, "PART", PART)
    state = host_state()
    save(tmp_path, on(mesh_of(*shape), state), 3, SOURCE)
    found = SavedState.open(tmp_path, SOURCE)
    assert found.contexts == 3 and found.features == F and len(list((tmp_path / "state_3").iterdir())) >= F // PART
    for other in ((1, 1), (4, 2), (1, 8), (2, 2)):
        placed = found.placed(mesh_of(*other))
        assert_same(placed, state)
        assert {s.data.shape[0] for s in placed.sketch.addressable_shards} == {F // other[1]}
    for first, stop in ((0, F), (0, 1), (6, 9), (5, 31), (47, 48)):
        assert_same(found.block(first, stop), jax.tree.map(lambda x, a=first, b=stop: x[a:b], state))
    np.testing.assert_array_equal(found.column("sketch"), state.sketch)


def test_the_last_saving_counts_and_is_the_only_one_left(tmp_path):
    assert SavedState.open(tmp_path, SOURCE) is None
    first, second = host_state(), jax.tree.map(lambda x: x + 1, host_state())
    save(tmp_path, on(mesh_of(1, 2), first), 3, SOURCE)
    (tmp_path / "state_5").mkdir()
    (tmp_path / "state_5" / "0.npz").write_bytes(b"half")  # a saving that was interrupted
    found = SavedState.open(tmp_path, SOURCE)
    assert found.contexts == 3
    assert_same(found.placed(mesh_of(1, 1)), first)
    save(tmp_path, on(mesh_of(1, 2), second), 5, SOURCE)
    assert_same(SavedState.open(tmp_path, SOURCE).block(0, F), second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.json", "state_5"]


def test_the_host_holds_files_not_the_state(tmp_path, monkeypatch):
    """What numpy allots beside the devices' shards: two files of the sixteen."""
    monkeypatch.setattr(saved, "PART", 512)
    features = 16 * 512
    mesh, size = mesh_of(1, 8), 512 * st.BYTES_PER_FEATURE
    state = on(mesh, host_state(features))
    save(tmp_path, state, 1, SOURCE), SavedState.open(tmp_path, SOURCE).placed(mesh)  # compiled
    tracemalloc.start()
    try:
        found = save(tmp_path, state, 1, SOURCE)
        writing = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        placed = found.placed(mesh)
        reading = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert writing < 2 * size and reading < 4 * size, (writing / size, reading / size)
    assert_same(placed, state)


@pytest.mark.parametrize("damage, message", [
    (lambda file: file.unlink(), "7.npz: not readable"),
    (lambda file: file.write_bytes(file.read_bytes()[:-900]), "7.npz: not readable"),
    (lambda file: file.write_bytes(file.read_bytes().replace(b"\x93NUMPY", b"\x93NUMPX")), "7.npz: not readable"),
    (lambda file: flip(file, 5000), "7.npz: not readable"),
    (lambda file: shutil.copy(file.with_name("0.npz"), file), "7.npz: holds features from 0 on after 3 contexts, expected 7"),
    (lambda file: shutil.copy(file.parents[1] / "old" / "7.npz", file), "7.npz: holds.* after 2 contexts, expected 7 and 3"),
])
def test_damaged_states_are_named(damage, message, tmp_path, monkeypatch):
    monkeypatch.setattr(saved, "PART", PART)
    state = on(mesh_of(1, 1), host_state(14))
    save(tmp_path, state, 2, SOURCE)
    shutil.copytree(tmp_path / "state_2", tmp_path / "old")
    save(tmp_path, state, 3, SOURCE)
    damage(tmp_path / "state_3" / "7.npz")
    found = SavedState.open(tmp_path, SOURCE)
    found.block(0, 7)
    with pytest.raises(FeatureIndexError, match=message) as raised:
        found.block(0, 14)
    assert "\n" not in str(raised.value)


def flip(file, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.fixture(scope="module")
def halves(words, lm_, sae, tmp_path_factory):
    """Unfinished indices after their second pass: of this checkpoint, another one, another text, another model."""
    made = {"this": (sae, words, lm_), "checkpoint": (make_sae(sharding.single_device_mesh(), seed=1), words, lm_),
            "corpus": (sae, dataclasses.replace(words, digest="x" * 64), lm_),
            "model": (sae, dataclasses.replace(words, model_digest="0" * 64), other_lm(lm_))}
    folder, write = tmp_path_factory.mktemp("halves"), tables.write

    def stopped(*_):
        raise KeyboardInterrupt

    tables.write = stopped
    try:
        for name, given in made.items():
            with pytest.raises(KeyboardInterrupt):
                build(folder / name, *given, BuildOptions(rows=512, progress=False))
    finally:
        tables.write = write
    return folder, made


FILES = ("source.json", "state.json", "state_*/0.npz", "windows.json", "features_all/00000.parquet")


@pytest.mark.parametrize("other", ["checkpoint", "corpus", "model"])
@pytest.mark.parametrize("name", FILES)
def test_parts_of_two_indices_are_refused(name, other, halves, tmp_path):
    folder, made = halves
    shutil.copytree(folder / "this", tmp_path / "index")
    (file,) = (tmp_path / "index" / PROGRESS).glob(name)
    (theirs,) = (folder / other / PROGRESS).glob(name)
    shutil.copy(theirs, file)
    with pytest.raises(FeatureIndexError) as raised:
        build(tmp_path / "index", *made["this"], BuildOptions(rows=512, progress=False))
    said = str(raised.value)
    assert said.startswith(f"{file}: part of an unfinished index of another {other} (") and "\n" not in said
    assert "; delete it" in said and said.count("another ") == 2, "what differs, and another directory"


def test_a_build_goes_on_at_the_end_of_what_is_there(halves, index, tmp_path):
    folder, made = halves
    shutil.copytree(folder / "this", tmp_path / "index")
    assert build(tmp_path / "index", *made["this"], BuildOptions(rows=512, progress=False)).manifest == index.manifest
    shutil.copytree(folder / "this", tmp_path / "older")
    (tmp_path / "older" / PROGRESS / "source.json").write_text('{"digest": "x"}')
    with pytest.raises(FeatureIndexError, match="source.json: part of an unfinished index of another version of saejax"):
        build(tmp_path / "older", *made["this"])


WORKER = """
import sys
from pathlib import Path
import jax, numpy as np
port, process, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process, initialization_timeout=60)
from saejax.features.index import saved
from saejax.features.index.build import Savings
from tests.features.test_saved import PART, SOURCE, host_state, mesh_of, on
saved.PART = PART
written, replacing = [], saved.replacing
saved.replacing = lambda file: (written.append(int(file.stem)), replacing(file))[1]
state = on(mesh_of(1, 4), host_state())
found = saved.save(out, state, 3, SOURCE)
assert written and all(24 * process <= first < 24 * process + 24 for first in written), written
again = saved.SavedState.open(out, SOURCE).placed(mesh_of(2, 2))
for a, name in ((getattr(again, name), name) for name in saved.FIELDS):
    for shard in a.addressable_shards:
        np.testing.assert_array_equal(shard.data, getattr(host_state(), name)[shard.index])
np.testing.assert_array_equal(found.block(20, 30).sketch, host_state().sketch[20:30])
for mine, expected in (((0.0, 1e9), True), ((1e9, 0.0), False)):  # by the clock of process 0
    assert Savings(100, mine[process]).due(1) is expected
savings = Savings(100, 1e9)
assert [savings.due(40) for _ in range(3)] == [False, False, True]
savings.begin()
assert not savings.due(40)
print("done", written)
"""


@pytest.mark.slow
def test_each_process_writes_what_its_devices_hold(tmp_path):
    port = free_port()
    jobs = [subprocess.Popen([sys.executable, "-c", WORKER, str(port), str(i), str(tmp_path)], env=environment(2), text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(2)]
    try:
        for job in jobs:
            out, err = job.communicate(timeout=200)
            assert job.returncode == 0 and "done" in out, err[-3000:]
    finally:
        for job in jobs:
            job.kill()
    assert_same(SavedState.open(tmp_path, SOURCE).placed(mesh_of(2, 4)), host_state())
