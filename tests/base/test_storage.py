"""Files are whole or absent, names cannot leave their directory, fingerprints see every bit and no mesh."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saejax.base import sharding, storage
from saejax.base.errors import DiskError, SaejaxError
from saejax.base.fingerprints import _fingerprints, fingerprints
from saejax.base.records import MeshOptions

MESHES = [(1, 1), (1, 8), (8, 1), (2, 4)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_fingerprint_is_the_same_on_every_mesh(dtype):
    x = (np.random.default_rng(0).standard_normal((16, 24)) * 3).astype(jnp.dtype(dtype))
    values = set()
    for shape in MESHES:
        mesh = sharding.make_mesh(MeshOptions(*shape), jax.devices()[: shape[0] * shape[1]])
        values.add(fingerprints({"x": sharding.place(x, sharding.sharding(mesh, "rows", "features"))})["x"])
    assert len(values) == 1


@settings(deadline=None, max_examples=30)
@given(bit=st.integers(0, 16 * 24 * 32 - 1))
def test_fingerprint_sees_every_bit(bit):
    x = np.random.default_rng(0).standard_normal((16, 24)).astype(np.float32)
    y = np.frombuffer(x.tobytes(), np.uint32).copy()
    y[bit // 32] ^= np.uint32(1) << np.uint32(bit % 32)
    y = y.view(np.float32).reshape(x.shape)
    assert fingerprints({"x": jnp.asarray(x)}) != fingerprints({"x": jnp.asarray(y)})


def test_fingerprint_sees_swapped_rows():
    x = np.arange(24, dtype=np.float32).reshape(6, 4)
    assert fingerprints({"x": jnp.asarray(x)}) != fingerprints({"x": jnp.asarray(x[[1, 0, 2, 3, 4, 5]])})


def test_a_fingerprint_takes_no_memory_of_its_own():
    """Each of two sums by itself would keep what both are of: an array as large as the leaf."""
    mesh = sharding.make_mesh(MeshOptions(2, 4))
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((4096, 256), jnp.float32, sharding=sharding.sharding(mesh, "rows", "features"))
        used = _fingerprints.lower([x]).compile().memory_analysis()
    assert used.argument_size_in_bytes == 4096 * 256 * 4 // 8 and used.temp_size_in_bytes < 4096


def test_failed_write_leaves_the_old_file(tmp_path):
    storage.write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(ValueError):
        storage.write_json(tmp_path / "a.json", {"bad": float("nan")})
    assert storage.read_json(tmp_path / "a.json") == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_disk_full_is_one_line_and_leaves_nothing(tmp_path):
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "from saejax.base import storage\nfrom saejax.base.errors import DiskError\n"
            f"try: storage.write_bytes({str(tmp_path / 'big')!r}, b'x' * 5000)\n"
            "except DiskError as e: print(e); sys.exit(7)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 7, done.stderr
    assert "big" in done.stdout and "File too large" in done.stdout and done.stdout.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_unwritable_directory(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(DiskError, match=f"{name}: a file or a dangling link"):
            storage.write_bytes(tmp_path / name / "x", b"")


@pytest.mark.parametrize("name", ["..", "../x", "/etc/passwd", "a/../../b", "-rf", ".hidden", "a\x00b", "a b", ""])
def test_unsafe_names_are_refused(tmp_path, name):
    with pytest.raises(SaejaxError):
        storage.safe_name(name)
    if name:
        with pytest.raises(SaejaxError):
            storage.inside(tmp_path, name)


def test_nothing_below_a_root_is_the_root(tmp_path):
    assert storage.inside(tmp_path, "") == tmp_path
    assert storage.inside(tmp_path, "a/b") == tmp_path / "a" / "b"


def test_links_out_are_refused(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    with pytest.raises(SaejaxError, match="outside"):
        storage.inside(tmp_path / "root", "link/file")


def test_text_digest_separates_parts():
    assert storage.text_sha256("ab", "c") != storage.text_sha256("a", "bc")


def test_reserved_room_is_there_or_refused(tmp_path):
    storage.reserve(tmp_path / "file", 10_000)
    assert (tmp_path / "file").read_bytes() == bytes(10_000) and (tmp_path / "file").stat().st_blocks * 512 >= 10_000
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            "from saejax.base import storage\nstorage.reserve(sys.argv[1], 2000)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "large")], capture_output=True, text=True)
    assert "DiskError" in done.stderr and "File too large" in done.stderr
