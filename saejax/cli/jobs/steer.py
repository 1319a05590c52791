"""`saejax steer`: how a prompt goes on with features set, ablated, or a direction added."""

import json
from dataclasses import dataclass
from pathlib import Path

from saejax.base.errors import ConfigError
from saejax.cli.options import (
    IndexOptions,
    Job,
    Json,
    SubjectOptions,
    count,
    features,
    number,
    numbers,
    path,
    places,
    refuse,
    switch,
    value,
    whole,
)


@dataclass(frozen=True)
class Options(Json, IndexOptions, SubjectOptions):
    paths: tuple[str, ...] = places("SAE", "a run or other files of an SAE", most=1)
    prompt: str | None = value("what to go on with", "TEXT", required=True)
    chat: bool = switch("the prompt is a user's message in the model's own chat template")
    feature: tuple[int, ...] | None = value("set these features together, the rest of the SAE and its error being kept,",
                                            "N[,N...]", features)
    scale: tuple[float, ...] | None = value("to these multiples of their maximum in the index (default -5,5)", "LIST", numbers)
    max: float | None = value("the maximum, where there is no index", "VALUE", number)
    values: tuple[float, ...] | None = value("to these activations, instead of multiples", "LIST", numbers)
    ablate: bool = switch("set them to 0")
    add_direction: Path | None = value("add this vector", "FILE.npy", path)
    positives: Path | None = value("add the few-shot vector: mean at the last token of these prompts (one a line)", "FILE", path)
    negatives: Path | None = value("less the mean of those", "FILE", path)
    vector_scale: tuple[float, ...] = value("multiples of the vectors", "LIST", numbers, default=(1.0,))
    positions: str = value("all: every token but special ones, of prompt and continuation; last: the prompt's last; 3,4: these "
                           "of the prompt, BOS being 0", "WHERE", default="all")
    tokens: int = value("length of the continuation", "N", count, default=40)
    samples: int = value("continuations of each change, drawn", "N", count, default=1)
    seed: int = value("of the drawing", "N", whole, default=0)
    temperature: float | None = value("of sampling (default 0: the most likely token; 1 where there are several samples)", "T",
                                      number)
    top_p: float = value("draw from the most likely tokens whose probability together reaches this", "P", number, default=1.0)
    html: Path | None = value("write a page, too", "FILE", path)


def run(options: Options) -> int:
    """Prints how a prompt goes on under each change, the unsteered text first."""
    from saejax import lm
    from saejax.base.storage import is_writer
    from saejax.base.text import visible
    from saejax.cli.subjects import one_subject
    from saejax.features.effects import steering
    _refused(options)
    subject = one_subject(options, mesh=None)
    changes = [steering.Change(), *_of_features(options, subject), *_of_vectors(options, subject)]
    if len(changes) == 1:
        raise ConfigError("saejax steer: give --feature=N, --add-direction=FILE.npy, or --positives=FILE and --negatives=FILE")
    temperature = options.temperature if options.temperature is not None else float(options.samples > 1)
    prompt = options.prompt if not options.chat else subject.lm.tokenizer.chat([{"role": "user", "content": options.prompt}])
    distinct, changes = changes, [change for change in changes for _ in range(options.samples)]
    texts = steering.continuations(subject.lm, subject.sae, prompt, changes, positions=_positions(options), tokens=options.tokens,
                                   sampling=lm.Sampling(temperature, options.top_p), seed=options.seed)
    rows = list(zip([c.label for c in changes], texts, strict=True))
    found = steering.next_tokens(subject.lm, subject.sae, prompt, distinct[1:], positions=_positions(options))
    effects = {change.label: _effect(subject.lm, one) for change, one in zip(distinct[1:], found, strict=True)}
    if not is_writer():
        return 0
    if options.html:
        _page(options, subject, rows, effects)
    if options.json:
        kl = {change.label: one.kl for change, one in zip(distinct[1:], found, strict=True)}
        print(json.dumps([{"change": label, "text": text, "kl": kl.get(label, 0.0)} for label, text in rows]))
        return 0
    width = max(len(label) for label, _ in rows)
    print("\n".join(f"{visible(label, 200):<{width}}  {visible(text, 4000)}" for label, text in rows))
    print("\nnext token, against the unsteered model")
    print("\n".join(f"{visible(label, 200):<{width}}  {effect}" for label, effect in effects.items()))
    if options.html:
        print(f"page     {options.html}")
    return 0


