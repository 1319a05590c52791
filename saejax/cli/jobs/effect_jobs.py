"""The jobs about what features do: `saejax steer`, `saejax attribute` and `saejax neurons`."""

import json
import math
from pathlib import Path

import numpy as np

from saejax import lm
from saejax.base.errors import ConfigError, FeatureIndexError
from saejax.base.logs import say
from saejax.base.storage import is_writer
from saejax.base.text import visible
from saejax.cli.arguments import Arguments
from saejax.cli.jobs import jobs
from saejax.cli.jobs.feature_jobs import INDEX, fires_on, prompts_of, vector_of
from saejax.config import Config
from saejax.features.compare import neurons as correlation
from saejax.features.effects import steering
from saejax.features.effects.attribution import ablate, agreement, attribute
from saejax.features.effects.steering import Change
from saejax.features.index import corpus
from saejax.features.index.reader import MANIFEST, FeatureIndex
from saejax.formats import load
from saejax.formats.loading import OURS, recognise
from saejax.pages import effects as pages
from saejax.sae.inference import SAE

_TOKENS, _SHOWN = 40, 15


def steer(arguments: Arguments) -> int:
    """Prints how a prompt goes on under each change, the unsteered text first."""
    if not arguments.option("prompt"):
        raise ConfigError("saejax steer: give --prompt=TEXT, and what to steer with")
    scales, factors = _numbers(arguments, "scale", "-5,5"), _numbers(arguments, "vector_scale", "1")
    config, sae, lm_ = _subject(arguments)
    changes = [Change(), *_of_feature(arguments, config, sae, lm_, scales), *_of_vectors(arguments, sae, lm_, factors)]
    if len(changes) == 1:
        raise ConfigError("saejax steer: give --feature=N, --add-direction=FILE.npy, or --positives=FILE and --negatives=FILE")
    how = {"positions": _positions(arguments), "tokens": arguments.option("tokens") or _TOKENS,
           "sampling": lm.Sampling(_number(arguments, "temperature") or 0.0)}
    prompt = arguments.option("prompt")
    rows = list(zip([c.label for c in changes], steering.continuations(lm_, sae, prompt, changes, **how), strict=True))
    if not is_writer():
        return 0
    if arguments.option("html"):
        settings = [("positions", arguments.option("positions") or "all"), ("SAE", str(sae))]
        pages.write_steering(Path(arguments.option("html")), lm_, title=_title(arguments), prompt=prompt, settings=settings,
                             rows=rows)
    if arguments.json:
        print(json.dumps([{"change": label, "text": text} for label, text in rows]))
        return 0
    width = max(len(label) for label, _ in rows)
    print("\n".join(f"{visible(label, 200):<{width}}  {visible(text, 4000)}" for label, text in rows))
    return 0


def attribute_(arguments: Arguments) -> int:
    """Prints the pairs of token and feature that speak most for a next token, with what ablating them does."""
    if not arguments.option("prompt") or not arguments.option("token"):
        raise ConfigError("saejax attribute: give --prompt=TEXT and --token=TOKEN, and --against=TOKEN to compare it with")
    config, sae, lm_ = _subject(arguments)
    index = _index(config, sae, lm_)
    found = attribute(lm_, sae, arguments.option("prompt"), arguments.option("token"), arguments.option("against"))
    total, wanted = len(found.position_P), arguments.option("pairs") or math.inf
    chosen = None if wanted >= total else np.sort(np.random.default_rng(0).choice(total, wanted, replace=False))
    found = ablate(lm_, sae, found, chosen)
    if not is_writer():
        return 0
    labels = {} if index is None else {int(f): fires_on(index, int(f)) for f in np.unique(found.feature_P[found.best(100)])}
    if arguments.option("html"):
        pages.write_attribution(Path(arguments.option("html")), lm_, found, title=_title(arguments), labels=labels)
    said, text = agreement([found]), lm_.tokenizer.token_strings(found.tokens_T)
    best = [{"position": int(found.position_P[p]), "token": text[found.position_P[p]], "feature": int(found.feature_P[p]),
             "activation": float(found.activation_P[p]), "attribution": float(found.attribution_P[p]),
             "ablation": float(found.ablation_P[p]) if np.isfinite(found.ablation_P[p]) else None}
            for p in found.best(total if arguments.json else _SHOWN)]
    if arguments.json:
        print(json.dumps({"difference": found.difference, **said, "found": best}))
        return 0
    print(f"logit difference {found.difference:.4g}; {total:,} active pairs of token and feature, {said['pairs']:,} ablated")
    for one in best:
        ablation = "" if one["ablation"] is None else f"{one['ablation']:.4g}"
        print(f"{one['feature']:>8}  attribution {one['attribution']:>10.4g}  ablation {ablation:>10}  activation "
              f"{one['activation']:>9.4g}  token {one['position']} {visible(one['token'])}  {labels.get(one['feature'], '')}")
    print(f"correlation with the ablation: attribution {_shown(said['attribution'])} (Templeton et al. 2024: 0.81), activation "
          f"{_shown(said['activation'])} (0.12)")
    return 0


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


def _title(arguments: Arguments) -> str:
    return f"{arguments.paths[0].name}: {arguments.option('prompt')}"


