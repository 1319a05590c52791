import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from saejax import config as C
from saejax import lm
from saejax.base.errors import AssetError, HookpointError, NonFiniteError, StoreError, TextError
from saejax.data import harvest as harvest_module
from saejax.data.harvest import harvest
from saejax.data.store import Store
from saejax.data.tokens import token_batches
from saejax.data.verify import verify
from saejax.data.writer import StoreWriter
from tests.data.making import HOOK, bits, directory, sentences, tiny_config, tiny_model, write_jsonl
from tests.lm import families
from tests.lm.token_forms import save, words
from tests.processes import environment, free_port

N_CONTEXTS = 40     # 640 tokens in contexts of 16, shards of 4


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(model directory, text file)."""
    root = tmp_path_factory.mktemp("parts")
    return tiny_model(root / "model"), write_jsonl(root / "text.jsonl", sentences(200))


@pytest.fixture(scope="module")
def tiny(parts):
    return lm.load(str(parts[0]))


@pytest.fixture(scope="module")
def straight(parts, tiny, tmp_path_factory):
    """The store of a harvest that nothing interrupts."""
    config = tiny_config(*parts, tmp_path_factory.mktemp("straight") / "store")
    return config, harvest(config, tiny)


def test_rows_are_what_the_model_computes_for_the_packed_text(straight, tiny):
    config, store = straight
    assert (store.n_contexts, store.n_shards) == (N_CONTEXTS, 10)
    batches = list(token_batches(config.text, tiny.tokenizer, 8, seed=config.seed, max_contexts=N_CONTEXTS))
    tokens, keep = (np.concatenate([getattr(b, f) for b in batches]) for f in ("tokens_BT", "keep_BT"))
    assert np.array_equal(store.tokens(0, store.rows), tokens.ravel())
    assert np.array_equal(store.keep(0, store.rows), keep.ravel()) and not keep[:, 0].any()
    direct = lm.capture(tiny.model, jnp.asarray(tokens), store.hookpoints)
    for name in store.hookpoints:
        expected = np.asarray(direct[name]).reshape(-1, 48)
        got = store.read(name, 0, store.rows)
        assert np.allclose(got.astype(np.float32), expected, rtol=2**-8, atol=1e-5)
        rounded = np.asarray(jnp.asarray(expected).astype(jnp.bfloat16))
        assert (bits(got) == bits(rounded)).mean() > 0.99


@pytest.mark.parametrize("first, most, least", [(1, 1.5, 0), (0, np.inf, 5)])
def test_sinks_at_the_first_token_are_left_out(parts, tmp_path, first, most, least):
    """A model without BOS whose first position is an outlier, whatever token is there: root mean square norm / median norm."""
    config = families.CONFIGS["gpt2"]
    tensors = families.tensors(config)
    place = next(name for name in tensors if name.endswith("wpe.weight"))
    tensors[place][0] *= 1000
    save(words(), families.write(tmp_path / "lm", config, tensors), bos_token=None, eos_token=None)
    config = tiny_config(tmp_path / "lm", parts[1], tmp_path / "store", **{
        "text.bos": "none", "text.separator": "none", "text.mask": ("first",) * first})
    store = harvest(config)
    stats = store.stats(HOOK)
    assert least < stats.mean_sq_norm ** 0.5 / stats.median_norm <= most
    keep_NT = store.keep(0, store.rows).reshape(-1, store.context)
    assert np.array_equal(keep_NT, np.tile(np.arange(store.context) >= first, (store.n_contexts, 1)))
    with pytest.raises(StoreError, match="text.mask: "):
        harvest(replace(config, text=replace(config.text, mask=("special",))))


def test_a_model_split_over_devices_harvests_the_same_rows(straight, parts, tmp_path):
    config = tiny_config(*parts, tmp_path / "store", **{"lm.model_parallel": 2, "lm.batch_contexts": 4})
    split = harvest(config)
    whole = straight[1]
    for name in whole.hookpoints:
        a, b = (store.read(name, 0, store.rows).astype(np.float32) for store in (split, whole))
        np.testing.assert_allclose(a, b, rtol=2**-7, atol=1e-4)
    assert np.array_equal(split.tokens(0, split.rows), whole.tokens(0, whole.rows))


def test_a_finished_store_is_opened_without_the_model(straight, parts, monkeypatch):
    config, store = straight

    def no_load(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(harvest_module, "_pinned", lambda config: True)
    monkeypatch.setattr(lm, "load", no_load)
    assert harvest(config).digest == store.digest
    changed = tiny_config(*parts, config.harvest.store, **{"text.context": 32, "seed": 5})
    with pytest.raises(StoreError, match="context: 16 -> 32; .*text.seed: 0 -> 5"):
        harvest(changed)


@pytest.mark.parametrize("revision", [None, "a" * 40])
def test_an_unpinned_model_is_compared_by_its_weights(straight, tmp_path, parts, revision):
    """A local directory is one whatever the revision says, which `lm.load` does not read there."""
    config, store = straight
    assert harvest(config).digest == store.digest
    other = tiny_model(tmp_path / "model")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, other / "model.safetensors")
    with pytest.raises(StoreError, match="model_digest"):
        harvest(tiny_config(other, parts[1], config.harvest.store, **{"lm.revision": revision}))


def test_one_document_a_row(parts, tiny, tmp_path):
    """Kept rows are those of the documents, each by itself; a store of another packing is refused, finished or not."""
    config = tiny_config(*parts, tmp_path / "store", **{"text.packing": "document", "text.context": 48})
    store = harvest(config, tiny)
    [batch] = token_batches(config.text, tiny.tokenizer, store.n_contexts, seed=config.seed, max_contexts=store.n_contexts)
    assert np.array_equal(store.tokens(0, store.rows), batch.tokens_BT.ravel()) and len(set(batch.lengths_B)) > 5
    keep = store.keep(0, store.rows).reshape(-1, 48)
    assert store.spec.text["packing"] == "document" and not keep[np.arange(48) >= batch.lengths_B[:, None]].any()
    for row in range(3):
        alone = lm.capture(tiny.model, jnp.asarray(batch.tokens_BT[row:row + 1, :batch.lengths_B[row]]), [HOOK])[HOOK]
        found = store.read(HOOK, row * 48, row * 48 + batch.lengths_B[row]).astype(np.float32)
        assert np.allclose(found, np.asarray(alone)[0], rtol=2**-7, atol=1e-4)
    packed = tiny_config(*parts, store.path, **{"text.context": 48})
    (tmp_path / "half").mkdir()
    for part in ("spec.json", "shards"):
        source = store.path / part
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / "half" / part)
    for other in (packed, replace(packed, harvest=replace(packed.harvest, store=str(tmp_path / "half")))):
        with pytest.raises(StoreError, match="text.packing: 'document' -> None"):
            harvest(other, tiny)


@pytest.mark.parametrize("stop_at", [0, 1, 3, 9])
def test_interrupted_anywhere_it_becomes_the_same_store(straight, parts, tiny, tmp_path, monkeypatch, stop_at):
    config = tiny_config(*parts, tmp_path / "store")
    write, done = StoreWriter.write_shard, []

    def stops(self, shard, *args):
        if shard == stop_at:
            raise KeyboardInterrupt
        done.append(shard)
        write(self, shard, *args)

    with monkeypatch.context() as m:
        m.setattr(StoreWriter, "write_shard", stops)
        with pytest.raises(KeyboardInterrupt):
            harvest(config, tiny)
    with pytest.raises(StoreError, match=rf"{stop_at} of 10 shards"):
        Store.open(tmp_path / "store")
    again = []
    monkeypatch.setattr(StoreWriter, "write_shard", lambda self, s, *a: (again.append(s), write(self, s, *a)))
    harvest(config, tiny)
    assert done == list(range(stop_at)) and again == list(range(stop_at, 10))
    assert directory(tmp_path / "store") == directory(straight[1].path)


def child(config: C.Config, folder, *lines: str, devices: int = 8) -> subprocess.Popen:
    """A process that harvests this config."""
    (folder / "config.json").write_text(json.dumps(C.to_json(config)))
    code = "\n".join(["import json, sys", "import jax", *lines, "from saejax import config as C",
                      "from saejax.data.harvest import harvest",
                      "harvest(C.from_json(json.load(open(sys.argv[1]))))"])
    return subprocess.Popen([sys.executable, "-c", code, str(folder / "config.json")], env=environment(devices),
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_leaves_a_store_that_resumes(straight, parts, tiny, tmp_path, how):
    config = tiny_config(*parts, tmp_path / "store")
    process = child(config, tmp_path)
    deadline, second = time.monotonic() + 120, tmp_path / "store/shards/00001.bin"
    while not second.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(how)
    output, _ = process.communicate(timeout=60)
    assert second.exists(), output
    harvest(config, tiny)
    assert directory(tmp_path / "store") == directory(straight[1].path)


def test_two_processes_write_the_same_store_as_one(parts, tmp_path):
    """Three devices for every forward pass in each of them, as in the one process of `straight`."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    port = free_port()
    config = tiny_config(*parts, tmp_path / "two/store")
    processes = [child(config, tmp_path / "two", f"jax.distributed.initialize('127.0.0.1:{port}', 2, {i})", devices=3)
                 for i in range(2)]
    outputs = [p.communicate(timeout=240)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], "\n".join(outputs)
    one = child(tiny_config(*parts, tmp_path / "one/store"), tmp_path / "one", devices=3)
    output, _ = one.communicate(timeout=240)
    assert one.returncode == 0, output
    assert directory(tmp_path / "two/store") == directory(tmp_path / "one/store")
    verify(Store.open(tmp_path / "two/store"))


