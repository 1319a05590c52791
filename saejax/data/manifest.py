"""What an activation store says of itself: `StoreSpec` (known before harvesting) and the manifest (written last)."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from saejax.base.errors import StoreCorruptError, StoreError
from saejax.base.keys import Keys
from saejax.base.storage import read_json, safe_name
from saejax.data.shards import AGAIN, ArraySpec, side_chunk_rows

SCHEMA_VERSION = 1
KIND = "saejax-activation-store"


@dataclass(frozen=True)
class StoreSpec:
    """Everything that decides the bytes of a store. `text` is plain JSON: sources, digest, packing, split, mask."""

    model: str
    model_digest: str
    lm_dtype: str
    tokenizer_digest: str
    text: dict
    hookpoints: tuple[tuple[str, int], ...]     # (name, width)
    context: int
    shard_contexts: int
    chunk_rows: int
    target_contexts: int

    @property
    def shard_rows(self) -> int:
        return self.shard_contexts * self.context

    @property
    def target_shards(self) -> int:
        return -(-self.target_contexts // self.shard_contexts)

    @property
    def made_elsewhere(self) -> bool:
        """True of rows that another pipeline made (`saejax.data.arrays`), not a harvest."""
        return "tokens" in self.text

    def arrays(self) -> dict[str, ArraySpec]:
        """{name: ArraySpec} of every array of the store."""
        side = side_chunk_rows(self.chunk_rows, self.shard_rows)
        out = [ArraySpec("tokens", "int32", None, self.shard_rows, side),
               ArraySpec("keep", "uint8", None, self.shard_rows, side)]
        for name, width in self.hookpoints:
            out.append(ArraySpec(f"acts/{name}", "bfloat16", width, self.shard_rows, self.chunk_rows))
            out.append(ArraySpec(f"norms/{name}", "float32", None, self.shard_rows, side))
        return {a.name: a for a in out}

    def to_json(self) -> dict:
        values = dataclasses.asdict(self)
        values["hookpoints"] = [{"name": name, "width": width} for name, width in self.hookpoints]
        return json.loads(json.dumps(values))

    def differences(self, other: "StoreSpec") -> list[str]:
        """Lines "key: this -> other"."""
        return differences(self.to_json(), other.to_json())


def differences(mine: dict, theirs: dict) -> list[str]:
    """Lines "key: this -> other" of two JSON objects, with the keys of the objects inside them."""
    mine, theirs = _flat(mine), _flat(theirs)
    return [f"{key}: {mine.get(key)!r} -> {theirs.get(key)!r}" for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key)]


def _flat(values: dict, path: str = "") -> dict:
    out = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out.update(_flat(value, f"{path}{key}."))
        else:
            out[path + key] = value
    return out


def file_keys(path: Path) -> Keys:
    """The keys of a store's JSON. Raises `StoreCorruptError`, as they do."""
    return Keys(read_json(path, StoreCorruptError), path, StoreCorruptError)


def read_spec(f: Keys) -> StoreSpec:
    """The `StoreSpec` of a manifest or of `spec.json`."""
    f = f.section("spec")
    hookpoints = []
    for i, item in enumerate(f.get("hookpoints", list)):
        h = f.inside(item, f"hookpoints[{i}]")
        hookpoints.append((safe_name(h.get("name", str), StoreCorruptError), h.count("width", least=1)))
    if not hookpoints or len({name for name, _ in hookpoints}) != len(hookpoints):
        f.refuse("hookpoints is empty or names one twice")
    spec = StoreSpec(
        model=f.get("model", str), model_digest=f.get("model_digest", str), lm_dtype=f.get("lm_dtype", str),
        tokenizer_digest=f.get("tokenizer_digest", str), text=f.get("text", dict), hookpoints=tuple(hookpoints),
        context=f.count("context", least=1), shard_contexts=f.count("shard_contexts", least=1),
        chunk_rows=f.count("chunk_rows", least=1),
        target_contexts=f.count("target_contexts", least=1))
    f.refuse_unread()
    if spec.shard_rows % spec.chunk_rows:
        f.refuse(f"chunk_rows={spec.chunk_rows} does not divide the {spec.shard_rows} rows of a shard")
    return spec


def check_version(f: Keys) -> None:
    f.one_of("kind", (KIND,))
    if f.count("schema_version", least=1) > SCHEMA_VERSION:
        raise StoreError(f"{f.source}: schema version {f.values['schema_version']} is newer than {SCHEMA_VERSION}, "
                         "which this saejax reads; update saejax")


def self_digest(values: dict) -> str:
    """SHA-256 of the manifest without its own "sha256", in canonical JSON."""
    rest = {k: v for k, v in values.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def shard_contexts(spec: StoreSpec, n_contexts: int) -> list[int]:
    """Contexts of each shard: all full but possibly the last."""
    full, rest = divmod(n_contexts, spec.shard_contexts)
    return [spec.shard_contexts] * full + ([rest] if rest else [])


def read_manifest(path: Path) -> tuple[dict, StoreSpec]:
    """The manifest, validated: types, digests, and every size and file name recomputed from the spec.

    Raises `StoreCorruptError` naming the key, `StoreError` for a newer schema.
    """
    f = file_keys(path)
    check_version(f)
    if f.hex("sha256") != self_digest(f.values):
        raise StoreCorruptError(f"{path}: altered since it was written (its digest does not verify); {AGAIN}")
    f.hex("spec_file_sha256")
    spec = read_spec(f)
    n_contexts, kept = f.count("n_contexts", least=1), f.count("kept_rows", least=1)
    if f.count("rows") != n_contexts * spec.context or kept > n_contexts * spec.context:
        f.refuse(f"rows or kept_rows does not follow from {n_contexts} contexts of {spec.context}")
    arrays = spec.arrays()
    heads = f.section("arrays")
    shards = f.get("shards", list)
    expected = -(-n_contexts // spec.shard_contexts)
    if set(heads.values) != set(arrays) or len(shards) != expected:
        f.refuse(f"shards are {len(shards)}, {n_contexts} contexts make {expected}, or arrays are not {', '.join(arrays)}")
    sizes = shard_contexts(spec, n_contexts)
    for name in arrays:
        heads.section(name).hex("zarr_json_sha256")
    for s, (entry, contexts) in enumerate(zip(shards, sizes, strict=True)):
        _check_shard_entry(f.inside(entry, f"shards[{s}]"), s, contexts, spec, arrays)
    for name, width in spec.hookpoints:
        _check_stats(f.section("stats").section(name), width, kept)
    return f.values, spec


def _check_shard_entry(f: Keys, shard: int, contexts: int, spec: StoreSpec, arrays: dict[str, ArraySpec]) -> None:
    f.hex("record_sha256")
    f.one_of("contexts", (contexts,))
    files = f.section("files")
    if set(files.values) != set(arrays):
        f.refuse(f"files does not list the arrays {', '.join(arrays)}")
    for name, array in arrays.items():
        entry = files.section(name)
        entry.hex("sha256")
        entry.one_of("file", (array.shard_file(shard),))
        entry.one_of("bytes", (array.shard_bytes(contexts * spec.context),))


def _check_stats(f: Keys, width: int, kept: int) -> None:
    f.numbers("mean", width)
    for key in ("mean_norm", "mean_sq_norm", "median_norm"):
        f.number(key)
    f.count("outliers", most=kept)
