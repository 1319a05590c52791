"""`FeatureIndex`: what is known of every feature, on disk. docs/reference/feature_files.md describes the directory.

    manifest.json        written last: what it was made from (fingerprints), totals, digests of the files
    features.parquet     one row a feature: counts, maximum, histograms, top tokens, logit effects, neighbours
    examples.parquet     one row an example, by feature; a row group holds those of 256 features
    vocabulary.parquet   the text of every token id, and its bytes
    tokens.npy keep.npy  [contexts, T] the corpus' tokens, and which of them are unmasked
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saejax.base import sharding
from saejax.base.errors import FeatureIndexError
from saejax.base.fingerprints import fingerprints
from saejax.base.storage import file_sha256, read_json, text_sha256
from saejax.base.text import visible
from saejax.base.verified import VerifiedFile
from saejax.features.index.corpus import Tokens
from saejax.features.index.feature import Example, Feature
from saejax.features.index.neighbours import ALL
from saejax.features.index.source import differences
from saejax.lm import LM
from saejax.lm.token_text import joined
from saejax.sae import tensors
from saejax.sae.inference import SAE

KIND, SCHEMA_VERSION = "saejax-feature-index", 3
MANIFEST, FEATURES, EXAMPLES, VOCABULARY = "manifest.json", "features.parquet", "examples.parquet", "vocabulary.parquet"
FILES = (FEATURES, EXAMPLES, VOCABULARY, *Tokens.FILES)
GROUP = 256  # features of a row group of examples

_NEAR = [("ids", pa.list_(pa.int32())), ("scores", pa.list_(pa.float32()))]
FEATURE_SCHEMA = pa.schema([
    ("feature", pa.int32()), ("fired", pa.int64()), ("density", pa.float64()), ("mean", pa.float64()), ("max", pa.float32()),
    ("decoder_norm", pa.float32()), ("encoder_norm", pa.float32()), ("bias", pa.float32()),
    ("log_edges", pa.list_(pa.float32())), ("log_counts", pa.list_(pa.int64())),
    ("linear_width", pa.float64()), ("linear_counts", pa.list_(pa.int64())), ("interval_counts", pa.list_(pa.float32())),
    ("token_ids", pa.list_(pa.int32())), ("token_shares", pa.list_(pa.float32())), ("token_means", pa.list_(pa.float32())),
    ("logit_ids", pa.list_(pa.int32())), ("logit_effects", pa.list_(pa.float32())),
    *((f"cosine_{name}", kind) for name, kind in _NEAR), *((f"firing_{name}", kind) for name, kind in _NEAR),
    ("firing_support", pa.list_(pa.int32()))])


def example_schema(window: int) -> pa.Schema:
    """`acts`: the feature's activations at the `window` tokens from `start` on; 0 at masked ones."""
    return pa.schema([("feature", pa.int32()), ("interval", pa.int8()), ("value", pa.float32()), ("context", pa.int64()),
                      ("position", pa.int32()), ("start", pa.int32()), ("acts", pa.list_(pa.float32(), window))])


def sae_fingerprint(sae: SAE) -> str:
    """Digest of an SAE's parameters, the same for every mesh, and for a run and its release."""
    with jax.set_mesh(sae.mesh or sharding.single_device_mesh()):
        return text_sha256(json.dumps(fingerprints(tensors(sae.params)), sort_keys=True))