@pytest.mark.parametrize("n", [9, 12])
def test_a_text_that_ends_early_gives_a_shorter_store(parts, tiny, tmp_path, n):
    text = write_jsonl(tmp_path / "t.jsonl", sentences(n))
    config = tiny_config(parts[0], text, tmp_path / "store", **{"text.holdout": 0.0, "harvest.tokens": 10**6})
    store = harvest(config, tiny)
    rows = sum(len(b.tokens_BT) for b in token_batches(config.text, tiny.tokenizer, 5, seed=0))
    assert store.n_contexts == rows < config.harvest.tokens // 16
    assert harvest(config, tiny).digest == store.digest
    (tmp_path / "store" / "manifest.json").unlink()
    (tmp_path / "store" / "shards" / "00000.bin").unlink()
    before = store.digest
    assert harvest(config, tiny).digest == before


def test_mistakes_are_one_line_and_write_nothing(parts, tiny, tmp_path):
    with pytest.raises(HookpointError, match="3 layers"):
        harvest(tiny_config(*parts, tmp_path / "a", **{"harvest.hookpoints": ("blocks.7.hook_resid_post",),
                                                         "sae.hookpoint": "blocks.7.hook_resid_post"}), tiny)
    with pytest.raises(TextError, match="missing"):
        harvest(tiny_config(parts[0], tmp_path / "no.jsonl", tmp_path / "a"), tiny)
    assert not (tmp_path / "a").exists()
    text = write_jsonl(tmp_path / "t.jsonl", ["the cat"])
    with pytest.raises(TextError, match="one context needs 16"):
        harvest(tiny_config(parts[0], text, tmp_path / "b", **{"text.holdout": 0.0}), tiny)
    assert harvest(tiny_config(*parts, tmp_path / "b", **{"harvest.tokens": 64}), tiny).n_contexts == 4


