"""`saejax inspect`: what a directory is, whether every byte with a digest verifies, and what has none and was not read."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
from jax.sharding import Mesh

from saejax.base import sharding
from saejax.base.errors import FormatError, SaejaxError
from saejax.base.logs import Progress
from saejax.base.records import MADE_ELSEWHERE, MeshOptions, RunPaths, StreamState
from saejax.base.storage import file_sha256
from saejax.config import Config, read_config
from saejax.config.recipes import WITH_K
from saejax.data import manifest as mf
from saejax.data.store import MANIFEST, SPEC, TEXT, Store, finished_shards, is_complete, read_spec
from saejax.data.token_store import TokenStore
from saejax.data.token_store import is_complete as tokens_complete
from saejax.data.verify import Check, checks, outcomes, unfinished_checks
from saejax.evals import evaluate as evals
from saejax.features.index import reader as index
from saejax.formats import saelens, saelens_read
from saejax.formats.loading import FORMATS, OURS, load
from saejax.sae import SAESpec
from saejax.sae.inference import SAEConfig
from saejax.scaling.sweep import is_sweep, members
from saejax.train.checkpoint import is_step, machine_of, read_meta, restore_params, restore_step, steps_in
from saejax.train.determinism import promise
from saejax.train.member import total_steps
from saejax.train.state import abstract_state

_NAMED = 20  # of what was not read


@dataclass
class Finding:
    """What was found at a path: its kind, facts in the order to show, every problem, and which files (or directories with all
    that is in them) were read and compared.
    """

    path: Path
    kind: str
    facts: dict = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    read: set[Path] = field(default_factory=set)
    digests: bool = True

    def attempt(self, check: Callable[[], object]):
        """The value of a check, or None with its error among the problems."""
        try:
            return check()
        except SaejaxError as error:
            self.problems.append(" ".join(str(error).split()))
        except OSError as error:
            self.problems.append(f"{error.filename or self.path}: {error.strerror}")
        return None

    def to_json(self) -> dict:
        return {"path": str(self.path), "kind": self.kind, "verifies": not self.problems if self.digests else None,
                "bytes": size_on_disk(self.path), **self.facts, "not_read": self.not_read(), "problems": self.problems}

    def take(self, inner: "Finding") -> None:
        """Problems of a part, and what was read of it."""
        self.problems += inner.problems
        self.read |= inner.read

    def not_read(self) -> list[str]:
        """What lies below the path and was not read, relative to it; a directory, as `name/`, for all that is in it."""
        above = {parent for file in self.read for parent in file.parents}

        def below(folder: Path):
            for child in sorted(folder.iterdir()):
                if child in self.read:
                    continue
                if child in above and child.is_dir():
                    yield from below(child)
                else:
                    yield f"{child.relative_to(self.path).as_posix()}{'/' if child.is_dir() else ''}"

        return [] if self.path in self.read or not self.path.is_dir() else list(below(self.path))


def inspect_path(path: Path, *, progress: bool = True) -> Finding:
    """Recognises and verifies a store (finished or not), run, step, release or feature index; reads the files of another library,
    which have no digests; `FormatError` for other paths.
    """
    inspect = _job(Path(path))
    with Progress("inspect", size_on_disk(path), unit="B", enabled=progress) as bar:
        return inspect(Path(path), bar)


def _job(path: Path) -> Callable[[Path, Progress], Finding]:
    """What inspects such a path. The bar given to it counts the bytes of all files below the path; those that will not be read
    it takes off first.
    """
    if (path / index.FEATURES).is_file() and (path / index.MANIFEST).is_file():
        return _index
    if (path / MANIFEST).is_file() or (path / SPEC).is_file():
        return _store
    if is_step(path):
        return _checkpoint
    if (path / saelens.WEIGHTS).is_file() or saelens.is_release(path):
        return _release
    if RunPaths(path).config.is_file():
        return _run
    if any(known.recognise(path) for name, known in FORMATS.items() if name not in OURS):
        return _files
    if (path / saelens.CONFIG).is_file():
        return _release
    raise FormatError(f"{path}: neither an activation store, nor a run, a checkpoint step, a release or a feature index"
                      if path.exists() else f"{path}: does not exist")


def _parts(found: Finding, parts: Sequence[Path], bar: Progress) -> Iterator[tuple[Path, Finding]]:
    """Findings of the parts of a path that are there, each taken into that of the path."""
    parts = [part for part in parts if part.is_dir()]
    bar.shorten(size_on_disk(found.path) - sum(map(size_on_disk, parts)))
    for part in parts:
        inner = found.attempt(lambda p=part: _job(p)(p, bar))
        if inner is not None:
            found.take(inner)
            yield part, inner


def size_on_disk(path: Path) -> int:
    """Bytes of all files below a path; links are not followed."""
    return sum(f.lstat().st_size for f in Path(path).rglob("*") if f.is_file() and not f.is_symlink())


def _store(path: Path, bar: Progress) -> Finding:
    if not is_complete(path):
        return _unfinished_store(path, bar)
    found = Finding(path, "activation store")
    manifest = found.attempt(lambda: mf.read_manifest(path / MANIFEST))
    found.read.add(path / MANIFEST)
    bar.advance((path / MANIFEST).stat().st_size)
    if manifest is None:
        return found
    store = Store(path, *manifest)
    found.facts = _store_facts(store.spec) | {"contexts": store.n_contexts, "rows": store.rows, "unmasked_rows": store.kept_rows,
                                              "shards": store.n_shards, "schema_version": store.manifest["schema_version"],
                                              "digest": store.digest}
    _all(found, checks(store), bar)
    if tokens_complete(path / TEXT):
        found.attempt(lambda: TokenStore.open(path / TEXT).verify())
        found.read.add(path / TEXT)
        bar.advance(size_on_disk(path / TEXT))
    return found


def _unfinished_store(path: Path, bar: Progress) -> Finding:
    found = Finding(path, "activation store, unfinished")
    spec = found.attempt(lambda: read_spec(path))
    found.read.add(path / SPEC)
    if spec is None:
        return found
    found.facts = _store_facts(spec) | {"shards": f"{len(finished_shards(path))} of {spec.target_shards}",
                                        "schema_version": mf.SCHEMA_VERSION}
    bar.advance((path / SPEC).stat().st_size)
    _all(found, unfinished_checks(path, spec), bar)
    return found


def _all(found: Finding, these: Iterable[Check], bar: Progress) -> None:
    """Runs the checks of a store; a problem that several of them have is said once."""
    for check, error in outcomes(these):
        found.read.add(check.file)
        with contextlib.suppress(OSError):
            bar.advance(check.file.stat().st_size)
        if error is not None and str(error) not in found.problems:
            found.problems.append(str(error))


def _store_facts(spec: mf.StoreSpec) -> dict:
    return {"model": spec.model, "weights": spec.model_digest[:16], "lm_dtype": spec.lm_dtype,
            "hookpoints": {name: width for name, width in spec.hookpoints}, "context": spec.context,
            "text": spec.text.get("sources"), "masked": _masked(spec),
            **({MADE_ELSEWHERE: "with token ids" if spec.text["tokens"] else "without token ids"} if spec.made_elsewhere else {})}


def _masked(spec: mf.StoreSpec) -> str:
    names = {"first": "the first of every row", "special": "special tokens", "repeated": "repeated contexts"}
    return " and ".join(names[what] for what in names if what in spec.text.get("mask", [])) or "nothing"


def _checkpoint(path: Path, bar: Progress) -> Finding:
    found = Finding(path, "checkpoint step", read={path})
    meta = found.attempt(lambda: read_meta(path))
    if meta is None:
        return found
    s = meta.spec
    found.facts = {"sae": f"{s.kind}{f', k = {s.k}' if s.kind in WITH_K else ''}", "d_in": s.d_in, "d_sae": s.d_sae,
                   "compute_dtype": s.compute_dtype, **meta.data,
                   "tokens_seen": meta.counters.tokens_seen, "epochs": _epochs(meta.counters.stream),
                   "lanes": len(meta.counters.stream.lanes), "resamples": meta.counters.resamples,
                   "leaves": len(meta.fingerprints), "written_on": meta.machine or "not recorded"}
    config = RunPaths(path.absolute().parent.parent).config
    mesh = _mesh(s.d_sae)
    if config.is_file():
        found.attempt(lambda: restore_step(path, _abstract(read_config(config), s, mesh)))
    else:
        found.facts["verified"] = "parameters only (no config.json two levels up)"
        found.attempt(lambda: restore_params(path, mesh))
    bar.advance(size_on_disk(path))
    return found


def _epochs(state: StreamState) -> str:
    least, most = state.epochs
    return f"{least}" if least == most else f"{least} to {most}"


def _abstract(config: Config, spec: SAESpec, mesh: Mesh):
    return abstract_state(config, spec, mesh)


def _mesh(d_sae: int) -> Mesh:
    """All devices along `dict` where the dictionary divides over them: it may not fit one."""
    if d_sae % jax.device_count() == 0:
        return sharding.make_mesh(MeshOptions(1, -1))
    return sharding.single_device_mesh()


def _release(path: Path, bar: Progress) -> Finding:
    several, done = saelens.listed(path) is not None, 0
    found = Finding(path, "release", read={path / saelens.CONFIG, *([] if several else [path / saelens.WEIGHTS])})
    found.problems = [f"{file}: missing" for file in sorted(found.read) if not file.is_file()]

    def advance(n: int) -> None:
        nonlocal done
        done += n
        bar.advance(n)

    cfg = found.attempt(lambda: saelens_read.verify(path, advance)) if not found.problems else None
    if cfg is not None:
        found.read |= {path / name for name in saelens.weights(cfg)}
        found.facts = _sae_facts(cfg) | {"schema_version": cfg.metadata.get("schema_version"),
                                         "tokens_seen": cfg.metadata.get("training", {}).get("tokens"),
                                         **({"files": len(cfg.metadata["files"])} if several else
                                            {"weights_sha256": file_sha256(path / saelens.WEIGHTS)})}
    bar.advance(size_on_disk(path) - done)
    return found


def _sae_facts(c: SAEConfig) -> dict:
    return {"sae": f"{c.kind}{f', k = {c.k}' if c.kind == 'topk' else ''}", "d_in": c.d_in, "d_sae": c.d_sae,
            "hookpoint": c.hookpoint, **({"target": c.target} if c.target else {}), "model": c.model}


def _files(path: Path, bar: Progress) -> Finding:
    found = Finding(path, "files of another library", read={path}, digests=False)
    sae = found.attempt(lambda: load(path))
    if sae is not None:
        found.facts = {"format": sae.cfg.metadata["source"]["format"], **_sae_facts(sae.cfg)}
    bar.advance(size_on_disk(path))
    return found


def _index(path: Path, bar: Progress) -> Finding:
    found = Finding(path, "feature index")
    opened = found.attempt(lambda: index.FeatureIndex.open(path, full=True, advance=bar.advance))
    bar.advance((path / index.MANIFEST).stat().st_size)
    if opened is not None:
        found.read |= {path / index.MANIFEST, *(path / name for name in opened.manifest["files"])}
        sae = opened.manifest["sae"]
        found.facts = {"sae": sae["kind"], "d_in": sae["d_in"], "d_sae": opened.features, "model": sae["model"],
                       "hookpoints": sae["hookpoints"], "sae_fingerprint": sae["fingerprint"][:16],
                       "contexts": len(opened.tokens_NT), "unmasked_tokens": int(opened.keep_NT.sum()),
                       "never_fired": int((opened.column("fired") == 0).sum())}
    return found


def _run(path: Path, bar: Progress) -> Finding:
    found, paths = Finding(path, "run"), RunPaths(path)
    config = found.attempt(lambda: read_config(paths.config))
    found.read.add(paths.config)
    if config is None:
        return found
    if is_sweep(config):
        return _sweep(found, dataclasses.replace(config, run_dir=str(path)), bar)
    steps = steps_in(paths.checkpoints)
    found.facts = {"name": config.name, "model": config.lm.model, "hookpoint": ", ".join(config.sae.hookpoints),
                   "sae": f"{config.sae.kind}, {config.sae.d_sae} features",
                   "compute_dtype": config.train.compute_dtype, "steps": f"{steps[-1] if steps else 0} of "
                   f"{total_steps(config)}", "checkpoints": steps, "deterministic": config.train.deterministic,
                   "resume": promise(config.train.deterministic,
                                     machine_of(paths.checkpoints / str(steps[-1] if steps else 0))) or "not known",
                   "quarantined": sorted(p.name for p in paths.checkpoints.glob("corrupt-*")),
                   "evaluated_steps": found.attempt(lambda: evals.evaluated_steps(paths))}
    checkpoints = [paths.checkpoints / str(step) for step in steps]
    for part, inner in _parts(found, [*checkpoints, paths.release, path / "store", *_indices(path)], bar):
        if part not in checkpoints:
            found.facts[part.name] = inner.kind
    return found


def _indices(path: Path) -> list[Path]:
    """Finished indices of a run: of its features and of their baselines."""
    return sorted(folder for folder in path.glob("features*") if (folder / index.MANIFEST).is_file())


def _sweep(found: Finding, config: Config, bar: Progress) -> Finding:
    """All members of a sweep, and its store."""
    runs = [Path(member.run_dir) for member in found.attempt(lambda: members(config)) or ()]
    found.kind = "sweep"
    found.facts = {"name": config.name, "model": config.lm.model, "members": [run.name for run in runs]}
    not_begun = [run.name for run in runs if not run.is_dir()]
    found.facts |= {"not_begun": not_begun} if not_begun else {}
    for _ in _parts(found, [*runs, found.path / "store"], bar):
        pass
    return found


def shown(found: Finding) -> str:
    """A finding as text, a line a fact."""
    facts = {"size": f"{size_on_disk(found.path) / 1e6:,.1f} MB", **found.facts}
    lines = [f"{found.path}: {found.kind}"]
    lines += [f"  {key.replace('_', ' '):<16} {_plain(value)}" for key, value in facts.items()]
    missed = found.not_read()
    if missed:
        more = f" and {len(missed) - _NAMED} more" if len(missed) > _NAMED else ""
        lines.append(f"  {'not read':<16} {', '.join(missed[:_NAMED])}{more} (no digests)")
    lines += [f"  BAD  {problem}" for problem in found.problems]
    n = len(found.problems)
    good = f"verifies{', but for what was not read' if missed else ''}" if found.digests else "can be read; it has no digests"
    lines.append(f"  does NOT verify: {n} problem{'s' if n > 1 else ''}" if n else f"  {good}")
    return "\n".join(lines)


def _plain(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} ({v})" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