def _subject(arguments: Arguments) -> tuple[Config | None, SAE, lm.LM]:
    """(config of a run, None of other files; the SAE on one device; its language model)."""
    if len(arguments.paths) != 1:
        raise ConfigError("give one run, checkpoint step, release or files of another library")
    path, = arguments.paths
    config = None
    if path.exists() and recognise(path) in OURS:
        [(config, path)] = jobs.located(arguments)
    sae, other = load(str(path)), arguments.option("model")
    if config is None or other:
        return config, sae, lm.load(other or sae.cfg.model)
    return config, sae, lm.load(config.lm.model, revision=config.lm.revision, dtype=config.lm.dtype)


def _index(config: Config | None, sae: SAE, lm_: lm.LM) -> FeatureIndex | None:
    """The run's index where there is one that belongs to this SAE and model."""
    home = None if config is None else Path(config.run_dir) / INDEX
    if home is None or not (home / MANIFEST).is_file():
        return None
    try:
        return FeatureIndex.open(home, sae=sae, lm_=lm_)
    except FeatureIndexError as error:
        say(f"{error}; what features fire on is not shown")
        return None


def _of_feature(arguments: Arguments, config: Config | None, sae: SAE, lm_: lm.LM, scales: list[float]) -> list[Change]:
    number, largest = arguments.option("feature"), _number(arguments, "max")
    if number is None:
        if arguments.option("ablate") or arguments.option("scale"):
            raise ConfigError("saejax steer: --scale and --ablate need --feature=N")
        return []
    if not number.isdecimal():
        raise ConfigError(f"saejax steer: --feature={number}: expected a number from 0 to {sae.cfg.d_sae - 1}")
    feature = steering.check_feature(sae, int(number))
    ablated = [steering.ablated(feature)] if arguments.option("ablate") else []
    if ablated and not arguments.option("scale"):
        return ablated
    if largest is None:
        if config is None:
            raise ConfigError("saejax steer: only a run has an index that knows the feature's maximum: give --max=VALUE")
        largest = steering.maximum(FeatureIndex.open(Path(config.run_dir) / INDEX, sae=sae, lm_=lm_), feature)
    return [*(steering.clamped(feature, scale, largest) for scale in scales), *ablated]


def _of_vectors(arguments: Arguments, sae: SAE, lm_: lm.LM, factors: list[float]) -> list[Change]:
    found, file = {}, arguments.option("add-direction")
    if file:
        found[f"direction {Path(file).name}"] = vector_of("add-direction", file)
    sets = [arguments.option(name) for name in ("positives", "negatives")]
    if any(sets):
        if not all(sets):
            raise ConfigError("saejax steer: --positives=FILE and --negatives=FILE go together")
        found["few-shot vector"] = steering.few_shot_vector(lm_, sae.cfg.targets[0], *map(prompts_of, sets))
    return [Change(f"{label} x {factor:g}", vector=factor * vector) for label, vector in found.items() for factor in factors]


def _positions(arguments: Arguments) -> str | list[int]:
    given = arguments.option("positions") or "all"
    if given in ("all", "last"):
        return given
    parts = given.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(f"saejax steer: --positions={given}: expected all, last, or token numbers as 3,4")
    return [int(part) for part in parts]


def _numbers(arguments: Arguments, name: str, default: str) -> list[float]:
    given = arguments.option(name) or default
    try:
        found = [float(part) for part in given.split(",")]
    except ValueError:
        found = []
    if not found or not all(map(math.isfinite, found)):
        raise ConfigError(f"--{name}={given}: expected numbers as -5,0,5")
    return found


def _number(arguments: Arguments, name: str) -> float | None:
    """A number that is not negative."""
    if arguments.option(name) is None:
        return None
    found = _numbers(arguments, name, "")
    if len(found) > 1 or found[0] < 0:
        raise ConfigError(f"--{name}={arguments.option(name)}: expected one number that is not negative")
    return found[0]


def neurons(arguments: Arguments) -> int:
    """Writes the table of features against neurons and prints how few of them a neuron stands for."""
    config, sae, lm_ = _subject(arguments)
    if config is None:
        raise ConfigError("saejax neurons: give a run or a checkpoint step, whose config names the text")
    tokens, split = arguments.option("tokens") or 200_000, arguments.option("text") or "train"
    text = corpus.from_text(config.text, lm_, sae.cfg.hookpoints, seed=config.seed_of_data, split=split,
                            mask_special=config.harvest.mask_special, tokens=tokens)
    path = arguments.out or Path(config.run_dir) / "neurons"
    options = correlation.Options(features=arguments.option("sample"), progress=config.log.progress, about=tokens)
    said = correlation.shares(correlation.correlate(path, sae, lm_, text, options))
    if not is_writer():
        return 0
    if arguments.json:
        print(json.dumps({"table": str(path / correlation.TABLE), **said}))
        return 0
    print(f"neurons  {path / correlation.TABLE}: {said['features']:,} features fired at least {correlation.LEAST_FIRED} times, "
          f"{said['left_out']:,} did not and are left out")
    if said["features"]:
        print(f"highest correlation with a neuron before it at most {correlation.LOW}: {100 * said['correlation']:.1f} % of them "
              f"(Templeton et al. 2024: 82 %); of largest size at most that: {100 * said['absolute']:.1f} %")
    return 0
