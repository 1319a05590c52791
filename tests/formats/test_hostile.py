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
from saejax.errors import FormatError
from saejax.formats.archives import open_torch
from saejax.formats.safetensors_file import open_safetensors
from tests.formats.building import (
    D,
    F,
    archive_of,
    f32,
    safetensors_bytes,
    torch_save,
    weights,
    write_json,
)

ROOT = Path(__file__).parent / "fixtures"
GOOD = {name: value for name, value in f32(weights()).items() if name != "threshold"}
CFG = {
    "d_in": D,
    "d_sae": F,
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "architecture": "standard",
    "metadata": {"sae_lens_version": "6.54.12"},
}
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


def lens(path, tensors=None, **changes):
    path.mkdir(exist_ok=True)
    (path / "sae_weights.safetensors").write_bytes(safetensors_bytes(GOOD | (tensors or {})))
    write_json(path / "cfg.json", CFG | changes)
    return path


def scaled():
    return {"scaling_factor": np.linspace(1, 2, F, dtype=np.float32)}


def nan(name):
    bad = GOOD[name].copy()
    bad.flat[3] = np.nan
    return {name: bad}


@pytest.mark.parametrize(
    "tensors, changes, message",
    [
        (nan("W_dec"), {}, "tensor W_dec holds NaN"),
        (scaled(), {}, "scaling_factor is not 1 for all features"),
        (nan("b_enc"), {}, "tensor b_enc holds NaN"),
        ({"W_enc": GOOD["W_enc"].T}, {}, "W_enc: F32 \\(40, 12\\), expected"),
        ({"../../outside": np.zeros(1, np.float32)}, {}, "../../outside: unexpected"),
        ({"threshold": np.zeros(F, np.float32)}, {}, "threshold: unexpected"),
        ({"W_dec": GOOD["W_dec"].astype(np.float64) + 1e-12}, {}, "W_dec is float64 and would lose values"),
        ({"b_enc": np.zeros(F, np.int64)}, {}, "b_enc: I64"),
        ({}, {"d_sae": 1 << 60}, "d_sae = 1152921504606846976"),
        ({}, {"d_sae": -3}, "d_sae = -3"),
        ({}, {"d_sae": True}, "d_sae is True"),
        ({}, {"d_in": 12.0}, "d_in is 12.0"),
        ({}, {"architecture": "gated"}, "b_mag: missing"),
        ({}, {"architecture": "topk", "k": 41}, "k=41 of 40 features"),
        ({}, {"architecture": "topk"}, "k is not there"),
        ({}, {"output_gain": 2.0}, "unknown key output_gain; written by a newer version"),
        ({}, {"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input is 'yes'"),
        ({}, {"normalize_activations": "expected_average_only_in"}, "the factor is not known"),
        ({}, {"reshape_activations": "conv"}, "reshape_activations 'conv' is not one of"),
        ({}, {"architecture": "batchtopk"}, "topk_threshold: missing"),
        ({}, {"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm=True"),
        ({}, {"metadata": [1]}, "metadata is \\[1\\]"),
    ],
)
def test_saelens(tmp_path, tensors, changes, message):
    with pytest.raises(FormatError, match=message):
        saejax.load(lens(tmp_path / "sae", tensors, **changes))


@pytest.mark.parametrize(
    "scaler, norm, message",
    [
        ({"scaling_factor": 2.0}, "none", "folded already or not is not known"),
        ({"scaling_factor": 2.0, "has_whitening": True}, "expected_average_only_in", "has_whitening=True"),
        ({"scaling_factor": None}, "expected_average_only_in", "scaling_factor is null"),
        ({"scaling_factor": -1.0}, "expected_average_only_in", "scaling_factor=-1.0"),
        ({"scaling_factor": 2.0, "offset": 1}, "expected_average_only_in", "unknown key offset"),
    ],
)
def test_saelens_scaler(tmp_path, scaler, norm, message):
    path = lens(tmp_path / "sae", normalize_activations=norm)
    write_json(path / "activation_scaler.json", scaler)
    with pytest.raises(FormatError, match=message):
        saejax.load(path)


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


def dictionary(path, change):
    values = {
        "encoder.weight": GOOD["W_enc"].T,
        "encoder.bias": GOOD["b_enc"],
        "decoder.weight": GOOD["W_dec"].T,
        "b_dec": GOOD["b_dec"],
        "k": np.array(4, np.int32),
        "threshold": np.array(0.5, np.float32),
    } | change.pop("tensors", {})
    torch_save(path / "ae.pt", values)
    write_json(path / "config.json", {"trainer": {"dict_class": "BatchTopKSAE", "k": 4} | change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dict_class": "AutoEncoder"}, "can be AutoEncoderTopK or BatchTopKSAE"),
        ({"k": 5}, "k=4 of 40 features, trainer.k=5"),
        ({"tensors": {"threshold": np.array(-1.0, np.float32)}}, "threshold that was never set"),
        ({"tensors": {"k": np.array(41, np.int32)}}, "k=41 of 40"),
        ({"tensors": {"scale": np.ones(F, np.float32)}}, "are those of none of"),
        ({"tensors": {"threshold": np.array(np.nan, np.float32)}}, "threshold holds NaN"),
        ({"tensors": {"note": "hi"}}, "unknown key note"),
        ({"dict_class": 7}, "trainer.dict_class is 7"),
    ],
)
def test_dictionary_learning(tmp_path, change, message):
    dictionary(tmp_path, dict(change))
    with pytest.raises(FormatError, match=message):
        saejax.load(tmp_path)


OPENAI = {
    "pre_bias": GOOD["b_dec"],
    "latent_bias": GOOD["b_enc"],
    "encoder.weight": GOOD["W_enc"].T,
    "decoder.weight": GOOD["W_dec"].T,
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"activation": "TopK", "activation_state_dict": {"k": 4, "postact_fn": "Identity"}}, "postact_fn='Identity'"),
        ({"activation": "TopK", "activation_state_dict": {"postact_fn": "ReLU"}}, "k=None"),
        ({"activation": "Sigmoid"}, "is not ReLU or TopK"),
        ({"activation": "TopK", "activation_state_dict": {"k": 4, "extra": 1}}, "with extra"),
        ({"gain": 2.0}, "unknown key gain"),
        ({"scale": np.ones(F, np.float32)}, "scale: unexpected"),
    ],
)
def test_openai(tmp_path, change, message):
    torch_save(tmp_path / "1.pt", OPENAI | change)
    with pytest.raises(FormatError, match=message):
        saejax.load(tmp_path / "1.pt")


