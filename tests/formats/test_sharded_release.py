"""A release in several files is the one in a single file, cut by features; or one line says what is wrong with it."""

import json
import subprocess
import sys
import tracemalloc
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

import saejax
from saejax.base import sharding, storage
from saejax.base.errors import ConfigError, DiskError, FormatError
from saejax.base.ranges import ranges as ranges_of
from saejax.base.records import MeshOptions
from saejax.cli.main import main
from saejax.formats import ranges, saelens, streamed
from saejax.formats.convert import convert
from saejax.formats.release import release
from saejax.runs.inspect import inspect_path
from saejax.sae import from_tensors, param_shapes, tensors
from saejax.sae.inference import SAE, SAEConfig
from tests.processes import environment, free_port

D, F = 12, 64
KINDS = {"relu": {}, "jumprelu": {}, "gated": {}, "topk": {"k": 5}, "transcoder": {"kind": "relu", "d_out": 10, "target": "t"},
         "skip transcoder": {"kind": "jumprelu", "d_out": 10, "target": "t", "skip": True},
         "crosscoder": {"kind": "relu", "hookpoints": ("a", "b"), "layers": (5, 7)}}
MESHES = (None, (1, 1), (2, 4), (4, 2), (1, 8))


def mesh_of(shape):
    if shape is None:
        return None
    return sharding.make_mesh(MeshOptions(*shape), jax.devices()[:shape[0] * shape[1]])


def make(name, mesh=None, features=F, width=D):
    options = {"kind": name, "k": 0, "hookpoints": ("h",), "pre_bias": "coder" not in name} | KINDS[name]
    cfg = SAEConfig(d_in=width, d_sae=features, model="m", metadata={"training": {"tokens": 7}}, **options)
    rng = np.random.default_rng(0)
    shapes = tensors(param_shapes(cfg.spec, folded=True))
    return SAE(from_tensors({n: jnp.asarray(rng.standard_normal(s), jnp.float32) for n, s in shapes.items()}), cfg, mesh)


@pytest.fixture
def small(monkeypatch):
    """Files of about a third of such an SAE, blocks of few features."""
    monkeypatch.setattr(saelens, "FILE_BYTES", 3000)
    monkeypatch.setattr(streamed, "BLOCK", 4 * D * 5)


@pytest.fixture
def sharded(small, tmp_path):
    saelens.write(tmp_path / "release", make("jumprelu"))
    return tmp_path / "release"


def listed(path):
    return json.loads((path / "cfg.json").read_text())["metadata"]["saejax"]["files"]


def relist(path, change):
    cfg = json.loads((path / "cfg.json").read_text())
    change(cfg["metadata"]["saejax"]["files"])
    (path / "cfg.json").write_text(json.dumps(cfg))


def same(one, other):
    assert one.cfg == other.cfg
    for name, value in tensors(one.params).items():
        np.testing.assert_array_equal(jax.device_get(value), jax.device_get(tensors(other.params)[name]), err_msg=name)


@pytest.mark.parametrize("name", KINDS)
def test_one_file_is_what_the_library_writes(name, tmp_path, monkeypatch):
    """Byte for byte, from every mesh, block by block."""
    monkeypatch.setattr(streamed, "BLOCK", 4 * D * 5)
    for n, shape in enumerate(MESHES):
        sae = make(name, mesh_of(shape))
        saelens.write(tmp_path / str(n), sae)
        arrays = {saelens.NAMES.get(sae.cfg.kind, {}).get(n, n): np.ascontiguousarray(
            np.asarray(v).T if n in saelens.TRANSPOSED else v) for n, v in tensors(make(name).params).items()}
        assert (tmp_path / str(n) / saelens.WEIGHTS).read_bytes() == save(arrays, metadata={"format": "pt"})
        assert sorted(f.name for f in (tmp_path / str(n)).iterdir()) == ["cfg.json", saelens.WEIGHTS]


