"""`saejax neurons`: features against neurons."""

import json
from dataclasses import dataclass
from pathlib import Path

from saejax.cli.options import SPLITS, CorpusOptions, Job, Json, SubjectOptions, count, path, places, refuse, value

NEURONS = "neurons"


@dataclass(frozen=True)
class Options(Json, SubjectOptions, CorpusOptions):
    paths: tuple[str, ...] = places("SAE", "a run or other files of an SAE", most=1)
    tokens: int = value("of the text", "N", count, default=200_000)
    sample: int | None = value("features, at random (default: all, or as many as fit in 1 GiB, 8 bytes a pair)", "N", count)
    split: str = value("of the text", "SPLIT", default="train", choices=SPLITS)
    out: Path | None = value("where to write (default RUN/neurons)", "DIR", path)


def run(options: Options) -> int:
    """Writes the table of features against neurons and prints how few of them a neuron stands for."""
    from saejax.base.storage import is_writer
    from saejax.cli.subjects import one_subject
    from saejax.features.compare import neurons
    from saejax.features.index import corpus
    from saejax.runs import missing
    refuse("neurons", options, ("store",), "as the text goes through the language model")
    subject = one_subject(options, mesh=None)
    subject.require(*[missing.OUT] if options.out is None and subject.run is None else [], text=True)
    path = options.out or subject.run / NEURONS
    text = corpus.from_text(subject.text, subject.lm, subject.sae.cfg.hookpoints, split=options.split, tokens=options.tokens)
    how = neurons.Options(features=options.sample, progress=subject.progress, about=options.tokens)
    table = neurons.correlate(path, subject.sae, subject.lm, text, how)
    said, parts = neurons.shares(table), neurons.parts(table)
    if not is_writer():
        return 0
    if options.json:
        print(json.dumps({"table": str(path / neurons.TABLE), **said, "parts": parts}))
        return 0
    print(f"neurons  {path / neurons.TABLE}: {said['features']:,} features fired at least {neurons.LEAST_FIRED} times, "
          f"{said['left_out']:,} did not and are left out")
    if said["features"]:
        print(f"highest correlation with a neuron before it at most {neurons.LOW}: {100 * said['correlation']:.1f} % of them; "
              f"of largest size at most that: {100 * said['absolute']:.1f} %")
        for part in parts["fired"]:
            print(f"  fired {part['least']:,} to {part['most']:,} times: {100 * part['correlation']:.1f} % and "
                  f"{100 * part['absolute']:.1f} % of {part['features']:,}")
        for part in parts["layer"]:
            print(f"  highest in layer {part['layer']}: {100 * part['correlation']:.1f} % of {part['features']:,}")
    return 0


JOB = Job(
    "neurons", "act", "features against neurons: the highest correlation of each with a neuron before it", """
    Reads an SAE, its text and its language model; writes DIR/neurons.parquet, a row a feature, and prints the share of features
    that no neuron follows: of all, by how often they fired, and by the layer of the neuron that follows them best. Saved every
    five minutes; an interrupted pass goes on.
    """, "saejax neurons runs/demo", Options, run)
