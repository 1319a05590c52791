"""What an activation store says of itself: `StoreSpec` (known before harvesting) and the manifest (written last)."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

from saejax.base.errors import StoreCorruptError, StoreError
from saejax.base.keys import Keys
from saejax.base.storage import read_json, safe_name, text_sha256
from saejax.base.verified import block_of
from saejax.data.shards import AGAIN, CRC, ArraySpec, side_chunk_rows

SCHEMA_VERSION = 3
MOST_BLOCKS = 2048  # of `crcs.bin`, so that the manifest stays small
KIND = "saejax-activation-store"
TOKENS = "tokens"  # the array of ids; -1 - id where the row is masked


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
        return self.shards(self.target_contexts)

    @property
    def made_elsewhere(self) -> bool:
        """True of rows that another pipeline made (`saejax.data.arrays`), not a harvest."""
        return "tokens" in self.text

    def arrays(self) -> dict[str, ArraySpec]:
        """{name: ArraySpec} of every array of the store."""
        out = [ArraySpec(TOKENS, "int32", None, self.shard_rows, side_chunk_rows(self.chunk_rows, self.shard_rows))]
        out += [ArraySpec(f"acts/{name}", "bfloat16", width, self.shard_rows, self.chunk_rows) for name, width in self.hookpoints]
        return {a.name: a for a in out}

    def crc_words(self) -> dict[str, slice]:
        """Where the chunk checksums of an array lie among those of a shard, in words of `CRC` bytes."""
        places, at = {}, 0
        for name, array in self.arrays().items():
            places[name] = slice(at, at + array.slots)
            at += array.slots
        return places

    @property
    def crc_bytes(self) -> int:
        """Bytes of the chunk checksums of a shard, of a last and shorter one too."""
        return CRC * sum(array.slots for array in self.arrays().values())

    def shards(self, n_contexts: int) -> int:
        """Shards that hold this many contexts."""
        return -(-n_contexts // self.shard_contexts)

    def contexts_of(self, shard: int, n_contexts: int) -> int:
        """Contexts of a shard among `n_contexts`: all shards are full but possibly the last."""
        return min(self.shard_contexts, n_contexts - shard * self.shard_contexts)

    def to_json(self) -> dict:
        values = dataclasses.asdict(self)
        values["hookpoints"] = [{"name": name, "width": width} for name, width in self.hookpoints]
        return json.loads(json.dumps(values))

    def differences(self, other: "StoreSpec") -> list[str]:
        """Lines "key: this -> other"."""
        return differences(self.to_json(), other.to_json())

    def grows_to(self, other: "StoreSpec") -> bool:
        """True where the other one is the same but for more contexts."""
        return self.target_contexts < other.target_contexts and replace(self, target_contexts=other.target_contexts) == other


def contexts_of_shard(size: int, context: int, width: int) -> int:
    """Contexts in a shard of about `size` bytes: a multiple of 64, or a power of two below that, so that chunks divide it."""
    n = max(1, size // (2 * context * max(1, width)))
    return n - n % 64 if n >= 64 else 1 << n.bit_length() - 1


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
    version = f.count("schema_version", least=1)
    if version > SCHEMA_VERSION:
        raise StoreError(f"{f.source}: schema version {version} is newer than {SCHEMA_VERSION}, which this saejax reads; "
                         "update saejax")
    if version < SCHEMA_VERSION:
        raise StoreError(f"{f.source}: schema version {version} is no longer read, only {SCHEMA_VERSION}; run `saejax harvest` "
                         "again into another directory")


def spec_digest(spec: StoreSpec) -> str:
    """SHA-256 of what decides the bytes of a shard, in canonical JSON: all of the spec but how many shards there are to be."""
    values = {key: value for key, value in spec.to_json().items() if key != "target_contexts"}
    return text_sha256(json.dumps(values, sort_keys=True, separators=(",", ":")))


def self_digest(values: dict) -> str:
    """SHA-256 of the manifest without its own "sha256", in canonical JSON."""
    rest = {k: v for k, v in values.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def manifest_of(spec: StoreSpec, n_contexts: int, kept_rows: int, crcs: dict, statistics_sha256: str) -> dict:
    """The manifest of a finished store. crcs: `saejax.base.verified.digests` of `crcs.bin`."""
    values = {"kind": KIND, "schema_version": SCHEMA_VERSION, "spec": spec.to_json(), "n_contexts": n_contexts,
              "rows": n_contexts * spec.context, "kept_rows": kept_rows, "crcs": crcs, "statistics_sha256": statistics_sha256}
    return values | {"sha256": self_digest(values)}


def crc_block(spec: StoreSpec, n_contexts: int) -> int:
    """Bytes of a block of `crcs.bin` that has a digest of its own."""
    return block_of(spec.shards(n_contexts) * spec.crc_bytes, MOST_BLOCKS)


def read_manifest(path: Path) -> tuple[dict, StoreSpec]:
    """The manifest, validated: types, digest, and every number that follows from others computed again.

    Raises `StoreCorruptError` naming the key, `StoreError` for another schema.
    """
    f = file_keys(path)
    check_version(f)
    if f.hex("sha256") != self_digest(f.values):
        raise StoreCorruptError(f"{path}: altered since it was written (its digest does not verify); {AGAIN}")
    spec = read_spec(f)
    n_contexts, kept = f.count("n_contexts", least=1, most=spec.target_contexts), f.count("kept_rows", least=1)
    if f.count("rows") != n_contexts * spec.context or kept > n_contexts * spec.context:
        f.refuse(f"rows or kept_rows does not follow from {n_contexts} contexts of {spec.context}")
    f.hex("statistics_sha256")
    crcs, size = f.section("crcs"), spec.shards(n_contexts) * spec.crc_bytes
    crcs.hex("sha256")
    crcs.one_of("bytes", (size,))
    blocks, block = crcs.get("blocks", list), crc_block(spec, n_contexts)
    if len(blocks) != -(-size // block) or not all(type(word) is int and 0 <= word < 1 << 32 for word in blocks):
        crcs.refuse(f"blocks are not {-(-size // block)} checksums of {block} bytes each")
    crcs.refuse_unread()
    f.refuse_unread()
    return f.values, spec