@pytest.mark.parametrize("name", KINDS)
def test_reads_back_on_every_mesh(name, small, tmp_path):
    for shape in ((2, 4), None):
        saelens.write(tmp_path / "release", make(name, mesh_of(shape)))
        assert len(listed(tmp_path / "release")) > 1 and not (tmp_path / "release" / saelens.WEIGHTS).exists()
        for other in MESHES:
            sae = saejax.load(tmp_path / "release", mesh_of(other))
            same(sae, make(name))
            if other is not None:
                assert {s.data.shape[0] for s in sae.params.W_enc.addressable_shards} == {F // other[1]}


def test_each_file_is_a_release_of_its_features(sharded):
    whole = {name: np.asarray(value) for name, value in tensors(make("jumprelu").params).items()}
    for entry in listed(sharded):
        found, cut = load_file(sharded / entry["file"]), slice(entry["first"], entry["last"] + 1)
        assert entry["sha256"] == storage.file_sha256(sharded / entry["file"])
        np.testing.assert_array_equal(found.pop("b_dec"), whole["b_dec"])
        np.testing.assert_array_equal(found.pop("W_enc"), whole["W_enc"][cut].T)
        for name, value in found.items():
            np.testing.assert_array_equal(value, whole[name][cut])
    assert [entry["first"] for entry in listed(sharded)[1:]] == [entry["last"] + 1 for entry in listed(sharded)[:-1]]


def test_borders_are_those_of_shards():
    def shards(*owners):
        return [(8 * n, 8 * n + 8, frozenset(held)) for n, held in enumerate(owners)]

    def found(most, *owners):
        return [(r.first, r.stop, r.process) for r in ranges_of(shards(*owners), most)]

    assert found(16, [0], [0], [0], [1]) == [(0, 16, 0), (16, 24, 0), (24, 32, 1)]
    assert found(100, [0], [1]) == [(0, 8, 0), (8, 16, 1)]
    assert found(4, [0], [0, 1]) == [(0, 4, 0), (4, 8, 0), (8, 12, 1), (12, 16, 1)]
    assert found(3, [0])[-1] == (5, 8, 0)


@pytest.mark.parametrize("name", ["relu", "jumprelu", "gated", "skip transcoder"])
def test_a_part_of_the_features(name, small, tmp_path):
    whole = make(name)
    x = np.random.default_rng(1).standard_normal((4, D)).astype(np.float32)
    acts = np.asarray(whole.encode(x))
    for single in (True, False):
        saelens.write(tmp_path / str(single), whole, single=single)
        for part in (range(0, F), range(7, 45), slice(60, None), slice(None, 1)):
            sae = saejax.load(tmp_path / str(single), features=part)
            cut = slice(part.start or 0, part.stop or F)
            assert sae.cfg.d_sae == len(range(F)[cut]) and sae.cfg.metadata["features"]["of"] == F
            np.testing.assert_allclose(sae.encode(x), acts[:, cut], atol=1e-5)
        sae = saejax.load(tmp_path / str(single), mesh_of((2, 4)), features=range(8, 40))
        np.testing.assert_allclose(sae.encode(x), acts[:, 8:40], atol=1e-5)
    assert saejax.load(sae.save(tmp_path / "saved")).cfg == sae.cfg


def test_a_part_reads_only_its_files(sharded):
    last = listed(sharded)[-1]
    for entry in listed(sharded)[:-1]:
        (sharded / entry["file"]).unlink()
    part = saejax.load(sharded, features=range(last["first"], last["last"] + 1))
    np.testing.assert_array_equal(part.W_dec, make("jumprelu").W_dec[last["first"]:])


@pytest.mark.parametrize("part", [range(0, 65), range(-1, 4), range(4, 4), range(0, 8, 2), slice(-4, None), slice(70, 80)])
def test_parts_that_are_not_there(sharded, part):
    with pytest.raises(FormatError, match="cfg.json: features=.*expected neighbours, at least one, from 0 to 64"):
        saejax.load(sharded, features=part)


def test_no_part_of_topk_and_of_other_formats(small, tmp_path):
    saelens.write(tmp_path / "topk", make("topk"))
    with pytest.raises(FormatError, match="which features are active depends on all of them.*release it as jumprelu"):
        saejax.load(tmp_path / "topk", features=range(4))
    other = Path(__file__).parent / "fixtures" / "sparsify" / "topk"
    with pytest.raises(FormatError, match="only releases and files of SAELens are read in part"):
        saejax.load(other, features=range(4))


def test_a_mesh_that_does_not_divide(sharded):
    with pytest.raises(ConfigError, match="64 features cannot be split over mesh.dict = 3"):
        saejax.load(sharded, mesh_of((1, 3)))


def test_a_missing_file(sharded):
    (sharded / listed(sharded)[1]["file"]).unlink()
    with pytest.raises(FormatError, match=r"sae_weights-00002-of-\d{5}.safetensors: missing; copy the whole release again"):
        saejax.load(sharded)
    assert not inspect_path(sharded, progress=False).to_json()["verifies"]


def test_swapped_files_and_a_flipped_bit(sharded):
    a, b = (sharded / entry["file"] for entry in listed(sharded)[1:3])
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second), b.write_bytes(first)
    with pytest.raises(FormatError, match="00002-of-.*: altered since cfg.json was written"):
        saejax.load(sharded)
    a.write_bytes(first), b.write_bytes(second[:-1] + bytes([second[-1] ^ 1]))
    for mesh in (None, mesh_of((1, 8))):
        with pytest.raises(FormatError, match="00003-of-.*: altered since cfg.json was written"):
            saejax.load(sharded, mesh)


