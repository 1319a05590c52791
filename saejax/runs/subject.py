"""The one noun of everything that is done with an SAE: what a path or a name stands for, each part of it opened once.

    s = saejax.open("runs/demo")                       # a run, a checkpoint step, a release
    s = saejax.open("google/gemma-scope-2b-pt-res:layer_12/width_16k/average_l0_82", text="my.jsonl")     # or anybody's files
    s.sae, s.lm, s.text, s.store, s.index, s.config
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from saejax import lm
from saejax.base import sharding
from saejax.base.assets import model_title
from saejax.base.errors import ConfigError, FeatureIndexError, FormatError, HookpointError
from saejax.base.logs import read_metrics, say
from saejax.base.records import UNKNOWN, ActivationStats, MeshOptions, RunPaths
from saejax.config import Config, TextOptions
from saejax.data import kept as kept_statistics
from saejax.data.harvest import lm_mesh
from saejax.data.kept import Kept
from saejax.data.store import Store, check_matches, is_complete, model_name
from saejax.data.text import Text
from saejax.evals import statistics
from saejax.features.effects import splicing
from saejax.features.effects.attribution import Attribution
from saejax.features.index import corpus
from saejax.features.index.build import BuildOptions, build
from saejax.features.index.reader import MANIFEST, FeatureIndex, check_belongs
from saejax.features.search.prompt import by_prompt
from saejax.features.search.sets import by_sets
from saejax.features.search.text import by_text
from saejax.formats import loading, saelens
from saejax.lm import LM
from saejax.lm.hookpoints import hookpoint_of
from saejax.lm.load import tapped
from saejax.pages import cards
from saejax.pages.cards import Table
from saejax.runs import actions, missing
from saejax.runs.layout import mesh_of
from saejax.sae.inference import SAE

INDEX = "features"          # the index of a run lies there
TOKENS = 1_000_000          # of an index over a text, where nothing else is said
AUTO = "auto"


@dataclass(frozen=True)
class Given:
    """What is said beside a path or name; None: as the files themselves say.

    model: language model, by name or loaded. hookpoint: where it reads. text: sources (`config.text.source`), or all text
    options. context: tokens of a row of the text. index, store: directories. mesh: to split the dictionary over; None: none;
    "auto": the run's, or all devices. format: of the files, where several fit.
    """

    model: str | LM | None = None
    hookpoint: str | None = None
    text: str | Sequence[str] | TextOptions | Text | None = None
    context: int | None = None
    index: str | Path | None = None
    store: str | Path | None = None
    mesh: Mesh | str | None = AUTO
    format: str = AUTO


class Subject:
    """An SAE with its language model, text and index. Every part is opened when it is first asked for, and once.

    source: what was given. config: of the run that it belongs to, else None. run: that run's directory, else None. What is
    missing is a `SaejaxError` that says how to give it.
    """

    def __init__(self, source: str | Path, given: Given, config: Config | None = None, step: Path | None = None):
        """step: the checkpoint step, where one was named."""
        self.source, self.given, self.config, self._step = source, given, config, step
        self.run = None if config is None else Path(config.run_dir)

    @property
    def trained_here(self) -> bool:
        """True for a run or one of its checkpoint steps; a release, also one in its run, is files."""
        return self.config is not None and (self._step is not None or Path(self.source) == self.run)

    @functools.cached_property
    def _loaded(self) -> tuple[Path | None, SAE]:
        mesh = self._mesh()
        if self._step is not None:
            return self._step, loading.load(self._step, mesh)
        if self.trained_here:
            return loading.newest(self.run, mesh)
        source = self.source if isinstance(self.source, str) else str(self.source)
        if self.given.mesh != AUTO:
            return None, loading.load(source, mesh, self.given.format)
        try:
            return None, loading.load(source, mesh, self.given.format)
        except ConfigError:  # the dictionary does not divide over the devices here
            return None, loading.load(source, None, self.given.format)

    def _mesh(self) -> Mesh | None:
        if self.given.mesh != AUTO:
            return self.given.mesh
        if self.config is not None:
            return mesh_of(self.config)
        return sharding.make_mesh(MeshOptions(1, -1)) if jax.device_count() > 1 else None

    @property
    def step_dir(self) -> Path | None:
        """The checkpoint step: of a run the newest that verifies; None of files."""
        return self._loaded[0]

    @functools.cached_property
    def sae(self) -> SAE:
        """The SAE, its hookpoints by their TransformerLens names. Raises what `saejax.load` raises."""
        sae, hookpoint = self._loaded[1], self.given.hookpoint
        if hookpoint is not None and len(sae.cfg.hookpoints) > 1:
            raise ConfigError(f"hookpoint={hookpoint}: a crosscoder reads {len(sae.cfg.hookpoints)} of them, as its files say")
        names = sae.cfg.hookpoints if hookpoint is None else (hookpoint,)
        given = self.given.model.name if isinstance(self.given.model, LM) else self.given.model
        model = given if given and sae.cfg.model == UNKNOWN else sae.cfg.model
        cfg = dataclasses.replace(sae.cfg, hookpoints=tuple(map(_known, names)), target=_known(sae.cfg.target), model=model)
        out = SAE(sae.params, cfg, sae.mesh)
        out.writer, out.source, out.card = saelens.write, str(self.source), cards.sae
        return out

    @property
    def mesh(self) -> Mesh | None:
        """What the dictionary is split over; None: it is on one device."""
        return self.sae.mesh

    @functools.cached_property
    def lm(self) -> LM:
        """The language model; shared with other subjects of the same one. Raises `LMError`; `ConfigError` where its name is not
        known; `HookpointError` and `FormatError` where it has no such hookpoint, or one of another width.
        """
        self.require()
        given, config = self.given.model, self.config
        named = config.lm.model if config is not None else self._loaded[1].cfg.model
        if isinstance(given, LM):
            found = given
        elif config is not None and given in (None, named):
            mesh = lm_mesh(config) if config.lm.model_parallel > 1 else None
            found = _language_model(named, config.lm.revision, config.lm.dtype, mesh)
        else:
            found = _language_model(given or named, None, "float32", None)
        if given is not None and UNKNOWN != named and found.name not in (named, model_name(named)):
            say(f"{self.source}: made for {named}, used with {found.name}")
        self._check_place(found)
        if "index" in self.__dict__:
            check_belongs(self.index.path, self.index.manifest, None, found)
        return found

    def _check_place(self, lm_: LM) -> None:
        cfg, files = self.sae.cfg, self._loaded[1].cfg
        for name in (*files.hookpoints, files.target) if self.given.hookpoint is None else (self.given.hookpoint,):
            if name in ("", UNKNOWN):
                continue
            try:
                hookpoint_of(name, lm_.cfg)  # refused where it fits no family, or means another value in this one
            except HookpointError as error:
                raise HookpointError(f"{self.source}: {error}; say where it reads with hookpoint=NAME") from error
        for names, width in ((cfg.hookpoints, cfg.d_in), (cfg.targets, cfg.spec.width_out)):
            if UNKNOWN in names:
                raise ConfigError(f"{self.source}: its files do not say where it writes, and nothing else can; use files that do")
            for name in names:
                lm.check_hookpoint(lm_.cfg, name)
            found = [lm.width_of(lm_.cfg, name) for name in names]
            if sum(found) != width:
                raise FormatError(f"{self.source}: {width} wide at {', '.join(names)}, which {' + '.join(map(str, found))} is in "
                                  f"{lm_.name}; give the model and the hookpoint that it was trained on")

    def require(self, *also: tuple[str, str], text: bool = False) -> None:
        """Raises `ConfigError` that names everything that is missing of model and hookpoint, of the text where that is needed,
        and `also`: (what it is, how it is given), see `runs.missing`.
        """
        found = list(dict.fromkeys([*missing.of(self._loaded[1].cfg, self.given, self.config, text=text), *also]))
        if found:
            raise ConfigError(missing.said(self.source, found))

    @functools.cached_property
    def text(self) -> Text:
        """The text whose activations it explains. Raises `ConfigError` where neither caller nor files name one."""
        given, context, files = self.given.text, self.given.context, self._loaded[1].cfg
        config = self.config
        if context is not None and context < 1:
            raise ConfigError(f"context={context}: expected a whole number of at least 1")
        if isinstance(given, Text):
            return given
        if isinstance(given, TextOptions):
            return Text(given)
        own = given is None and config is not None and not missing.made_elsewhere(files)  # the run's text
        if own and context is None:
            return Text.of(config)
        known = {"source": config.text.source} if own else files.metadata.get("text", {})
        source = known.get("source") if given is None else given.split(",") if isinstance(given, str) else given
        if not source:
            self.require(missing.TEXT, text=True)
        base = Text.of(config) if config is not None else Text(TextOptions())
        kept = {key: known[key] for key in ("context", "bos", "packing") if config is None and known.get(key)}
        if context is None and config is None:
            context = min(kept.get("context", base.options.context), self.lm.cfg.max_context)
        if context is not None:
            kept["context"] = context
        return dataclasses.replace(base, options=dataclasses.replace(base.options, source=tuple(source), **kept))

    @functools.cached_property
    def store(self) -> Store | None:
        """The activation store: the one given, else the run's where that is complete, else None. Raises `StoreError` where it
        is of another model or lacks the hookpoints.
        """
        place = self.given.store or (self.config.harvest.store if self.config is not None else None)
        if place is None or (self.given.store is None and not is_complete(place)):
            return None
        store = Store.open(place)
        named = self.config.lm.model if self.config is not None and self.given.model is None else None
        check_matches(store, hookpoints=self.sae.cfg.hookpoints, model=named)
        return store

    @property
    def kept(self) -> Kept | None:
        """What the run keeps of its store; None where it is asked about with another store, model, hookpoint or text."""
        given = self.given
        if not self.trained_here or any(v is not None for v in (given.store, given.model, given.hookpoint, given.text)):
            return None
        return kept_statistics.read(RunPaths(self.run).statistics)

    def stats(self, hookpoints: tuple[str, ...]) -> dict[str, ActivationStats]:
        """Statistics of the activations at hookpoints: those that the run keeps of its store, of the store that was given, else
        measured on the text's training part.
        """
        if (kept := self.kept) is not None and set(hookpoints) <= kept.stats.keys():
            return {name: kept.stats[name] for name in hookpoints}
        if self.store is not None:
            return {name: self.store.stats(name) for name in hookpoints}
        say(f"{self.source}: no store; mean and median norm are measured on {statistics.TOKENS:,} tokens")
        return statistics.measured(self.lm, self.text, hookpoints)

    @property
    def index_home(self) -> Path | None:
        """Where its index lies or will lie; None where nothing says so."""
        if self.given.index is not None:
            return Path(self.given.index)
        return self.run / INDEX if self.run is not None else None

    @functools.cached_property
    def index(self) -> FeatureIndex:
        """The index of its features. Raises `FeatureIndexError`: none, of another SAE, altered."""
        if self.index_home is None:
            raise FeatureIndexError(f"{self.source}: has no index of its features; build one (saejax features), give index=DIR")
        index = FeatureIndex.open(self.index_home, sae=self.sae, lm_=self.__dict__.get("lm"))
        index.card = cards.feature
        index.near = lambda feature: [(f.feature, f.score) for f in actions.alike(self.sae, feature, None, actions.MOST)]
        return index

    def index_if_any(self) -> FeatureIndex | None:
        """`index`; None, with a line that says why, where there is none or the run's belongs to another checkpoint."""
        return self._index_if_any

    @functools.cached_property
    def _index_if_any(self) -> FeatureIndex | None:
        if self.given.index is None and (self.index_home is None or not (self.index_home / MANIFEST).is_file()):
            return None
        try:
            return self.index
        except FeatureIndexError as error:
            if self.given.index is not None:
                raise
            say(f"{error}; what features fire on is not shown")
            return None

    def corpus(self, *, split: str | None = None, tokens: int | None = None, hookpoints: tuple[str, ...] | None = None,
               ) -> corpus.Corpus:
        """Contexts of tokens with their activations: those of the store where no split is named (nor a text alone), else about
        `tokens` (a million) of a split of the text. hookpoints: others than the SAE's. Raises `StoreError`, `TextError`.
        """
        hookpoints = hookpoints or self.sae.cfg.hookpoints
        if split is None and (self.given.store or self.given.text is None) and self.store is not None:
            return corpus.from_store(self.store, hookpoints, tokens)
        self.require(text=True)
        batch = 8 if self.config is None else self.config.lm.batch_contexts
        return corpus.from_text(self.text, self.lm, hookpoints, split=split or "train", tokens=tokens or TOKENS, batch=batch)

    def top(self, acts, n: int = 5) -> Table:
        """The n most active features of each token of activations [T, F], or of one token [F]."""
        return actions.top(acts, self.sae.cfg.d_sae, self.index_if_any(), n)

    def search(self, prompt: str | None = None, *, by: str | None = None, max_density: float | None = None,
               positives: Sequence[str] = (), negatives: Sequence[str] = (), find: str | None = None, like=None,
               n: int = actions.MOST) -> Table:
        """Features by what they do, one way at a time.

        prompt: the most active ones on a text; by: "relative" to their maximum in the index (default where there is one) or
        "activation"; max_density: those active on more of the index' tokens are left out (0.01). positives, negatives: those that
        tell these prompts apart better than chance, line by line a pair. find: those whose top examples hold this text. like:
        those of the nearest decoder rows to a feature, or to a vector [d_out]. Raises `ConfigError` for several or no ways.
        """
        ways = {"prompt": prompt, "positives": positives, "find": find, "like": like}
        actions.check_search(ways, negatives, (by, max_density), n)
        index, note = self.index if find is not None else self.index_if_any(), ""
        if prompt is not None:
            found = by_prompt(self.lm, self.sae, prompt, n, actions.ranking(index, by, max_density))
        elif positives:
            tested = by_sets(self.lm, self.sae, positives, negatives, n)
            found, note = tested.found, str(tested)
        else:
            found = by_text(index, find, n) if find is not None else actions.alike(self.sae, like, None, n)
        return actions.table_of(found, index, note)

    def steer(self, prompt: str, features: actions.Features = (), *, values: bool = False, samples: int = 1, seed: int = 0,
              temperature: float | None = None, top_p: float = 1.0, tokens: int = 40, positions="all") -> Table:
        """How a prompt goes on with features at `{feature: multiple of its maximum}`, or several of these, and without.

        values: the numbers are activations, not multiples, and no index is needed. samples: of each, drawn at temperature 1 where
        there are several and nothing else is said. The SAE's error is kept. Raises `SteeringError`, `FeatureIndexError`.
        """
        changes = actions.changes_of(self.sae, lambda: self.index, features, values)
        return actions.steer(self.lm, self._whole_sae(), prompt, changes, samples=samples, seed=seed, temperature=temperature,
                             top_p=top_p, tokens=tokens, positions=positions)

    def next_tokens(self, prompt: str, features: actions.Features, *, values: bool = False, positions="all", n=3) -> Table:
        """What features, set as in `steer`, do to the token behind a prompt: KL from the unsteered model, largest changes."""
        changes = actions.changes_of(self.sae, lambda: self.index, features, values)
        return actions.next_tokens(self.lm, self._whole_sae(), prompt, changes, positions, n)

    def attribute(self, prompt: str, token: str, against: str | None = None, *, ablate: int = 0) -> Attribution:
        """Which features of a prompt, and errors of the SAE, speak for a next token, against another one or the mean logit.

        ablate: so many of the largest are taken away, too, each by itself. `to_pandas()` gives all of it as a frame.
        """
        return actions.attribute(self.lm, self._whole_sae(), prompt, token, against, ablate)

    def spliced(self, *, error: bool = False):
        """A context in which calls of language models (`s.lm(text)`) have the SAE in their place; BOS keeps its value.

        error: what the SAE misses is added, so that logits are the model's own and gradients pass through the features.
        """
        return tapped(splicing.plan(self.lm, self._whole_sae(), error=error))

    def _whole_sae(self) -> SAE:
        """The SAE where programs of one device can hold it."""
        return self.sae if self.mesh is None or self.mesh.size > 1 else SAE(jax.device_put(
            self.sae.params, self.mesh.devices.flat[0]), self.sae.cfg)

    def index_of(self, sae: SAE, out: str | Path, *, tokens: int | None = None) -> FeatureIndex:
        """The index of another SAE over this text, or store, with this language model; built at `out`, or opened there."""
        return build(out, sae, self.corpus(tokens=tokens, hookpoints=sae.cfg.hookpoints), self.lm,
                     BuildOptions(progress=self.progress))

    def build_index(self, *, tokens: int | None = None) -> FeatureIndex:
        """Its own index, where `index` finds it: built, gone on with, or as it is there. tokens: of the store or text."""
        if self.index_home is None:
            raise FeatureIndexError(f"{self.source}: is no run with a place for an index; open it with index=DIR")
        self.index_of(self.sae, self.index_home, tokens=tokens)
        self.__dict__.pop("_index_if_any", None)  # that there was none
        return self.index

    @property
    def metrics(self) -> list[dict]:
        """The metric lines of its training, oldest first. Raises `ConfigError` where there is no run."""
        if self.run is None:
            raise ConfigError(f"{self.source}: is no run, and has no metrics of its training")
        return read_metrics(RunPaths(self.run).metrics)

    @property
    def progress(self) -> bool:
        """Whether long work shows a bar."""
        return self.config is None or self.config.log.progress

    @property
    def seed(self) -> int:
        """For what is drawn at random: the run's, else 0."""
        return 0 if self.config is None else self.config.seed

    @property
    def name(self) -> str:
        """A short name for titles."""
        return self.config.name if self.config is not None else str(self.source).rstrip("/").rsplit("/", 1)[-1]

    def __repr__(self) -> str:
        sae = f", {self._loaded[1]!r}" if "_loaded" in self.__dict__ else ""
        return f"Subject({str(self.source)!r}{sae})"[:150]

    def _repr_html_(self) -> str:
        """A card: the SAE, and what else is there."""
        index = self.index_home is not None and (self.index_home / MANIFEST).is_file()
        rows = [("SAE", repr(self.sae)), ("language model", model_title(self.sae.cfg.model)),
                ("run", "none" if self.run is None else str(self.run)),
                ("store", "none" if self.store is None else f"{self.store.path}: {self.store.rows:,} rows"),
                ("index", str(self.index_home) if index else "none: saejax features makes it")]
        return cards.facts(str(self.source), rows)


def _known(name: str) -> str:
    """The TransformerLens name of a hookpoint, or the name as it is where it fits no family: the model decides then."""
    try:
        return hookpoint_of(name) if name and name != UNKNOWN else name
    except HookpointError:
        return name


@functools.lru_cache(maxsize=1)
def _language_model(model: str, revision: str | None, dtype: str, mesh: Mesh | None) -> LM:
    """Loaded once for all subjects that use it."""
    return dataclasses.replace(lm.load(model, revision=revision, dtype=dtype, mesh=mesh), card=cards.language_model)


def forget_language_model() -> None:
    """Frees the language model that was loaded last, once no subject holds it."""
    _language_model.cache_clear()
