"""Files made to harm, or harmed on their way: every one is refused with one line, nothing runs, nothing large is allocated."""

import io
import json
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

import saejax
from saejax.base.errors import FormatError
from saejax.formats.archives import open_torch
from saejax.formats.safetensors_file import open_safetensors
from tests.formats.building import (
    archive_of,
    common,
    f32,
    linear,
    safetensors_bytes,
    torch_save,
    weights,
)

GOOD = f32(common(weights()))
MARK = "ran.txt"


def header(table, data=b"", length=None):
    text = json.dumps(table).encode() if isinstance(table, dict) else table
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape, begin, end, dtype="F32", **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


SAFETENSORS = {
    "empty": b"",
    "seven bytes": b"1234567",
    "header of 2^63 bytes": struct.pack("<Q", 1 << 63) + b"{}",
    "header beyond the file": header(b"{}", length=999),
    "header that is no JSON": header(b"{nope"),
    "header that is a list": header(b"[]"),
    "deeply nested header": header(b'{"a":' * 50_000),
    "name twice": header(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4
    ),
    "overlap": header({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"\0" * 12),
    "hole": header({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"\0" * 12),
    "rest behind the last": header({"a": entry([1], 0, 4)}, b"\0" * 8),
    "truncated": safetensors_bytes(GOOD)[:-7],
    "half downloaded": safetensors_bytes(GOOD)[: len(safetensors_bytes(GOOD)) // 2],
    "huge": header({"a": entry([1 << 40, 1 << 5], 0, 1 << 47)}, b"\0" * 4),
    "shape that overflows": header({"a": entry([1 << 47, 1 << 47], 0, 4)}, b"\0" * 4),
    "negative": header({"a": entry([-1], 0, -4)}),
    "offsets swapped": header({"a": entry([1], 4, 0)}, b"\0" * 4),
    "shape and bytes differ": header({"a": entry([3], 0, 4)}, b"\0" * 4),
    "dtype of a newer schema": header({"a": entry([4], 0, 4, "F8_E4M3")}, b"\0" * 4),
    "boolean for a number": header({"a": entry([True], 0, 4)}, b"\0" * 4),
    "key of a newer schema": header({"a": entry([1], 0, 4, compressed=True)}, b"\0" * 4),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors(tmp_path, name):
    (tmp_path / "a.safetensors").write_bytes(SAFETENSORS[name])
    tracemalloc.start()
    with pytest.raises(FormatError, match="a.safetensors"):
        open_safetensors(tmp_path / "a.safetensors")
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


class Runs:
    """Pickled, it writes a file when it is loaded."""

    def __init__(self, function, *arguments):
        self.pickled = function, arguments

    def __reduce__(self):
        return self.pickled


def written(path):
    """What `Runs(written, ...)` would do."""
    Path(path).write_text("x")


def pickles(path):
    import os

    mark = str(path / MARK)
    return {
        "a call of the os": pickle.dumps(Runs(os.system, f"touch {mark}"), 2),
        "eval": pickle.dumps(Runs(eval, "1"), 2),
        "inside a dict": pickle.dumps({"encoder.weight": Runs(written, mark)}, 2),
        "protocol 4": pickle.dumps(Runs(written, mark), 4),
        "protocol 0": pickle.dumps(Runs(written, mark), 0),
        "an instance": b"(c__main__\nX\no.",
        "inst": b"(S'a'\ni__builtin__\neval\n.",
        "a numpy array": pickle.dumps({"a": np.ones(3)}, 2),
        "a set": pickle.dumps({"a": {1, 2}}, 4),
        "build on a dict": b"\x80\x02}X\x01\x00\x00\x00aK\x01s}X\x09\x00\x00\x00__class__K\x01sb.",
        "a reduce of what is no name": b"\x80\x02K\x01)R.",
        "no end": b"\x80\x02}",
        "empty": b"",
        "underflow": b"\x80\x02s.",
        "text": b"hello",
        "memo that is not there": b"\x80\x02h\x07.",
        "stack of two": b"\x80\x02}}.",
        "extension": b"\x80\x02\x82\x01.",
        "a list": b"\x80\x02].",
        "unhashable key": b"\x80\x02}](K\x01u.",
        "rebuild without storage": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00)tR.",
    }


@pytest.mark.parametrize("name", pickles(Path("x")))
def test_pickles(tmp_path, name):
    archive_of(tmp_path / "ae.pt", {"data.pkl": pickles(tmp_path)[name], "byteorder": b"little"})
    with pytest.raises(FormatError, match="ae.pt"):
        saejax.load(tmp_path)
    assert not (tmp_path / MARK).exists()


def storage_pickle(count=4, shape=(4,), strides=(1,), start=0, key="0"):
    """The pickle of {"a": tensor} with the numbers given."""

    def whole(n):
        return b"\x8a\x08" + struct.pack("<q", n)

    def text(s):
        return b"X" + struct.pack("<I", len(s)) + s.encode()

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + whole(count) + b"tQ"
    numbers = b"(" + b"".join(map(whole, shape)) + b"t(" + b"".join(map(whole, strides)) + b"t"
    return b"\x80\x02}" + text("a") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + whole(start) + numbers + b"\x89NtRs."


@pytest.mark.parametrize(
    "change",
    [
        {"count": 5},
        {"count": 1 << 60},
        {"shape": (5,)},
        {"start": 1},
        {"shape": (1 << 40,)},
        {"shape": (-1,)},
        {"strides": (-1,)},
        {"shape": (4, 4), "strides": (0, 1)},
        {"shape": (2,), "strides": (2,)},
        {"shape": (2, 2)},
        {"key": "../0"},
        {"key": "1"},
        {"key": "/etc/passwd"},
        {"shape": (2, 2), "strides": (1 << 47, 1)},
    ],
)
def test_torch_tensors(tmp_path, change):
    archive_of(tmp_path / "ae.pt", {"data.pkl": storage_pickle(), "data/0": b"\0" * 16})
    assert open_torch(tmp_path / "ae.pt").read("a").shape == (4,)
    archive_of(tmp_path / "ae.pt", {"data.pkl": storage_pickle(**change), "data/0": b"\0" * 16})
    with pytest.raises(FormatError, match="ae.pt"):
        open_torch(tmp_path / "ae.pt")


def test_torch_archives(tmp_path):
    path = tmp_path / "ae.pt"
    good = {"data.pkl": storage_pickle(), "data/0": b"\0" * 16}
    for members, compression, message in (
        (good, zipfile.ZIP_DEFLATED, "is compressed"),
        ({"x": b""}, zipfile.ZIP_STORED, "no data.pkl"),
        (good | {"byteorder": b"big"}, zipfile.ZIP_STORED, "only little-endian"),
    ):
        archive_of(path, members, compression=compression)
        with pytest.raises(FormatError, match=message):
            open_torch(path)
    archive_of(path, good)
    whole = path.read_bytes()
    for data, message in (
        (whole[: len(whole) // 2], "half-downloaded"),
        (pickle.dumps({"a": 1}, 2), "not a readable zip"),
        (b"", "zip"),
    ):
        path.write_bytes(data)
        with pytest.raises(FormatError, match=message):
            open_torch(path)
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        for _ in range(2):
            archive.writestr("archive/data.pkl", storage_pickle())
    with pytest.raises(FormatError, match="name twice"):
        open_torch(path)


@pytest.mark.parametrize(
    "name, arrays",
    [
        ("object array", {"W_enc": np.array([{"a": 1}], object)}),
        ("text", {"W_enc": np.array(["abc"])}),
        ("no W_enc", {"W_dec": np.ones((2, 2), np.float32)}),
        ("complex", {"W_enc": np.ones((2, 2), complex)}),
        ("big-endian", {"W_enc": np.ones((2, 2), ">f4")}),
        ("empty", {"W_enc": np.ones((0, 2), np.float32), "W_dec": np.ones((2, 0))}),
        ("W_dec of another width", f32(weights(10))),
        ("no threshold", GOOD),
    ],
)
def test_npz(tmp_path, name, arrays):
    np.savez(tmp_path / "params.npz", **arrays)
    with pytest.raises(FormatError, match="params.npz"):
        saejax.load(tmp_path)


def test_npz_that_lies(tmp_path):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 4)})
    archive_of(tmp_path / "params.npz", {"W_enc.npy": buffer.getvalue()}, root="")
    with pytest.raises(FormatError, match="0 bytes for shape"):
        saejax.load(tmp_path)
    np.savez_compressed(tmp_path / "params.npz", **f32(weights()))
    with pytest.raises(FormatError, match="is compressed"):
        saejax.load(tmp_path)


def test_torch_file_that_no_format_takes_says_why(tmp_path):
    torch_save(tmp_path / "8.pt", linear(weights(), pre_bias="b_dec"))
    whole = (tmp_path / "8.pt").read_bytes()
    (tmp_path / "8.pt").write_bytes(whole[:-100])
    with pytest.raises(FormatError, match="8.pt: not a readable zip archive .* half-downloaded"):
        saejax.load(tmp_path / "8.pt")
    archive_of(tmp_path / "8.pt", {"data.pkl": pickles(tmp_path)["a call of the os"]})
    with pytest.raises(FormatError, match="asks for 'posix.system'; only tensors and plain containers are read, no code is run"):
        saejax.load(tmp_path)
    assert not (tmp_path / MARK).exists()
