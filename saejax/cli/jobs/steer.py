"""`saejax steer`: how a prompt goes on with a feature set, ablated, or a direction added."""

import json
import math
from pathlib import Path

from saejax import lm
from saejax.base.errors import ConfigError
from saejax.base.storage import is_writer
from saejax.base.text import visible
from saejax.cli.arguments import Arguments
from saejax.cli.subjects import one_subject, prompts_of, vector_of
from saejax.features.effects import steering
from saejax.features.effects.steering import Change
from saejax.pages import effects
from saejax.runs.subject import Subject

_TOKENS = 40


def start(arguments: Arguments) -> int:
    """Prints how a prompt goes on under each change, the unsteered text first."""
    if not arguments.option("prompt"):
        raise ConfigError("saejax steer: give --prompt=TEXT, and what to steer with")
    scales, factors = _numbers(arguments, "scale", "-5,5"), _numbers(arguments, "vector_scale", "1")
    subject = one_subject(arguments, "steer", mesh=None)
    changes = [Change(), *_of_feature(arguments, subject, scales), *_of_vectors(arguments, subject, factors)]
    if len(changes) == 1:
        raise ConfigError("saejax steer: give --feature=N, --add-direction=FILE.npy, or --positives=FILE and --negatives=FILE")
    how = {"positions": _positions(arguments), "tokens": arguments.option("tokens") or _TOKENS,
           "sampling": lm.Sampling(_number(arguments, "temperature") or 0.0)}
    prompt, sae = arguments.option("prompt"), subject.sae
    rows = list(zip([c.label for c in changes], steering.continuations(subject.lm, sae, prompt, changes, **how), strict=True))
    if not is_writer():
        return 0
    if arguments.option("html"):
        settings = [("positions", arguments.option("positions") or "all"), ("SAE", str(sae))]
        effects.write_steering(Path(arguments.option("html")), subject.lm, title=f"{subject.name}: {prompt}", prompt=prompt,
                               settings=settings, rows=rows)
    if arguments.json:
        print(json.dumps([{"change": label, "text": text} for label, text in rows]))
        return 0
    width = max(len(label) for label, _ in rows)
    print("\n".join(f"{visible(label, 200):<{width}}  {visible(text, 4000)}" for label, text in rows))
    return 0


def _of_feature(arguments: Arguments, subject: Subject, scales: list[float]) -> list[Change]:
    number, largest = arguments.option("feature"), _number(arguments, "max")
    if number is None:
        if arguments.option("ablate") or arguments.option("scale"):
            raise ConfigError("saejax steer: --scale and --ablate need --feature=N")
        return []
    if not number.isdecimal():
        raise ConfigError(f"saejax steer: --feature={number}: expected a number from 0 to {subject.sae.cfg.d_sae - 1}")
    feature = steering.check_feature(subject.sae, int(number))
    ablated = [steering.ablated(feature)] if arguments.option("ablate") else []
    if ablated and not arguments.option("scale"):
        return ablated
    if largest is None:
        if subject.index_home is None:
            raise ConfigError("saejax steer: only an index knows the feature's maximum: give --index=DIR or --max=VALUE")
        largest = steering.maximum(subject.index, feature)
    return [*(steering.clamped(feature, scale, largest) for scale in scales), *ablated]


def _of_vectors(arguments: Arguments, subject: Subject, factors: list[float]) -> list[Change]:
    found, file = {}, arguments.option("add-direction")
    if file:
        found[f"direction {Path(file).name}"] = vector_of("add-direction", file)
    sets = [arguments.option(name) for name in ("positives", "negatives")]
    if any(sets):
        if not all(sets):
            raise ConfigError("saejax steer: --positives=FILE and --negatives=FILE go together")
        found["few-shot vector"] = steering.few_shot_vector(subject.lm, subject.sae.cfg.targets[0], *map(prompts_of, sets))
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