def test_nan_activations_stop_the_harvest_before_their_shard(parts, straight, tmp_path):
    folder = tiny_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    tokens = straight[1].tokens(0, straight[1].rows).reshape(N_CONTEXTS, 16)
    first = {int(t): c for c in range(N_CONTEXTS - 1, -1, -1) for t in tokens[c]}
    late = max(first, key=first.get)
    weights["model.embed_tokens.weight"][late] = np.nan
    save_file(weights, folder / "model.safetensors")
    context = first[late]
    broken = lm.load(str(folder))
    x = lm.capture(broken.model, jnp.asarray(tokens[context:context + 1]), ["blocks.0.hook_resid_post"])
    bad = np.flatnonzero(~np.isfinite(np.asarray(x["blocks.0.hook_resid_post"])).all(axis=(0, 2)))
    with pytest.raises(NonFiniteError, match=rf"hook_resid_post: .* rows hold NaN or Inf.*\({context}, {bad[0]}\)"):
        harvest(tiny_config(folder, parts[1], tmp_path / "store"), broken)
    shards = sorted(p.name for p in (tmp_path / "store" / "shards").iterdir())
    assert shards == [f"{s:05d}.bin" for s in range(context // 4)]
    assert context >= 4


@pytest.mark.slow
def test_the_real_model_equals_a_direct_capture(tmp_path):
    try:
        real = lm.load("smollm2-135m")
    except AssetError as error:
        pytest.skip(str(error))
    hook = "blocks.9.hook_resid_post"
    text = write_jsonl(tmp_path / "t.jsonl", sentences(200))
    config = tiny_config("smollm2-135m", text, tmp_path / "store", **{
        "harvest.hookpoints": (hook,), "sae.hookpoint": hook, "text.context": 32, "harvest.tokens": 256,
        "lm.batch_contexts": 1})
    store = harvest(config, real)
    tokens = store.tokens(0, store.rows).reshape(-1, 1, 32)
    run = jax.jit(lambda model, t: lm.capture(model, t, [hook])[hook].astype(jnp.bfloat16))
    direct = np.concatenate([np.asarray(run(real.model, jnp.asarray(t)))[0] for t in tokens])
    assert np.array_equal(bits(store.read(hook, 0, store.rows)), bits(direct))


def times(folder):
    """When each file of activations, tokens and records was written."""
    files = [file for part in ("acts", "tokens", "shards") for file in (folder / part).rglob("*")]
    return {file.relative_to(folder): file.stat().st_mtime_ns for file in files if file.is_file() and file.suffix != ".json"}


@pytest.mark.parametrize("tokens, contexts, full", [(256, 16, 4), (205, 13, 3)])
def test_a_store_grows_and_its_shards_stay(parts, tmp_path, capsys, tokens, contexts, full):
    """To the bytes of one straight harvest of all. A last shard that is not full is the only one that is written again."""
    config = tiny_config(*parts, tmp_path / "store", **{"harvest.tokens": tokens})
    assert harvest(config).n_contexts == contexts
    every = times(tmp_path / "store")
    before = {file: time for file, time in every.items() if not {f"{full:05d}.bin", str(full)} & set(file.parts)}
    assert len(every) - len(before) == (4 if contexts % 4 else 0)
    more = tiny_config(*parts, tmp_path / "store")
    grown = harvest(more)
    assert f"grows from {contexts} to 40 contexts" in capsys.readouterr().err
    after = times(tmp_path / "store")
    assert before and {file: after[file] for file in before} == before and len(after) > len(before)
    straight = harvest(tiny_config(*parts, tmp_path / "straight"))
    assert grown.digest == straight.digest and directory(tmp_path / "store") == directory(tmp_path / "straight")
    with pytest.raises(StoreError, match=f"target_contexts: 40 -> {contexts}"):
        harvest(config)


@pytest.mark.parametrize("finished", [True, False])
def test_repair_writes_only_what_does_not_verify(parts, tmp_path, capsys, finished):
    path = tmp_path / "store"
    config = tiny_config(*parts, path)
    harvest(config)
    whole, before = directory(path), times(path)
    for name in ("acts/blocks.0.hook_resid_post/c/3/0", "text/part-00002.i32", "shards/00006.bin", "crcs.bin"):
        data = bytearray((path / name).read_bytes())
        data[len(data) // 2] ^= 8
        (path / name).write_bytes(data)
    (path / "acts/blocks.1.hook_mlp_out/c/8/0").unlink()
    if not finished:
        (path / "manifest.json").unlink()
    harvest(config, repair=True)
    said = capsys.readouterr().err
    assert all(name in said for name in ("c/3/0", "shards/00006.bin", "text", "c/8/0")), said
    assert ("crcs.bin" in said) == finished
    assert directory(path) == whole
    shards = {int(next(p for p in file.parts[::-1] if p.split(".")[0].isdigit() and p != "0").split(".")[0])
              for file, time in times(path).items() if time != before.get(file) and file.parts[0] != "text"}
    assert shards == {3, 6, 8}
    harvest(config, repair=True)
    assert "all that is there verifies" in capsys.readouterr().err