def _refused(options: Options) -> None:
    """What is given without effect."""
    if options.add_direction is None and options.positives is None and options.negatives is None:
        refuse("steer", options, ("vector_scale",), "without --add-direction, or --positives and --negatives")
    if options.temperature == 0 or (options.temperature is None and options.samples == 1):
        refuse("steer", options, ("seed", "top_p", "samples"), "at temperature 0: the most likely token is taken")
    only_ablated = options.ablate and not options.scale
    if options.feature is not None and only_ablated and not options.values:
        refuse("steer", options, ("max",), "where features are only ablated")
    if not options.html and (only_ablated or options.feature is None or options.values or options.max is not None):
        refuse("steer", options, ("index",), "where no maximum is read from it, and no page is written")


def _effect(lm_, one) -> str:
    """KL and the largest changes of the next token's probability, safe to look at."""
    from saejax.base.text import visible
    moved = [f"{visible(repr(lm_.tokenizer.token(token)))} {before:.2g} -> {after:.2g}" for token, before, after in one.rises]
    return f"KL {one.kl:.3g}; {', '.join(moved)}"


def _page(options: Options, subject, rows, effects: dict[str, str]) -> None:
    from saejax.pages import effects as pages
    from saejax.pages.dashboard import address_in, beside
    settings = [("positions", options.positions, ""), ("SAE", str(subject.sae), "")]
    index = subject.index_if_any()
    dashboard = None if index is None else beside(index)
    for feature in options.feature or ():
        fires_on = "" if index is None else f"fires on {index.fires_on(feature)}"
        settings.append((f"feature {feature}", fires_on,
                         "" if dashboard is None else address_in(dashboard, feature, options.html)))
    pages.write_steering(options.html, subject.lm, title=f"{subject.name}: {options.prompt}", prompt=options.prompt,
                         settings=settings, rows=[(label, text, effects.get(label, "")) for label, text in rows])


def _of_features(options: Options, subject) -> list:
    from saejax.features.effects import steering
    if options.feature is None:
        if options.ablate or options.scale or options.values or options.max is not None:
            raise ConfigError("saejax steer: --scale, --values, --max and --ablate need --feature=N")
        return []
    if options.values and (options.scale or options.max is not None):
        raise ConfigError("saejax steer: --values are activations; leave --scale and --max out")
    chosen = [steering.check_feature(subject.sae, feature) for feature in options.feature]
    name = f"feature{'s' if len(chosen) > 1 else ''} {', '.join(map(str, chosen))}"
    ablated = [steering.Change(f"{name} ablated", dict.fromkeys(chosen, 0.0))] if options.ablate else []
    if options.values:
        return [*(steering.Change(f"{name} at {v:g}", dict.fromkeys(chosen, v)) for v in options.values), *ablated]
    if ablated and not options.scale:
        return ablated
    most = dict.fromkeys(chosen, options.max) if options.max is not None else _maxima(subject, chosen)
    scales = options.scale or (-5.0, 5.0)
    return [*(steering.Change(f"{name} x {scale:g}", {f: scale * most[f] for f in chosen}) for scale in scales), *ablated]


def _maxima(subject, chosen: list[int]) -> dict[int, float]:
    from saejax.features.effects import steering
    if subject.index_home is None:
        subject.require(("how high the features rise", "index=DIR or max=VALUE"))
    return {feature: steering.maximum(subject.index, feature) for feature in chosen}


def _of_vectors(options: Options, subject) -> list:
    from saejax.cli.subjects import prompts_of, vector_of
    from saejax.features.effects import steering
    found, file = {}, options.add_direction
    if file:
        found[f"direction {file.name}"] = vector_of("add-direction", file)
    sets = [options.positives, options.negatives]
    if any(sets):
        if not all(sets):
            raise ConfigError("saejax steer: --positives=FILE and --negatives=FILE go together")
        found["few-shot vector"] = steering.few_shot_vector(subject.lm, subject.sae.cfg.targets[0], *map(prompts_of, sets))
    return [steering.Change(f"{label} x {factor:g}", vector=factor * vector) for label, vector in found.items()
            for factor in options.vector_scale]


def _positions(options: Options) -> str | list[int]:
    given = options.positions
    if given in ("all", "last"):
        return given
    parts = given.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(f"saejax steer: --positions={given}: expected all, last, or token numbers as 3,4")
    return [int(part) for part in parts]


JOB = Job(
    "steer", "act", "how a prompt goes on with features set, ablated, or a direction added", """
    Reads a run with its index (RUN/features), or any files that saejax.load reads, and the language model; prints the unsteered
    continuation and those of each change, all made in one batch; writes nothing but the page of --html.
    docs/how-to/steering.md has the equations.
    """, "saejax steer runs/demo --prompt='To be, or not' --feature=123 --scale=-5,0,5 --html=steered.html", Options, run)
