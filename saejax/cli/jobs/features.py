"""`saejax features`: the index of a dictionary's features over a text."""

import json
import shutil
from pathlib import Path

from saejax.base.errors import ConfigError
from saejax.base.storage import barrier, is_writer
from saejax.cli.arguments import Arguments
from saejax.cli.subjects import subjects
from saejax.features.index import fidelity, neuronpedia
from saejax.features.index.build import BuildOptions, build, is_index
from saejax.features.index.reader import FeatureIndex
from saejax.runs.baseline import baseline_of, home_of
from saejax.runs.subject import Subject

NEURONPEDIA = "neuronpedia"


def start(arguments: Arguments) -> int:
    """The job, of every subject given; with --verify examples are run again."""
    found = subjects(arguments)
    if len(found) > 1 and arguments.out is not None:
        raise ConfigError(f"saejax features: --out={arguments.out} takes one run; index them one by one")
    for subject in found:
        baseline, lm_ = arguments.option("baseline"), subject.lm
        home = arguments.out or home_of(subject, baseline)
        if home is None:
            raise ConfigError(f"saejax features: {subject.source} is no run with a place for an index: give --out=DIR")
        if arguments.option("rebuild"):
            _remove(home)
        sae = subject.sae if baseline is None else baseline_of(baseline, subject)
        split = arguments.option("split") or ("train" if baseline == "neurons" else None)
        corpus = subject.corpus(split=split, tokens=arguments.option("tokens"), hookpoints=sae.cfg.hookpoints)
        index = build(home, sae, corpus, lm_, BuildOptions(progress=subject.progress))
        examples = arguments.option("verify")
        verified = fidelity.check(index, sae, lm_, examples).to_json() if examples else None
        if is_writer():
            exported = _export(subject, index) if arguments.option("export") else None
            _say_index(index, verified, exported, arguments.json)
    return 0


def _remove(home: Path) -> None:
    """An index that is there, finished or not; nothing else."""
    if home.exists() and not is_index(home):
        raise ConfigError(f"saejax features --rebuild: {home} is no index; remove it yourself, or choose another directory")
    if is_writer() and home.exists():
        shutil.rmtree(home)
    barrier("saejax_index_removed")


def _export(subject: Subject, index: FeatureIndex) -> Path:
    out = index.path.absolute().parent / NEURONPEDIA
    neuronpedia.write(index, out, name=subject.name, dataset=" + ".join(subject.text.options.source))
    return out


def _say_index(index: FeatureIndex, verified: dict | None, exported: Path | None, as_json: bool) -> None:
    totals = index.manifest["totals"]
    if as_json:
        print(json.dumps({"index": str(index.path), **totals, "verified": verified, "exported": exported and str(exported)}))
        return
    print(f"features {index.path}: {totals['alive']:,} of {index.features:,} fire on {totals['kept_rows']:,} tokens; "
          f"{totals['examples']:,} examples")
    if verified is not None:
        print(f"verified {verified['examples']:,} examples of {verified['contexts']:,} contexts: "
              f"{100 * verified['within_tolerance']:.2f} % within 1 % of the feature's maximum, mean difference "
              f"{100 * verified['mean_difference']:.3f} %, {verified['lost']} do not fire again")
    if exported is not None:
        print(f"exported {exported}: {totals['alive']:,} features for Neuronpedia")