MOSS = {
    "sae_type": "sae",
    "d_model": D,
    "expansion_factor": F / D,
    "act_fn": "relu",
    "norm_activation": "inference",
    "hook_point_in": "h",
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_glu_encoder": True}, "use_glu_encoder True is not one of"),
        ({"sae_type": "clt"}, "sae_type 'clt'"),
        ({"norm_activation": "batch-wise"}, "norm_activation 'batch-wise'"),
        ({"act_fn": "jumprelu"}, "neither a tensor of thresholds"),
        ({"norm_activation": "dataset-wise"}, "no dataset_average_activation_norm"),
        ({"d_model": 13}, "has W_enc for 12 and 40"),
        ({"act_fn": "topk"}, "top_k=0"),
        ({"gain": 1}, "unknown key gain"),
        ({"act_fn": "topk", "top_k": "all"}, "top_k is 'all'"),
    ],
)
def test_openmoss(tmp_path, change, message):
    tensors = {"W_E": GOOD["W_enc"], "b_E": GOOD["b_enc"], "W_D": GOOD["W_dec"], "b_D": GOOD["b_dec"]}
    (tmp_path / "sae_weights.safetensors").write_bytes(safetensors_bytes(tensors))
    write_json(tmp_path / "config.json", MOSS | change)
    with pytest.raises(FormatError, match=message):
        saejax.load(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"signed": True}, "signed=True"),
        ({"activation": "relu"}, "activation 'relu' is not one of"),
        ({"k": 200}, "k=200 does not fit"),
        ({"skip_connection": True}, "skip_connection=True without transcode"),
        ({"num_latents": 64}, "expected F32 or"),
        ({"activation": "groupmax", "k": 7}, "k=7 does not fit"),
        ({"temperature": 1}, "unknown key temperature"),
    ],
)
def test_sparsify(tmp_path, change, message):
    source = ROOT / "sparsify" / "topk"
    (tmp_path / "sae.safetensors").write_bytes((source / "sae.safetensors").read_bytes())
    write_json(tmp_path / "cfg.json", json.loads((source / "cfg.json").read_text()) | change)
    with pytest.raises(FormatError, match=message):
        saejax.load(tmp_path)


def test_gemma_scope_2(tmp_path):
    tensors = {n.replace("W_", "w_"): v for n, v in f32(weights()).items()}
    (tmp_path / "params.safetensors").write_bytes(safetensors_bytes(tensors))
    for change, message in (
        ({"architecture": "topk"}, "architecture 'topk'"),
        ({"affine_connection": True}, "lacks affine_skip_connection"),
        ({"input_scale": 2}, "unknown key input_scale"),
    ):
        write_json(tmp_path / "config.json", {"architecture": "jump_relu"} | change)
        with pytest.raises(FormatError, match=message):
            saejax.load(tmp_path)


def test_torch_file_that_no_format_takes_says_why(tmp_path):
    torch_save(tmp_path / "8.pt", OPENAI)
    whole = (tmp_path / "8.pt").read_bytes()
    (tmp_path / "8.pt").write_bytes(whole[:-100])
    with pytest.raises(FormatError, match="8.pt: not a readable zip archive .* half-downloaded"):
        saejax.load(tmp_path / "8.pt")
    archive_of(tmp_path / "8.pt", {"data.pkl": pickles(tmp_path)["a call of the os"]})
    with pytest.raises(FormatError, match="asks for 'posix.system'; only tensors and plain containers are read, no code is run"):
        saejax.load(tmp_path)
    assert not (tmp_path / MARK).exists()


@pytest.mark.parametrize(
    "change",
    [
        {"expansion_factor": float("nan")},
        {"expansion_factor": float("inf")},
        {"expansion_factor": 1 << 2000},
        {"jump_relu_threshold": float("inf"), "act_fn": "jumprelu"},
        {"model_name": 7},
    ],
)
def test_numbers_that_are_none(tmp_path, change):
    test_openmoss(tmp_path, change, "missing or malformed key")
