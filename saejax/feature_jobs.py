"""The jobs about the features of a trained SAE: `saejax features` and `saejax dashboard`."""

import json
from pathlib import Path

from jax.sharding import Mesh

from saejax import jobs, lm, sharding
from saejax.command_line import Arguments
from saejax.config import Config
from saejax.data.store import Store, check_matches
from saejax.errors import ConfigError
from saejax.evals.evaluate import cached
from saejax.features import corpus, fidelity
from saejax.features.build import BuildOptions, build
from saejax.features.dashboard import write_dashboard
from saejax.features.index import MANIFEST, FeatureIndex
from saejax.formats import load
from saejax.formats.loading import newest_step
from saejax.records import RunPaths
from saejax.report.summary import rows
from saejax.sae.inference import SAE
from saejax.storage import is_writer

INDEX, DASHBOARD = "features", "dashboard"
_TEXT_TOKENS = 1_000_000


def features(arguments: Arguments) -> int:
    """Builds the index of every run given; with --verify runs examples again."""
    located = jobs.located(arguments)
    if len(located) > 1 and arguments.out is not None:
        raise ConfigError(f"saejax features: --out={arguments.out} takes one run; index them one by one")
    for config, path in located:
        step_dir, sae = _sae(config, path)
        lm_ = lm.load(config.lm.model, revision=config.lm.revision, dtype=config.lm.dtype)
        index = build(arguments.out or Path(config.run_dir) / INDEX, sae, _corpus(config, sae, lm_, arguments), lm_,
                      BuildOptions(progress=config.log.progress))
        verified = fidelity.check(index, sae, lm_, arguments.verify).to_json() if arguments.verify else None
        if is_writer():
            _say_index(index, verified, arguments.json)
    return 0


def dashboard(arguments: Arguments) -> int:
    """Writes the site of an index; of a run also with the run's figures."""
    if len(arguments.paths) > 1:
        raise ConfigError("saejax dashboard: give one run or one index")
    path, = arguments.paths
    if (path / MANIFEST).is_file() and not RunPaths(path).config.is_file():
        index, figures, title = FeatureIndex.open(path), [], path.absolute().parent.name
        home = path.absolute().parent
    else:
        [(config, path)] = jobs.located(arguments)
        step_dir, sae = _sae(config, path)
        home = Path(config.run_dir)
        index, figures, title = FeatureIndex.open(home / INDEX, sae=sae), _figures(config, step_dir), config.name
    out = arguments.out or home / DASHBOARD
    links = [("Report of the run", "../report.html")] if (out.parent / "report.html").is_file() else []
    if is_writer():
        page = write_dashboard(index, out, title=title, figures=figures, links=links)
        print(f"dashboard {page}")
    return 0


def _sae(config: Config, path: Path) -> tuple[Path, SAE]:
    mesh: Mesh = jobs.mesh_of(config) or sharding.single_device_mesh()
    step_dir = path if path != Path(config.run_dir) else newest_step(path, mesh)
    return step_dir, load(step_dir, mesh=mesh)


def _corpus(config: Config, sae: SAE, lm_: lm.LM, arguments: Arguments) -> corpus.Corpus:
    if not arguments.text:
        store = Store.open(config.harvest.store)
        check_matches(store, hookpoints=sae.cfg.hookpoints, model=config.lm.model)
        return corpus.from_store(store, sae.cfg.hookpoints, arguments.tokens)
    return corpus.from_text(config.text, lm_, sae.cfg.hookpoints, seed=config.seed_of_data, split=arguments.text,
                            mask_special=config.harvest.mask_special, tokens=arguments.tokens or _TEXT_TOKENS,
                            batch=config.harvest.batch_contexts)


def _figures(config: Config, step_dir: Path) -> list[tuple[str, str]]:
    """Those of the evaluation, where there is one of this step."""
    evaluation = cached(RunPaths(Path(config.run_dir)), jobs.evaluation_key(config, step_dir))
    if evaluation is None:
        return []
    wanted = ("SAE", "hookpoint", "step", "L0", "explained variance", "CE recovered", "silent on held-out text")
    found = dict(rows(jobs.result_of(config, step_dir, evaluation)))
    return [(label, found[label]) for label in wanted]


def _say_index(index: FeatureIndex, verified: dict | None, as_json: bool) -> None:
    totals = index.manifest["totals"]
    if as_json:
        print(json.dumps({"index": str(index.path), **totals, "verified": verified}))
        return
    print(f"features {index.path}: {totals['alive']:,} of {index.features:,} fire on {totals['kept_rows']:,} tokens; "
          f"{totals['examples']:,} examples")
    if verified is not None:
        print(f"verified {verified['examples']:,} examples of {verified['contexts']:,} contexts: "
              f"{100 * verified['within_tolerance']:.2f} % within 1 % of the feature's maximum, mean difference "
              f"{100 * verified['mean_difference']:.3f} %, {verified['lost']} do not fire again")
