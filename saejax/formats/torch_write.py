"""Writes a state dict as `torch.save` would, without torch: a zip of plain bytes and a pickle of some 20 opcodes.

What comes out holds tensors only, so `torch.load(weights_only=True)` reads it.
"""

import io
import struct
import zipfile
from collections.abc import Mapping

import numpy as np

_STORAGES = {"float32": "FloatStorage", "int32": "IntStorage", "int64": "LongStorage"}
_ROOT = "ae"


def torch_file(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of a `.pt` file that holds a dict of contiguous tensors (float32, int32, int64)."""
    pickle = b"\x80\x02}(" + b"".join(_text(name) + _tensor(key, np.ascontiguousarray(value) if value.ndim else value)
                                      for key, (name, value) in enumerate(arrays.items())) + b"u."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in (("data.pkl", pickle), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(_member(name), data)
        for key, value in enumerate(arrays.values()):
            archive.writestr(_member(f"data/{key}"), np.ascontiguousarray(value).tobytes())
    return buffer.getvalue()


def _member(name: str) -> zipfile.ZipInfo:
    """Without a time: equal arrays give equal files."""
    return zipfile.ZipInfo(f"{_ROOT}/{name}", (1980, 1, 1, 0, 0, 0))


def _tensor(key: int, value: np.ndarray) -> bytes:
    """torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())."""
    storage = (b"(" + _text("storage") + _global("torch", _STORAGES[value.dtype.name]) + _text(str(key)) + _text("cpu")
               + _number(value.size) + b"tQ")
    strides = [s // value.itemsize for s in value.strides]
    return (_global("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + _number(0) + _tuple(value.shape) + _tuple(strides)
            + b"\x89" + _global("collections", "OrderedDict") + b")R" + b"tR")


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"J" + struct.pack("<i", value) if value < 1 << 31 else b"\x8a" + bytes([len(data)]) + data


def _tuple(values) -> bytes:
    return b"(" + b"".join(map(_number, values)) + b"t"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()
