"""`saejax search`: features by what they do."""

import json
from dataclasses import asdict

import numpy as np

from saejax.base.errors import ConfigError, FeatureIndexError
from saejax.base.storage import is_writer
from saejax.base.text import visible
from saejax.cli.arguments import Arguments
from saejax.cli.subjects import explanations, one_subject, prompts_of, vector_of
from saejax.features.index.logits import rows_of
from saejax.features.index.neighbours import nearest
from saejax.features.index.reader import FeatureIndex
from saejax.features.search import prompt, sets, text
from saejax.features.search.found import Found
from saejax.runs.subject import Subject, open_subject
from saejax.sae.inference import SAE

WAYS = ("prompt", "positives", "set", "find", "like")


def start(arguments: Arguments) -> int:
    """Prints the features that fit best, with the tokens that they fire on where there is an index."""
    given = {name: value for name, value in arguments.options.items() if name != "json" and value is not None}
    ways = [name for name in WAYS if name in given]
    if len(ways) != 1 or len(arguments.paths) != 1:
        raise ConfigError("saejax search: give one SAE, and one of --prompt, --set, --positives, --find and --like")
    explained = explanations(arguments)
    if explained and ways != ["find"]:
        raise ConfigError("saejax search: --explanations belongs to --find")
    subject = one_subject(arguments, "search")
    if explained:
        found, index = text.by_explanation(explained, given["find"]), subject.index_if_any()
    elif ways == ["find"]:
        found, index = text.by_text(subject.index, given["find"]), subject.index
    else:
        index = subject.index_if_any() if "within" not in given else None
        found = _searched(subject, given)
    if not is_writer():
        return 0
    if arguments.json:
        print(json.dumps([asdict(one) for one in found]))
        return 0
    print("\n".join(_line(one, index) for one in found) or "no feature fits")
    return 0


def _line(one: Found, index: FeatureIndex | None) -> str:
    """A feature as `saejax search` prints it."""
    tokens = "" if index is None else index.fires_on(one.feature)
    return f"{one.feature:>8}  {one.score:>9.4g}  {visible(one.why, 200)}{f'; fires on: {tokens}' if tokens else ''}"


def _searched(subject: Subject, given: dict[str, str]) -> list[Found]:
    sae = subject.sae
    if "like" in given:
        return _alike(sae, given["like"], _other(given["within"], sae) if "within" in given else None)
    if given.get("set") == "multilingual":
        return sets.by_meaning(subject.lm, sae)
    if "set" in given:
        return sets.by_sets(subject.lm, sae, *sets.prompt_set(given["set"]))
    if "positives" in given:
        negatives = prompts_of(given["negatives"]) if "negatives" in given else ()
        return sets.by_sets(subject.lm, sae, prompts_of(given["positives"]), negatives)
    if "answer" in given:
        return prompt.by_attribution(subject.lm, sae, given["prompt"], given["answer"], given.get("against"))
    return prompt.by_prompt(subject.lm, sae, given["prompt"])


def _other(source: str, sae: SAE) -> SAE:
    """Another SAE, whose decoder writes to the same place."""
    other = open_subject(source).sae
    if (other.cfg.targets, other.params.W_dec.shape[1]) != (sae.cfg.targets, sae.params.W_dec.shape[1]):
        raise FeatureIndexError(f"--within={source}: its decoder writes to {', '.join(other.cfg.targets)}, this one's to "
                                f"{', '.join(sae.cfg.targets)}; directions of two places cannot be compared")
    return other


def _alike(sae: SAE, given: str, other: SAE | None) -> list[Found]:
    """Nearest to a feature, by number, or to a vector, in an .npy file."""
    where, width = other or sae, sae.params.W_dec.shape[1]
    if given.endswith(".npy"):
        direction, own = vector_of("like", given)[None], None
        if direction.shape[1] != width:
            raise FeatureIndexError(f"--like={given}: {direction.shape[1]} numbers; the decoder's directions have {width}")
    else:
        feature = _numbered(sae, given)
        direction, own = rows_of(sae, sae.params.W_dec, feature, feature + 1), None if other else np.array([feature])
    ids, cosines = nearest(where.params.W_dec, direction, 10, where.mesh, own=own)
    return [Found(int(i), float(c), "cosine of the decoder directions") for i, c in zip(ids[0], cosines[0], strict=True)]


def _numbered(sae: SAE, number: str) -> int:
    if not number.isdecimal() or int(number) >= sae.cfg.d_sae:
        raise FeatureIndexError(f"--like={number}: there is no such feature; they are numbered 0 to {sae.cfg.d_sae - 1}")
    return int(number)
