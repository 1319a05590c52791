"""The jobs about the features of a trained SAE: `saejax features`, `saejax search` and `saejax dashboard`."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from saejax import lm
from saejax.base import sharding
from saejax.base.errors import ConfigError, FeatureIndexError
from saejax.base.logs import say
from saejax.base.records import RunPaths
from saejax.base.storage import is_writer
from saejax.base.text import visible
from saejax.cli.arguments import Arguments
from saejax.cli.jobs import jobs
from saejax.config import Config
from saejax.data.store import Store, check_matches
from saejax.evals.evaluate import cached
from saejax.features.compare.picture import plane
from saejax.features.index import baselines, corpus, fidelity, neuronpedia
from saejax.features.index.build import BuildOptions, build
from saejax.features.index.explanations import load_explanations
from saejax.features.index.logits import rows_of
from saejax.features.index.neighbours import nearest
from saejax.features.index.reader import MANIFEST, FeatureIndex
from saejax.features.search import sets as prompt_sets
from saejax.features.search.text import Found, by_attribution, by_explanation, by_prompt, by_sets, by_text
from saejax.formats import load
from saejax.formats.loading import newest_step
from saejax.pages.dashboard import write_dashboard
from saejax.pages.summary import rows
from saejax.sae.inference import SAE

INDEX, DASHBOARD, NEURONPEDIA = "features", "dashboard", "neuronpedia"
_TEXT_TOKENS = 1_000_000


def features(arguments: Arguments) -> int:
    """Builds the index of every run given; with --verify runs examples again."""
    located = jobs.located(arguments)
    if len(located) > 1 and arguments.out is not None:
        raise ConfigError(f"saejax features: --out={arguments.out} takes one run; index them one by one")
    for config, path in located:
        _, sae = sae_of(config, path)
        lm_ = lm.load(config.lm.model, revision=config.lm.revision, dtype=config.lm.dtype)
        baseline = arguments.option("baseline")
        subject = sae if baseline is None else baseline_of(baseline, config, sae, lm_)
        text = arguments.option("text") or ("train" if baseline == "neurons" else None)
        found = corpus_of(config, subject, lm_, text, arguments.option("tokens"))
        index = build(arguments.out or index_home(config, baseline), subject, found, lm_,
                      BuildOptions(progress=config.log.progress))
        examples = arguments.option("verify")
        verified = fidelity.check(index, subject, lm_, examples).to_json() if examples else None
        if is_writer():
            exported = _export(config, index) if arguments.option("export") else None
            _say_index(index, verified, exported, arguments.json)
    return 0


def _export(config: Config, index: FeatureIndex) -> Path:
    out = index.path.absolute().parent / NEURONPEDIA
    neuronpedia.write(index, out, name=config.name, dataset=" + ".join(config.text.source))
    return out


def search(arguments: Arguments) -> int:
    """Prints the features that fit best, with the tokens that they fire on where the run has an index."""
    given = {name: value for name, value in arguments.options.items() if name != "json" and value is not None}
    ways = [name for name in ("prompt", "positives", "set", "find", "like") if name in given]
    if len(ways) != 1 or len(arguments.paths) != 1:
        raise ConfigError("saejax search: give one run, and one of --prompt, --set, --positives, --find and --like")
    [(config, path)] = jobs.located(arguments)
    _, sae = sae_of(config, path)
    explained = _explanations(arguments)
    if explained and ways != ["find"]:
        raise ConfigError("saejax search: --explanations belongs to --find")
    index = _index_of(config, sae, needed=ways == ["find"] and not explained)
    if explained:
        found = by_explanation(explained, given["find"])
    else:
        found = by_text(index, given["find"]) if ways == ["find"] else _searched(config, sae, given)
    if not is_writer():
        return 0
    if arguments.json:
        print(json.dumps([asdict(one) for one in found]))
        return 0
    print("\n".join(_line(one, index if "within" not in given else None) for one in found) or "no feature fits")
    return 0


def _explanations(arguments: Arguments) -> dict[int, str]:
    file = arguments.option("explanations")
    return load_explanations(Path(file)) if file else {}


def fires_on(index: FeatureIndex, feature: int) -> str:
    """The tokens that a feature fires on most, safe to look at."""
    return " ".join(visible(index.token(t)) for t in index.rows(feature, feature + 1)[0]["token_ids"][:5])


def _line(one: Found, index: FeatureIndex | None) -> str:
    """A feature as `saejax search` prints it."""
    tokens = "" if index is None else fires_on(index, one.feature)
    return f"{one.feature:>8}  {one.score:>9.4g}  {visible(one.why, 200)}{f'; fires on: {tokens}' if tokens else ''}"


def _index_of(config: Config, sae: SAE, *, needed: bool) -> FeatureIndex | None:
    """The index of a run; where it is not needed None instead of one that is not there or belongs to another checkpoint."""
    home = Path(config.run_dir) / INDEX
    if not needed and not (home / MANIFEST).is_file():
        return None
    try:
        return FeatureIndex.open(home, sae=sae)
    except FeatureIndexError as error:
        if needed:
            raise
        say(f"{error}; its tokens are not shown")
        return None


def _searched(config: Config, sae: SAE, given: dict[str, str]) -> list[Found]:
    if "like" in given:
        return _alike(sae, given["like"], _other(given["within"], sae) if "within" in given else None)
    lm_ = lm.load(config.lm.model, revision=config.lm.revision, dtype=config.lm.dtype)
    if given.get("set") == "multilingual":
        return prompt_sets.by_meaning(lm_, sae)
    if "set" in given:
        return by_sets(lm_, sae, *prompt_sets.prompt_set(given["set"]))
    if "positives" in given:
        return by_sets(lm_, sae, prompts_of(given["positives"]), prompts_of(given["negatives"]) if "negatives" in given else ())
    if "answer" in given:
        return by_attribution(lm_, sae, given["prompt"], given["answer"], given.get("against"))
    return by_prompt(lm_, sae, given["prompt"])


def _other(run: str, sae: SAE) -> SAE:
    """The SAE of another run, whose decoder writes to the same place."""
    [(config, path)] = jobs.located(Arguments(config=None, paths=(Path(run),), distributed=None, options={}))
    _, other = sae_of(config, path)
    if (other.cfg.targets, other.params.W_dec.shape[1]) != (sae.cfg.targets, sae.params.W_dec.shape[1]):
        raise FeatureIndexError(f"--within={run}: its decoder writes to {', '.join(other.cfg.targets)}, this run's to "
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


def prompts_of(file: str) -> list[str]:
    """The prompts of a file, one a line; empty lines do not count."""
    try:
        found = [line for line in Path(file).read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise ConfigError(f"{file}: no readable text file of prompts, one a line ({reason})") from error
    if not found:
        raise ConfigError(f"{file}: holds no prompts; write one a line")
    return found


def vector_of(option: str, file: str) -> np.ndarray:
    """The vector [D] float32 in an .npy file that an option names."""
    try:
        found = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"--{option}={file}: not a readable .npy file of numbers "
                          f"({' '.join(str(error).split())[:150]})") from error
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.number) or not np.isfinite(found).all():
        raise ConfigError(f"--{option}={file}: shape {found.shape}, {found.dtype}; give one vector of finite numbers")
    return found.astype(np.float32)


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
        step_dir, sae = sae_of(config, path)
        home = Path(config.run_dir)
        index, figures, title = FeatureIndex.open(home / INDEX, sae=sae), _figures(config, step_dir), config.name
    out = arguments.out or home / DASHBOARD
    links = [("Report of the run", "../report.html")] if (out.parent / "report.html").is_file() else []
    if is_writer():
        explained = _explanations(arguments)
        places_F2 = plane(index) if arguments.option("map") else None
        page = write_dashboard(index, out, title=title, figures=figures, links=links, explanations=explained, places_F2=places_F2)
        print(f"dashboard {page}")
    return 0


def sae_of(config: Config, path: Path) -> tuple[Path, SAE]:
    mesh: Mesh = jobs.mesh_of(config) or sharding.single_device_mesh()
    step_dir = path if path != Path(config.run_dir) else newest_step(path, mesh)
    return step_dir, load(step_dir, mesh=mesh)


def corpus_of(config: Config, sae: SAE, lm_: lm.LM, text: str | None, tokens: int | None) -> corpus.Corpus:
    """The run's store, or a split of its text (by default a million tokens)."""
    if not text:
        store = Store.open(config.harvest.store)
        check_matches(store, hookpoints=sae.cfg.hookpoints, model=config.lm.model)
        return corpus.from_store(store, sae.cfg.hookpoints, tokens)
    return corpus.from_text(config.text, lm_, sae.cfg.hookpoints, seed=config.seed_of_data, split=text,
                            mask_special=config.harvest.mask_special, tokens=tokens or _TEXT_TOKENS,
                            batch=config.harvest.batch_contexts)