def resha(path):
    """Digests that fit, so that what is behind them is looked at."""
    relist(path, lambda files: [entry.update(sha256=storage.file_sha256(path / entry["file"])) for entry in files])


@pytest.mark.parametrize("change, message", [
    (lambda files: files[1].update(first=files[1]["first"] - 1), "00002-of-.*: an overlap or a hole"),
    (lambda files: files[1].update(first=files[1]["first"] + 1), "00002-of-.*: an overlap or a hole"),
    (lambda files: files[2].update(last=999), "00003-of-.*: an overlap or a hole"),
    (lambda files: files[-1].update(last=F - 2), "cfg.json: the last of .* ends at feature 62 of 64: a hole"),
    (lambda files: files[0].update(last="9"), "00001-of-.*: an overlap or a hole"),
    (lambda files: files[0].update(first=False), "00001-of-.*: an overlap or a hole"),
    (lambda files: files.reverse(), "entry 1 .* does not describe sae_weights-00001-of-"),
    (lambda files: files.pop(), "entry 1 .* does not describe sae_weights-00001-of-"),
    (lambda files: files[0].update(file="../../x"), "entry 1 .* does not describe sae_weights-00001-of-"),
    (lambda files: files[0].pop("sha256"), "entry 1 .* does not describe sae_weights-00001-of-"),
    (lambda files: files.__setitem__(0, 5), "entry 1 .* does not describe sae_weights-00001-of-"),
    (lambda files: files.clear(), "cfg.json: the last of .*: a hole"),
    (lambda files: (files[0].update(last=files[0]["last"] - 1), files[1].update(first=files[1]["first"] - 1)),
     "00001-of-.*: .*expected F32"),
])
def test_an_altered_list(sharded, change, message):
    relist(sharded, change)
    with pytest.raises(FormatError, match=message):
        saejax.load(sharded)


