"""Files of other libraries, built from the description of their layout with numpy alone, and their formulas in float64."""

import collections
import json
import pickle
import struct
import sys
import types
import zipfile

import numpy as np

import saejax
from saejax.formats.loading import recognise

D, F, ROWS = 12, 40, 24
_CODES = {np.dtype("f4"): "F32", np.dtype("f2"): "F16", np.dtype("f8"): "F64", np.dtype("i8"): "I64", np.dtype("u2"): "BF16"}


def weights(d_out=D, seed=0):
    """W_enc [D, F], b_enc, W_dec [F, d_out] with rows that are not unit, b_dec, threshold [F]: float64 that float32 holds."""
    rng = np.random.default_rng(seed)
    values = {
        "W_enc": rng.standard_normal((D, F)) * 0.4,
        "b_enc": rng.standard_normal(F) * 0.3,
        "W_dec": rng.standard_normal((F, d_out)) * rng.uniform(0.3, 2, (F, 1)),
        "b_dec": rng.standard_normal(d_out),
        "threshold": rng.uniform(0.2, 1.5, F),
    }
    return {name: value.astype(np.float32).astype(np.float64) for name, value in values.items()}


def inputs(seed=1):
    return (np.random.default_rng(seed).standard_normal((ROWS, D)) * 1.5 + 0.3).astype(np.float32)


def pre(w, x, centred):
    return (x - w["b_dec"] if centred else x) @ w["W_enc"] + w["b_enc"]


def relu(z):
    return np.maximum(z, 0)


def jump(z, threshold):
    return np.where(z > threshold, relu(z), 0)


def topk(z, k, by=None):
    """The k largest of each row (by `by`), then ReLU."""
    order = np.argsort(-(z if by is None else by), axis=1)[:, :k]
    out = np.zeros_like(z)
    np.put_along_axis(out, order, np.take_along_axis(relu(z), order, 1), 1)
    return out


def layer_norm(x):
    """(normalised, std, mean): unbiased std, 1e-5 added going in."""
    mean, std = x.mean(1, keepdims=True), x.std(1, keepdims=True, ddof=1)
    return (x - mean) / (std + 1e-5), std, mean


def f32(values):
    return {name: np.ascontiguousarray(value, np.float32) for name, value in values.items()}


def bf16(value):
    """Bits of bfloat16 (truncated) of float32 values."""
    return (np.ascontiguousarray(value, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def safetensors_bytes(tensors, header=None):
    table, data = {}, b""
    for name, value in tensors.items():
        value = np.ascontiguousarray(value) if np.ndim(value) else np.asarray(value)
        raw = value.tobytes()
        table[name] = {
            "dtype": _CODES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(table | (header or {})).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_safetensors(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(safetensors_bytes(tensors))


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


class _Storage:
    def __init__(self, value):
        self.value = value


class _Tensor:
    """Pickles as torch pickles a tensor."""

    def __init__(self, value):
        self.value = np.asarray(value)

    def __reduce__(self):
        flat = self.value if self.value.flags.c_contiguous else self.value.T
        strides = tuple(s // self.value.itemsize for s in self.value.strides)
        return (
            sys.modules["torch._utils"]._rebuild_tensor_v2,
            (_Storage(flat), 0, self.value.shape, strides, False, collections.OrderedDict()),
        )


def _stand_ins():
    """Modules under torch's names for as long as a file is written: pickle looks the functions up."""
    torch, below = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in ("FloatStorage", "DoubleStorage", "HalfStorage", "LongStorage", "IntStorage"):
        setattr(torch, name, type(name, (), {"__module__": "torch", "__qualname__": name}))
    below._rebuild_tensor_v2 = types.FunctionType((lambda: 0).__code__, {}, "_rebuild_tensor_v2")
    below._rebuild_tensor_v2.__module__, below._rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    torch._utils = below
    return {"torch": torch, "torch._utils": below}


def torch_save(path, value):
    """A `.pt` file as `torch.save` writes it; numpy arrays anywhere in dicts and lists become tensors."""
    import io

    path.parent.mkdir(parents=True, exist_ok=True)
    storages, stand_ins = [], _stand_ins()
    kinds = {"f4": "FloatStorage", "f8": "DoubleStorage", "f2": "HalfStorage", "i8": "LongStorage", "i4": "IntStorage"}

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            if isinstance(thing, _Storage):
                storages.append(np.ascontiguousarray(thing.value))
                kind = getattr(stand_ins["torch"], kinds[thing.value.dtype.str[1:]])
                return ("storage", kind, str(len(storages) - 1), "cpu", thing.value.size)
            return None

    buffer, before = io.BytesIO(), {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        Pickler(buffer, 2).dump(_wrapped(value))
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name)
            else:
                sys.modules[name] = module
    archive_of(
        path,
        {
            "data.pkl": buffer.getvalue(),
            "byteorder": b"little",
            "version": b"3\n",
            **{f"data/{i}": s.tobytes() for i, s in enumerate(storages)},
        },
    )


def archive_of(path, members, root="archive/", compression=zipfile.ZIP_STORED):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(root + name, data)


def _wrapped(value):
    if isinstance(value, np.ndarray):
        return _Tensor(value)
    if isinstance(value, dict):
        return type(value)((k, _wrapped(v)) for k, v in value.items())
    return [_wrapped(v) for v in value] if isinstance(value, list) else value


def linear(w, **names):
    """Tensors in torch's Linear orientation: encoder.weight [F, D], decoder.weight [D, F]."""
    out = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T}
    return f32(out | {name: w[source] for name, source in names.items()})


def check(sae, x, acts, recon):
    """Same support, and 1e-4 at most: the promise for every format."""
    got_recon, got_acts = sae.reconstruct(x)
    np.testing.assert_array_equal(np.asarray(got_acts) > 0, acts > 0)
    assert 0 < (acts > 0).mean() < 0.95
    np.testing.assert_allclose(got_acts, acts, atol=1e-4, rtol=0)
    np.testing.assert_allclose(got_recon, recon, atol=1e-4, rtol=0)


def lens_config(**changes):
    """cfg.json of SAELens 6."""
    return {
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "architecture": "standard",
        "metadata": {"sae_lens_version": "6.54.12", "hook_name": "h", "context_size": 128, "prepend_bos": True},
    } | changes


def write_lens(path, tensors, **changes):
    write_safetensors(path / "sae_weights.safetensors", f32(tensors))
    write_json(path / "cfg.json", lens_config(**changes))


def common(w, *names):
    return {name: w[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec", *names)}


def loaded(path, name, **options):
    assert recognise(path) == name
    return saejax.load(path, **options)
