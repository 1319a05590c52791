"""`saejax search prompt|answer|sets|text|like`: features by what they do."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from saejax.base.errors import ConfigError, FeatureIndexError
from saejax.cli.options import IndexOptions, Job, Json, SubjectOptions, count, number, path, places, refuse, switch, value

_TEXT = "Reads a run or any files of an SAE, {reads}; prints the features that fit best and writes nothing."
_MODEL = "the language model, and the index (RUN/features or --index) where there is one"


@dataclass(frozen=True)
class Common(Json, IndexOptions, SubjectOptions):
    n: int = value("features to print", "N", count, default=10)


@dataclass(frozen=True)
class Prompt(Common):
    paths: tuple[str, ...] = places("SAE PROMPT", "an SAE and a prompt", least=2, most=2)
    by: str | None = value("rank by the activation, or relative to the feature's maximum in the index (default where there is "
                           "one)", "HOW", choices=("relative", "activation"))
    max_density: float | None = value("leave out features that are active on a larger share of the index' tokens (default 0.01; "
                                      "1: none)", "SHARE", number)
    per_token: bool = switch("the N features of each token instead of those of the whole text")


@dataclass(frozen=True)
class AnswerOptions(Common):
    paths: tuple[str, ...] = places("SAE PROMPT TOKEN", "an SAE, a prompt and its next token", least=3, most=3)
    against: str | None = value("another next token (default: the mean logit)", "TOKEN")


@dataclass(frozen=True)
class Sets(Common):
    paths: tuple[str, ...] = places("SAE", "an SAE", most=1)
    set: str | None = value("prompts that come with saejax: code_vulnerabilities, code_errors, deception_and_power, sycophancy, "
                            "bias, dangerous_content, self_representation; or multilingual: features that follow the meaning of "
                            "sentences in five languages", "NAME")
    positives: Path | None = value("a file of prompts, one a line, on which a feature is active,", "FILE", path)
    negatives: Path | None = value("and one of prompts on which it is not: in line i the partner of the positive of line i, at "
                                   "least five pairs", "FILE", path)


@dataclass(frozen=True)
class Text(Common):
    paths: tuple[str, ...] = places("SAE TEXT", "an SAE and a text", least=2, most=2)
    explanations: Path | None = value("look into these explanations instead of the examples of the index", "FILE", path)


@dataclass(frozen=True)
class Like(Common):
    paths: tuple[str, ...] = places("SAE FEATURE|FILE.npy", "an SAE, and a feature's number or a vector", least=2, most=2)
    within: str | None = value("in another dictionary: feature splitting", "SAE")


@dataclass(frozen=True)
class Answer:
    """What a search gives to print. groups: (heading, features). tokens: whether what they fire on is known. foot: the last line.
    json: instead of the features.
    """

    groups: list[tuple[str, list]]
    tokens: bool = True
    none: str = "no feature fits"
    foot: str = ""
    json: Any = field(default=None)


def _one(found: list, **more) -> Answer:
    return Answer([("", found)], **more)


def _found(find):
    """A job that prints the `Answer` of `find(subject, options)`."""
    def run(options) -> int:
        from dataclasses import replace

        from saejax.base.storage import is_writer
        from saejax.cli.subjects import one_subject
        if getattr(options, "within", None):
            refuse("search like", options, ("index",), "with --within: it is of the first SAE's features")
        subject = one_subject(replace(options, paths=options.paths[:1]))
        answer = find(subject, options)
        if not is_writer():
            return 0
        if options.json:
            features = [asdict(one) for _, found in answer.groups for one in found]
            print(json.dumps(features if answer.json is None else answer.json))
            return 0
        index = subject.index_if_any() if answer.tokens else None
        lines = [line for heading, found in answer.groups
                 for line in ([heading] * bool(heading) + [_line(one, index) for one in found])]
        any_found = any(found for _, found in answer.groups)
        print("\n".join([*(lines if any_found else [answer.none] * bool(answer.none)), *[answer.foot] * bool(answer.foot)]))
        return 0

    return run


def _line(one, index) -> str:
    from saejax.base.text import visible
    tokens = "" if index is None else index.fires_on(one.feature)
    return f"{one.feature:>8}  {one.score:>9.4g}  {visible(one.why, 200)}{f'; fires on: {tokens}' if tokens else ''}"


def _prompt(subject, options: Prompt) -> Answer:
    from saejax.base.text import visible
    from saejax.features.search.prompt import by_prompt, by_token
    from saejax.runs import actions
    index = subject.index_if_any()
    if options.max_density is not None and index is None:
        raise ConfigError("--max-density: no index here knows the densities; give --index=DIR (saejax features makes one)")
    ranking = actions.ranking(index, options.by, options.max_density)
    none = "no feature fits"
    if index is not None and ranking.most_dense < 1:
        none += f"; those active on more than {100 * ranking.most_dense:g} % of the tokens are left out (--max-density)"
    given = subject.lm, subject.sae, options.paths[1], options.n, ranking
    if not options.per_token:
        return _one(by_prompt(*given), none=none)
    each = by_token(*given)
    return Answer([(f"token {one.position} {visible(repr(one.token))}", one.found) for one in each], none=none,
                  json=[asdict(one) for one in each])


def _answer(subject, options: AnswerOptions) -> Answer:
    from saejax.features.search.prompt import by_attribution
    subject.index_if_any()
    return _one(by_attribution(subject.lm, subject.sae, *options.paths[1:], options.against, options.n))


def _sets(subject, options: Sets) -> Answer:
    from saejax.cli.subjects import prompts_of
    from saejax.features.search import sets
    files = options.positives, options.negatives
    if (options.set is None) == (None in files) or (options.set and any(files)):
        raise ConfigError("saejax search sets: give --set=NAME, or --positives=FILE and --negatives=FILE")
    if options.set == "multilingual":
        tested = sets.by_meaning(subject.lm, subject.sae, options.n)
    else:
        pair = sets.prompt_set(options.set) if options.set else map(prompts_of, files)
        tested = sets.by_sets(subject.lm, subject.sae, *pair, options.n)
    return _one(tested.found, none="", foot=str(tested), json=asdict(tested))


def _text(subject, options: Text) -> Answer:
    from saejax.cli.subjects import explanations
    from saejax.features.search.text import by_explanation, by_text
    if options.explanations:
        return _one(by_explanation(explanations(options), options.paths[1], options.n))
    return _one(by_text(subject.index, options.paths[1], options.n))


def _like(subject, options: Like) -> Answer:
    from saejax.cli.subjects import vector_of
    from saejax.runs import actions
    sae, given = subject.sae, options.paths[1]
    other = _other(options.within, sae) if options.within else None
    if given.endswith(".npy"):
        direction, width = vector_of("", Path(given)), sae.params.W_dec.shape[1]
        if len(direction) != width:
            raise FeatureIndexError(f"{given}: {len(direction)} numbers; the decoder's directions have {width}")
    elif given.isdecimal():
        direction = int(given)
    else:
        raise FeatureIndexError(f"{given}: there is no such feature; they are numbered 0 to {sae.cfg.d_sae - 1}")
    return _one(actions.alike(sae, direction, other, options.n), tokens=other is None)


def _other(source: str, sae):
    """Another SAE, whose decoder writes to the same place."""
    from saejax.runs.opening import open_subject
    other = open_subject(source).sae
    if (other.cfg.targets, other.params.W_dec.shape[1]) != (sae.cfg.targets, sae.params.W_dec.shape[1]):
        raise FeatureIndexError(f"--within={source}: its decoder writes to {', '.join(other.cfg.targets)}, this one's to "
                                f"{', '.join(sae.cfg.targets)}; directions of two places cannot be compared")
    return other


JOBS = (
    Job("search prompt", "understand", "features that are most active on a text", _TEXT.format(reads=_MODEL),
        "saejax search prompt runs/demo 'To be, or not to be'", Prompt, _found(_prompt)),
    Job("search answer", "understand", "features that speak for the next token of a text", _TEXT.format(reads=_MODEL),
        "saejax search answer runs/demo 'The capital of France is' ' Paris' --against=' Rome'", AnswerOptions, _found(_answer)),
    Job("search sets", "understand", "features that tell one set of prompts from another better than chance",
        _TEXT.format(reads=_MODEL), "saejax search sets runs/demo --set=bias", Sets, _found(_sets)),
    Job("search text", "understand", "features whose top examples hold a text more often than the corpus",
        _TEXT.format(reads="and the index"), "saejax search text runs/demo king", Text, _found(_text)),
    Job("search like", "understand", "features of decoder directions near to one", _TEXT.format(reads="and the index where there "
        "is one"), "saejax search like runs/demo 518", Like, _found(_like)),
)