def index_home(config: Config, baseline: str | None) -> Path:
    """Where the index of a run's features, or of a baseline of them, lies."""
    return Path(config.run_dir) / (INDEX if baseline is None else f"{INDEX}_{baseline}")


def baseline_of(name: str, config: Config, sae: SAE, lm_: lm.LM) -> SAE:
    """A baseline of a run's SAE (`features.baselines`), the same at every call. Raises `FeatureIndexError` and `StoreError`."""
    mean_D = None
    if name != "neurons":
        store = Store.open(config.harvest.store)
        check_matches(store, hookpoints=sae.cfg.hookpoints, model=config.lm.model)
        mean_D = np.concatenate([store.stats(hookpoint).mean_D for hookpoint in sae.cfg.hookpoints])
    k = sae.cfg.k
    if name == "random_sae" and not k:  # as sparse as the features are
        k = round(FeatureIndex.open(index_home(config, None), sae=sae).manifest["totals"]["l0"])
    return baselines.make(name, sae, lm_, mean_D=mean_D, k=k, seed=config.seed, mesh=sae.mesh)


def _figures(config: Config, step_dir: Path) -> list[tuple[str, str]]:
    """Those of the evaluation, where there is one of this step."""
    evaluation = cached(RunPaths(Path(config.run_dir)), jobs.evaluation_key(config, step_dir))
    if evaluation is None:
        return []
    wanted = ("SAE", "hookpoint", "step", "L0", "explained variance", "CE recovered", "silent on held-out text")
    found = dict(rows(jobs.result_of(config, step_dir, evaluation)))
    return [(label, found[label]) for label in wanted]


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
