"""`saejax neurons`: features against neurons."""

import json

from saejax.base.errors import ConfigError
from saejax.base.storage import is_writer
from saejax.cli.arguments import Arguments
from saejax.cli.subjects import one_subject
from saejax.features.compare import neurons
from saejax.features.index import corpus

_TOKENS, NEURONS = 200_000, "neurons"


def start(arguments: Arguments) -> int:
    """Writes the table of features against neurons and prints how few of them a neuron stands for."""
    subject = one_subject(arguments, "neurons", mesh=None)
    if arguments.out is None and subject.run is None:
        raise ConfigError(f"saejax neurons: {subject.source} is no run with a place for the table: give --out=DIR")
    path, tokens = arguments.out or subject.run / NEURONS, arguments.option("tokens") or _TOKENS
    text = corpus.from_text(subject.text, subject.lm, subject.sae.cfg.hookpoints, split=arguments.option("split") or "train",
                            tokens=tokens)
    options = neurons.Options(features=arguments.option("sample"), progress=subject.progress, about=tokens)
    said = neurons.shares(neurons.correlate(path, subject.sae, subject.lm, text, options))
    if not is_writer():
        return 0
    if arguments.json:
        print(json.dumps({"table": str(path / neurons.TABLE), **said}))
        return 0
    print(f"neurons  {path / neurons.TABLE}: {said['features']:,} features fired at least {neurons.LEAST_FIRED} times, "
          f"{said['left_out']:,} did not and are left out")
    if said["features"]:
        print(f"highest correlation with a neuron before it at most {neurons.LOW}: {100 * said['correlation']:.1f} % of them "
              f"(Templeton et al. 2024: 82 %); of largest size at most that: {100 * said['absolute']:.1f} %")
    return 0