class FeatureIndex:
    """An index that was built to its end."""

    def __init__(self, path: Path, manifest: dict):
        self.path, self.manifest = path, manifest
        self.card = None  # HTML of a feature for notebooks, where somebody draws it
        self.near = None  # [(feature, cosine)] of a feature that has no neighbours here, where somebody finds them
        self.features: int = manifest["sae"]["d_sae"]
        self.window: int = manifest["settings"]["window"]
        self._group = functools.lru_cache(maxsize=4)(lambda name, group: self._tables[name].read_row_group(group))
        self._tables = {name: pq.ParquetFile(self._verified(name)) for name in (FEATURES, EXAMPLES)}

    @classmethod
    def open(cls, path: str | Path, *, sae: SAE | None = None, lm_: LM | None = None, full: bool = False,
             advance: Callable[[int], object] = lambda _: None) -> "FeatureIndex":
        """Opens a finished index; sizes of the files are compared, with `full` their digests. Whatever is read later is checked
        against digests of its blocks.

        sae, lm_: what it is to be used with. advance: is told how many bytes have been read for digests. Raises
        `FeatureIndexError` when it is missing, unfinished, altered, of a newer schema, or built for another checkpoint or model.
        """
        path = Path(path)
        manifest = read_manifest(path)
        for name, entry in manifest["files"].items():
            file = path / name
            if not file.is_file() or file.stat().st_size != entry["bytes"] or (
                    full and file_sha256(file, advance) != entry["sha256"]):
                raise FeatureIndexError(f"{file}: missing or altered since the index was built; build it again (saejax features)")
        check_belongs(path, manifest, sae, lm_)
        try:
            return cls(path, manifest)
        except pa.ArrowException as error:
            raise FeatureIndexError(f"{path}: not readable ({' '.join(str(error).split())[:200]}); build it again") from error

    @property
    def has_all_neighbours(self) -> bool:
        """Whether every feature has its neighbours by decoder row; else some or none have."""
        return self.manifest["settings"].get("neighbours", ALL) == ALL

    def check_feature(self, feature: int) -> int:
        """`feature`, or `FeatureIndexError` when there is no such feature."""
        if not 0 <= feature < self.features:
            raise FeatureIndexError(f"feature {feature}: {self.path} has features 0 to {self.features - 1}")
        return feature

    def column(self, name: str) -> np.ndarray:
        """A number of every feature: `fired`, `density`, `mean`, `max`, `decoder_norm`, `encoder_norm`, `bias`."""
        return self._tables[FEATURES].read(columns=[name])[name].to_numpy()

    def lists(self, name: str) -> list[list]:
        """A list of every feature, as `token_ids`."""
        return self._tables[FEATURES].read(columns=[name])[name].to_pylist()

    def heads(self, name: str, n: int) -> np.ndarray:
        """[F, n]: the first n of a list of every feature, as `token_ids`; -1 where it has fewer. Lists are read in pieces."""
        found = []
        for batch in self._tables[FEATURES].iter_batches(columns=[name]):
            lists = batch.column(0)
            border, values = lists.offsets.to_numpy(), lists.values.to_numpy()
            place_FN = border[:-1, None] + np.arange(n)
            found.append(np.append(values, values.dtype.type(-1))[np.where(place_FN < border[1:, None], place_FN, len(values))])
        return np.concatenate(found)

    def _verified(self, name: str) -> VerifiedFile:
        return VerifiedFile(self.path / name, self.manifest["files"][name]["blocks"], FeatureIndexError)

    @functools.cached_property
    def _tokens(self) -> Tokens:
        for name in Tokens.FILES:  # read through once; numpy maps them afterwards
            self._verified(name).readall()
        return Tokens(self.path)

    @property
    def tokens_NT(self) -> np.ndarray:
        """int32 [contexts, T]: the corpus' tokens."""
        return self._tokens.tokens_NT

    @property
    def keep_NT(self) -> np.ndarray:
        """bool [contexts, T]: which of them are unmasked."""
        return self._tokens.keep_NT

    @functools.cached_property
    def vocabulary(self) -> list[str]:
        """The text of every token id by itself: whatever the corpus holds; a byte that is no whole character is `<0xF0>`."""
        return self._vocabulary["text"].to_pylist()

    @functools.cached_property
    def _vocabulary(self) -> pa.Table:
        return pq.read_table(self._verified(VOCABULARY))

    @functools.cached_property
    def _pieces(self) -> list[bytes]:
        return self._vocabulary["bytes"].to_pylist()

    def fires_on(self, feature: int, n: int = 5) -> str:
        """The tokens that a feature fires on most, safe to look at, with blanks between."""
        return " ".join(visible(self.token(t)) for t in self.rows(feature, feature + 1)[0]["token_ids"][:n])

    def token(self, number: int) -> str:
        """The text of a token id, as it is: `visible` makes it safe to look at. A model may have rows for more ids than the
        tokenizer knows: those are called `token N`.
        """
        return self.vocabulary[number] if 0 <= number < len(self.vocabulary) else f"token {number}"

    def texts(self, ids) -> list[str]:
        """The texts of neighbouring tokens: together they are the text, as it is (`saejax.lm.token_text.joined`)."""
        return self._joined(ids)[0]

    def _joined(self, ids) -> tuple[list[str], list[int]]:
        pieces, known = self._pieces, range(len(self._pieces))
        return joined([pieces[i] if i in known else self.token(i).encode() for i in np.asarray(ids).tolist()])

    def shown(self, context: int, start: int, acts) -> tuple[list[str], list[float], list[int]]:
        """(text, activation, the token that shows it) of the tokens of a context from `start` on, one for each of `acts`. Where
        several tokens make one character, the first has the character and the largest of their activations, the others neither.
        """
        texts, shown_by = self._joined(self.tokens_NT[context, start:start + len(acts)])
        acts_W = np.zeros(len(texts), np.float32)
        np.maximum.at(acts_W, shown_by, np.asarray(acts, np.float32))
        return texts, acts_W.tolist(), shown_by

    def __len__(self) -> int:
        return self.features

    def __getitem__(self, number: int) -> Feature:
        """A feature by its number. Raises `FeatureIndexError` where there is none."""
        if isinstance(number, bool) or not isinstance(number, int | np.integer):
            raise FeatureIndexError(f"{number!r}: expected the number of a feature, 0 to {self.features - 1}")
        number = self.check_feature(int(number))
        row = self.rows(number, number + 1)[0]
        logits = list(zip(map(self.token, row["logit_ids"]), row["logit_effects"], strict=True))
        half = len(logits) // 2
        examples = [self._example(e) for e in self.examples(number)]
        tokens = list(zip(map(self.token, row["token_ids"]), row["token_shares"], strict=True))
        near = list(zip(row["cosine_ids"], row["cosine_scores"], strict=True)) or (self.near(number) if self.near else [])
        return Feature(number, row["fired"], row["density"], row["max"], row["mean"], tokens, logits[:half], logits[half:], near,
                       examples, self.card)

    def _example(self, e: dict) -> Example:
        texts, acts, _ = self.shown(e["context"], e["start"], e["acts"])
        return Example(e["interval"], e["value"], texts, np.array(acts), e["context"], e["position"])

    def to_pandas(self):
        """A data frame of all features: the columns of `FEATURE_SCHEMA` with `feature` as index, and `fires_on`."""
        frame = self._tables[FEATURES].read().to_pandas().set_index("feature")
        frame.insert(0, "fires_on", [" ".join(visible(self.token(t)) for t in ids[:5]) for ids in frame["token_ids"]])
        return frame

    def __repr__(self) -> str:
        totals = self.manifest["totals"]
        return (f"FeatureIndex({str(self.path)!r}, {self.features:,} features, {totals['alive']:,} alive on "
                f"{totals['kept_rows']:,} tokens)")

    def rows(self, first: int, last: int) -> list[dict]:
        """What is known of features first .. last - 1, by the names of `FEATURE_SCHEMA`."""
        return self._of(FEATURES, first, last)

    def examples(self, first: int, last: int | None = None) -> list[dict]:
        """Examples of features first .. last - 1 (of one feature without `last`), by the names of `example_schema`."""
        return self._of(EXAMPLES, first, first + 1 if last is None else last)

    def _of(self, name: str, first: int, last: int) -> list[dict]:
        return self.table(name, first, last).to_pylist()

    def table(self, name: str, first: int, last: int) -> pa.Table:
        """The part of `FEATURES` or `EXAMPLES` that belongs to features first .. last - 1."""
        self.check_feature(first), self.check_feature(last - 1)
        table = pa.concat_tables([self._group(name, g) for g in range(first // GROUP, (last - 1) // GROUP + 1)])
        begin, end = np.searchsorted(table["feature"].to_numpy(), (first, last))
        return table.slice(begin, end - begin)


def read_manifest(path: Path) -> dict:
    """The manifest of a finished index, its own digest verified."""
    if not (path / MANIFEST).is_file():
        raise FeatureIndexError(f"{path / MANIFEST}: missing, so there is no finished index; run `saejax features` (it resumes)")
    values = read_json(path / MANIFEST, FeatureIndexError)
    if not isinstance(values, dict) or values.get("kind") != KIND:
        raise FeatureIndexError(f"{path / MANIFEST}: not the manifest of a feature index")
    if values.get("schema_version") != SCHEMA_VERSION:
        raise FeatureIndexError(f"{path / MANIFEST}: schema version {values.get('schema_version')!r}, this saejax reads "
                                f"{SCHEMA_VERSION}; use the saejax that wrote it, or build the index again (`saejax features`, "
                                "rebuild)")
    if values.get("sha256") != manifest_digest(values):
        raise FeatureIndexError(f"{path / MANIFEST}: altered since it was written; build the index again")
    return values


def manifest_digest(values: dict) -> str:
    """SHA-256 of a manifest without its own digest."""
    rest = {key: value for key, value in values.items() if key != "sha256"}
    return text_sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")))


def check_belongs(path: Path, manifest: dict, sae: SAE | None, lm_: LM | None) -> None:
    """Raises one `FeatureIndexError` that lists what an index was not built for."""
    problems = differences(manifest, {
        "sae": {} if sae is None else {"fingerprint": sae_fingerprint(sae)},
        "corpus": {} if lm_ is None else {"model_digest": lm_.digest, "tokenizer_digest": lm_.tokenizer.digest}})
    if problems:
        raise FeatureIndexError(f"{path}: was built for {' and '.join(problems)}; build an index for this one into another "
                                "directory")