def test_wrong_tensors(sharded):
    path = sharded / listed(sharded)[1]["file"]
    found = load_file(path)
    save_file(found | {"W_dec": found["W_dec"][:-1].copy()}, path)
    resha(sharded)
    with pytest.raises(FormatError, match=r"00002-of-.*: W_dec: F32 \(\d+, 12\), expected F32 \(\d+, 12\)"):
        saejax.load(sharded)
    found["W_dec"][1, 1] = np.nan
    save_file(found, path)
    resha(sharded)
    with pytest.raises(FormatError, match="00002-of-.*: tensor W_dec holds NaN or Inf"):
        saejax.load(sharded)


def test_nothing_takes_the_place_of_a_release_before_all_is_whole(sharded):
    before = {file.name: file.read_bytes() for file in sharded.iterdir()}
    sae = make("jumprelu")
    bad = SAE(sae.params.replace(W_dec=sae.params.W_dec.at[60, 1].set(jnp.inf)), sae.cfg)
    with pytest.raises(FormatError, match="not released, W_dec hold NaN or Inf"):
        saelens.write(sharded, bad)
    assert {file.name: file.read_bytes() for file in sharded.iterdir()} == before


def test_another_number_of_files_leaves_none_behind(sharded):
    saelens.write(sharded, make("jumprelu"), single=True)
    assert sorted(file.name for file in sharded.iterdir()) == ["cfg.json", saelens.WEIGHTS]
    same(saejax.load(sharded), make("jumprelu"))


def test_no_room(small, tmp_path, monkeypatch):
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: SimpleNamespace(free=1234))
    with pytest.raises(DiskError, match=r"release: [\d,]+ bytes will be written and 1,234 are free"):
        saelens.write(tmp_path / "release", make("relu"))
    assert not list(tmp_path.iterdir())


def test_what_is_said(small, tmp_path, capsys):
    saelens.write(tmp_path / "release", make("relu"))
    n = len(listed(tmp_path / "release"))
    said = capsys.readouterr().err
    assert f"bytes of weights in {n} files" in said and "write: " in said


def test_memory_of_the_host(tmp_path, monkeypatch):
    """Writing holds blocks, joining too; reading one piece of a device. 16 MiB of weights."""
    monkeypatch.setattr(saelens, "FILE_BYTES", 3 << 20)
    monkeypatch.setattr(streamed, "BLOCK", 1 << 18)
    sae = make("relu", mesh_of((1, 8)), features=8192, width=256)

    def peak(action):
        tracemalloc.start()
        try:
            action()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(lambda: saelens.write(tmp_path / "several", sae)) < 3 << 20
    assert len(listed(tmp_path / "several")) == 8
    assert peak(lambda: saelens.write(tmp_path / "one", sae, single=True)) < 3 << 20
    sizes, read = [], ranges.FeatureFiles.read
    monkeypatch.setattr(ranges.FeatureFiles, "read", lambda *of: (value := read(*of), sizes.append(value.nbytes))[0])
    same(saejax.load(tmp_path / "several", sae.mesh), sae)
    assert max(sizes) == 1 << 20  # the piece of a device, whose own memory tracemalloc cannot tell from the host's here
    assert peak(lambda: convert(tmp_path / "several", tmp_path / "joined", "saelens")) < 4 << 20
    assert peak(lambda: inspect_path(tmp_path / "several", progress=False)) < 4 << 20


