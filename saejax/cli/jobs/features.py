"""`saejax features`: the index of a dictionary's features over a text."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from saejax.base.errors import ConfigError
from saejax.cli.options import (
    BASELINES,
    SPLITS,
    CorpusOptions,
    DistributedOptions,
    Job,
    Json,
    SubjectOptions,
    count,
    path,
    places,
    refuse,
    switch,
    value,
)

NEURONPEDIA = "neuronpedia"


@dataclass(frozen=True)
class Options(Json, SubjectOptions, CorpusOptions, DistributedOptions):
    paths: tuple[str, ...] = places("SAE", "a run or other files of an SAE")
    tokens: int | None = value("index the first N tokens (default: all of the store, or 1,000,000)", "N", count)
    split: str | None = value("a split of the text, through the language model, instead of the store", "SPLIT", choices=SPLITS)
    baseline: str | None = value("index what features are held against instead, in RUN/features_NAME: neurons (of the MLP below, "
                                 "through the language model), directions (random), sparse_directions (that fire as often as the "
                                 "median feature; index the features first), random_sae (untrained)", "NAME",
                                 choices=BASELINES)
    neighbours: str = value("whose nearest decoder rows the index has: of all features, of a sample (16,384 that fire), of none; "
                            "auto: of all, of a dictionary of more than 131,072 of a sample", "WHOSE", default="auto",
                            choices=("auto", "all", "sample", "none"))
    out: Path | None = value("where to write (default RUN/features)", "DIR", path)
    rebuild: bool = switch("remove the index that is there and begin anew")
    verify: int | None = value("run N examples again through language model and SAE, and say how they differ", "N", count)
    export: str | None = value("also write the feature JSON that Neuronpedia imports, neuronpedia/ beside the index", "FORMAT",
                               choices=(NEURONPEDIA,))


def run(options: Options) -> int:
    """The job, of every subject given; with --verify examples are run again."""
    from saejax.base.storage import is_writer
    from saejax.cli.subjects import subjects
    from saejax.features.index import fidelity
    from saejax.features.index.build import BuildOptions, build
    from saejax.runs import missing
    from saejax.runs.baseline import baseline_of, home_of
    if options.split is not None or options.baseline == "neurons":
        refuse("features", options, ("store",), "where the text goes through the language model")
    elif options.store is not None and not options.export:
        refuse("features", options, ("text", "context"), "where the store is indexed: give --split, or no --store")
    found = subjects(options)
    if len(found) > 1 and options.out is not None:
        raise ConfigError(f"saejax features: --out={options.out} takes one run; index them one by one")
    for subject in found:
        baseline = options.baseline
        home = options.out or home_of(subject, baseline)
        from_text = options.split is not None or options.store is None and subject.store is None
        subject.require(*[missing.OUT] if home is None else [], text=from_text)
        lm_ = subject.lm
        if options.rebuild:
            _remove(home)
        sae = subject.sae if baseline is None else baseline_of(baseline, subject)
        split = options.split or ("train" if baseline == "neurons" else None)
        corpus = subject.corpus(split=split, tokens=options.tokens, hookpoints=sae.cfg.hookpoints)
        index = build(home, sae, corpus, lm_, BuildOptions(neighbours=options.neighbours, progress=subject.progress))
        verified = None if not options.verify else fidelity.check(index, sae, lm_, options.verify,
                                                                  progress=subject.progress).to_json()
        if is_writer():
            _say(index, verified, _export(subject, index) if options.export else None, options.json)
            if not options.json and baseline is None:
                print(f"next     saejax dashboard {_shown(subject, index.path)}")
    return 0


def _shown(subject, home: Path) -> str:
    """What the dashboard's job is to be given: the run, or an index that lies elsewhere."""
    return shlex.quote(str(subject.source if subject.index_home == home and subject.run is not None else home))


def _remove(home: Path) -> None:
    """An index that is there, finished or not; nothing else."""
    import shutil

    from saejax.base import lease
    from saejax.base.storage import barrier, is_writer
    from saejax.features.index.build import is_index
    if not home.exists():
        return
    if not is_index(home):
        raise ConfigError(f"saejax features --rebuild: {home} is no index; remove it yourself, or choose another directory")
    with lease.writing(home):
        for file in [file for file in home.iterdir() if not file.name.startswith(lease.FILE)] if is_writer() else []:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        barrier("saejax_index_removed")


def _export(subject, index) -> Path:
    from saejax.features.index import neuronpedia
    out = index.path.absolute().parent / NEURONPEDIA
    neuronpedia.write(index, out, name=subject.name, dataset=" + ".join(subject.text.options.source),
                      progress=subject.progress)
    return out


def _say(index, verified: dict | None, exported: Path | None, as_json: bool) -> None:
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


JOB = Job(
    "features", "understand", "what the features of an SAE fire on: the index", """
    Reads a run (its newest checkpoint that verifies, or one step), its store and its language model, or files of any format
    that saejax.load reads, a text (--text) and the language model; writes the index to DIR: per feature density, histograms,
    examples of every level of activation with their context, top tokens, effect on the next token, neighbours. An interrupted
    index goes on where it stopped; a finished one is left as it is; one of another checkpoint is refused. docs/how-to/features.md
    describes it.
    """, "saejax features runs/demo --verify=1000", Options, run)
