"""What an activation store says of itself: `StoreSpec` (known before harvesting) and the manifest (written last)."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from saejax.base.errors import StoreCorruptError, StoreError
from saejax.base.storage import read_json, safe_name
from saejax.data.shards import AGAIN, ArraySpec, side_chunk_rows

SCHEMA_VERSION = 1
KIND = "saejax-activation-store"
_MAX = 2**48
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class StoreSpec:
    """Everything that decides the bytes of a store. `text` is plain JSON: sources, digest, packing and split."""

    model: str
    model_digest: str
    lm_dtype: str
    tokenizer_digest: str
    text: dict
    hookpoints: tuple[tuple[str, int], ...]     # (name, width)
    context: int
    shard_contexts: int
    chunk_rows: int
    mask_special: bool
    target_contexts: int

    @property
    def shard_rows(self) -> int:
        return self.shard_contexts * self.context

    @property
    def target_shards(self) -> int:
        return -(-self.target_contexts // self.shard_contexts)

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
        mine, theirs = _flat(self.to_json()), _flat(other.to_json())
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


def _finite(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class Fields:
    """Typed look-ups in JSON from a file; every complaint names the file and the key."""

    def __init__(self, values, where: str):
        self.where = where
        if not isinstance(values, dict):
            raise StoreCorruptError(f"{where}: expected an object, got {type(values).__name__}")
        self.values = values

    def get(self, key: str, kind: type):
        value = self.values.get(key)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise StoreCorruptError(f"{self.where}: {key!r} should be {kind.__name__}, got {value!r:.80}")
        return value

    def count(self, key: str, least: int = 0) -> int:
        value = self.get(key, int)
        if not least <= value <= _MAX:
            raise StoreCorruptError(f"{self.where}: {key!r} = {value} is outside {least}..{_MAX}")
        return value

    def number(self, key: str) -> float:
        value = self.values.get(key)
        if not _finite(value):
            raise StoreCorruptError(f"{self.where}: {key!r} should be a number, got {value!r:.80}")
        return float(value)

    def hex(self, key: str, digits: int = 64) -> str:
        value = self.get(key, str)
        if len(value) != digits or not _HEX.issuperset(value):
            raise StoreCorruptError(f"{self.where}: {key!r} should be {digits} hexadecimal digits, got {value!r:.80}")
        return value

    def section(self, key: str) -> "Fields":
        return Fields(self.get(key, dict), f"{self.where}: {key}")


def spec_from_json(values, where: str) -> StoreSpec:
    """A validated `StoreSpec`. Raises `StoreCorruptError` that names the key."""
    f = Fields(values, where)
    hookpoints = []
    for item in f.get("hookpoints", list):
        h = Fields(item, f"{where}: hookpoints")
        hookpoints.append((safe_name(h.get("name", str), StoreCorruptError), h.count("width", 1)))
    if not hookpoints or len({name for name, _ in hookpoints}) != len(hookpoints):
        raise StoreCorruptError(f"{where}: 'hookpoints' is empty or names one twice")
    spec = StoreSpec(
        model=f.get("model", str), model_digest=f.get("model_digest", str), lm_dtype=f.get("lm_dtype", str),
        tokenizer_digest=f.get("tokenizer_digest", str), text=f.get("text", dict), hookpoints=tuple(hookpoints),
        context=f.count("context", 1), shard_contexts=f.count("shard_contexts", 1), chunk_rows=f.count("chunk_rows", 1),
        mask_special=f.get("mask_special", bool), target_contexts=f.count("target_contexts", 1))
    if set(f.values) != {field.name for field in dataclasses.fields(StoreSpec)}:
        raise StoreCorruptError(f"{where}: its keys are not those of schema {SCHEMA_VERSION}")
    if spec.shard_rows % spec.chunk_rows:
        raise StoreCorruptError(f"{where}: chunk_rows {spec.chunk_rows} does not divide the {spec.shard_rows} rows "
                                "of a shard")
    return spec


def check_version(f: Fields) -> None:
    if f.get("kind", str) != KIND:
        raise StoreCorruptError(f"{f.where}: kind {f.values['kind']!r:.80} is not {KIND!r}")
    if f.count("schema_version", 1) > SCHEMA_VERSION:
        raise StoreError(f"{f.where}: schema version {f.values['schema_version']} is newer than {SCHEMA_VERSION}, "
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
    values = read_json(path, StoreCorruptError)
    f = Fields(values, str(path))
    check_version(f)
    if f.hex("sha256") != self_digest(values):
        raise StoreCorruptError(f"{path}: altered since it was written (its digest does not verify); {AGAIN}")
    f.hex("spec_file_sha256")
    spec = spec_from_json(f.get("spec", dict), f"{path}: spec")
    n_contexts = f.count("n_contexts", 1)
    if f.count("rows", 1) != n_contexts * spec.context or f.count("kept_rows", 1) > n_contexts * spec.context:
        raise StoreCorruptError(f"{path}: 'rows' or 'kept_rows' does not follow from {n_contexts} contexts of "
                                f"{spec.context}")
    arrays = spec.arrays()
    heads = f.section("arrays")
    shards = f.get("shards", list)
    expected = -(-n_contexts // spec.shard_contexts)
    if set(heads.values) != set(arrays) or len(shards) != expected:
        raise StoreCorruptError(f"{path}: lists {len(shards)} shards, {n_contexts} contexts make {expected}, or "
                                f"other arrays than {', '.join(arrays)}")
    sizes = shard_contexts(spec, n_contexts)
    for name in arrays:
        heads.section(name).hex("zarr_json_sha256")
    for s, (entry, contexts) in enumerate(zip(shards, sizes, strict=True)):
        _check_shard_entry(Fields(entry, f"{path}: shards[{s}]"), s, contexts, spec, arrays)
    for name, width in spec.hookpoints:
        _check_stats(f.section("stats").section(name), width, f.values["kept_rows"])
    return values, spec


def _check_shard_entry(f: Fields, shard: int, contexts: int, spec: StoreSpec, arrays: dict[str, ArraySpec]) -> None:
    f.hex("record_sha256")
    if f.count("contexts", 1) != contexts:
        raise StoreCorruptError(f"{f.where}: 'contexts' is {f.values['contexts']}, expected {contexts}")
    files = f.section("files")
    if set(files.values) != set(arrays):
        raise StoreCorruptError(f"{f.where}: 'files' does not list the arrays {', '.join(arrays)}")
    for name, array in arrays.items():
        entry = files.section(name)
        entry.hex("sha256")
        size = array.shard_bytes(contexts * spec.context)
        if entry.get("file", str) != array.shard_file(shard) or entry.count("bytes") != size:
            raise StoreCorruptError(f"{entry.where}: expected file {array.shard_file(shard)!r} of {size} bytes")


def _check_stats(f: Fields, width: int, kept: int) -> None:
    mean = f.get("mean", list)
    if len(mean) != width or not all(map(_finite, mean)):
        raise StoreCorruptError(f"{f.where}: 'mean' should hold {width} numbers")
    for key in ("mean_norm", "mean_sq_norm", "median_norm"):
        f.number(key)
    if f.count("outliers") > kept:
        raise StoreCorruptError(f"{f.where}: more outliers than rows")