@pytest.mark.parametrize("name", ["relu", "topk", "gated", "skip transcoder"])
def test_convert_joins_the_files(name, small, tmp_path, capsys):
    saelens.write(tmp_path / "several", make(name))
    saelens.write(tmp_path / "one", make(name), single=True)
    assert main(["convert", str(tmp_path / "several"), str(tmp_path / "joined"), "--to=saelens"]) == 0
    assert "all 64 features of" in capsys.readouterr().out
    for file in ("cfg.json", saelens.WEIGHTS):
        assert (tmp_path / "joined" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
    assert main(["convert", str(tmp_path / "several"), str(tmp_path / "joined"), "--to=saelens"]) == 2


def test_convert_refuses_what_saelens_does_not_know(small, tmp_path):
    saelens.write(tmp_path / "several", make("crosscoder"))
    with pytest.raises(FormatError, match="cannot be written for SAELens"):
        convert(tmp_path / "several", tmp_path / "joined", "saelens")


def test_inspect_and_publish(sharded, capsys):
    found = inspect_path(sharded, progress=False)
    assert not found.problems and not found.not_read() and found.facts["files"] == len(listed(sharded))
    assert main(["push-to-hub", str(sharded), "--repo=me/sae"]) == 0
    said = capsys.readouterr().out
    assert all(entry["file"] in said for entry in listed(sharded))
    (sharded / listed(sharded)[0]["file"]).unlink()
    assert main(["push-to-hub", str(sharded), "--repo=me/sae"]) == 2 and "missing" in capsys.readouterr().err


def test_the_card_says_what_saelens_needs(small, tmp_path, monkeypatch):
    cards = [(release(make("relu"), tmp_path / "several") / "README.md").read_text()]
    monkeypatch.setattr(saelens, "FILE_BYTES", 1 << 20)
    cards.append((release(make("relu"), tmp_path / "one") / "README.md").read_text())
    assert "`saejax convert` writes the one file" in cards[0] and "SAELens reads the same directory" not in cards[0]
    assert "SAELens reads the same directory" in cards[1]


def test_a_repository_of_releases_in_several_files(monkeypatch, sharded, tmp_path):
    """Their files are fetched, and where there is none a place below that has them is named."""
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, revision, allow_patterns: (
        asked.extend(allow_patterns), str(tmp_path))[1])
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo, revision: [
        f"all/{file.relative_to(tmp_path).as_posix()}" for file in sharded.iterdir()])
    same(saejax.load("a/b:release"), make("jumprelu"))
    assert all(any(fnmatch(f"release/{entry['file']}", pattern) for pattern in asked) for entry in listed(sharded))
    with pytest.raises(FormatError, match="holds 1 below it; give a/b:all/ and one of release$"):
        saejax.load("a/b:all")


def test_training_starts_from_it(small, tmp_path):
    from saejax.train import loop
    from tests.train.synthetic import make_config, make_store
    store = make_store(tmp_path / "store")
    loop.train(make_config("relu", tmp_path / "run", train__tokens=32 * 10), store)
    first = saejax.load(tmp_path / "run")
    saelens.write(tmp_path / "release", first)
    assert len(listed(tmp_path / "release")) > 1
    begun = [loop.train(make_config("relu", tmp_path / name, train__tokens=32, train__init_from=str(tmp_path / place)), store,
                        load=saejax.load) for name, place in (("a", "run"), ("b", "release"))]
    for one, other in zip(*(jax.tree.leaves(run.state.params) for run in begun), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_two_processes(small, tmp_path):
    """Each writes the files of its own features; what is small is one file, and byte for byte that of one process. What only one
    of them finds wrong stops both.
    """
    port = str(free_port())
    command = [sys.executable, "-m", "tests.formats.release_worker", port]
    jobs = [subprocess.Popen([*command, str(process), str(tmp_path)], env=environment(2), text=True,
                             cwd=Path(__file__).parent.parent.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for process in range(2)]
    try:
        outs = [job.communicate(timeout=150) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    for job, (out, err) in zip(jobs, outs, strict=True):
        assert job.returncode == 0 and "DONE" in out, err[-3000:]
    saelens.write(tmp_path / "here", make("gated"), single=True)
    for shape in ("1x4", "2x2", "4x1"):
        same(saejax.load(tmp_path / shape / "several"), make("gated"))
        assert len(listed(tmp_path / shape / "several")) > 2
        for file in ("cfg.json", saelens.WEIGHTS):
            assert (tmp_path / shape / "one" / file).read_bytes() == (tmp_path / "here" / file).read_bytes()
