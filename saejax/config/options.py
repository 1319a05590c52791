"""One experiment = one `Config`: a `ml_collections.ConfigDict` at the edge, frozen dataclasses inside.

The dataclasses below are the only place where options, defaults and their meaning are written down; the config reference in
`docs/reference/config.md` is generated from them (`saejax.config.reference`). A config *file* is Python and is executed: run only
your own. What a run directory keeps is JSON and is never executed.
"""

import dataclasses
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import ml_collections
from ml_collections import config_dict

from saejax.base.errors import CheckpointError, ConfigError
from saejax.base.records import MeshOptions
from saejax.base.storage import read_json
from saejax.config.contradictions import contradictions
from saejax.config.recipes import INITS, KINDS, PENALTIES, RECIPES
from saejax.config.values import base_type, build, join

SCHEMA_VERSION = 2

NORMALIZATIONS = ("mean_sq_norm_D", "mean_norm_sqrt_D", "mean_sq_norm_1", "none")


def opt(default, doc, **rules):
    """A dataclass field with its documentation and its rules (`ge`, `gt`, `le`, `lt`, `choices`)."""
    return field(default=default, metadata={"doc": doc, **rules})


@dataclass(frozen=True)
class LMOptions:
    """The language model whose activations are harvested."""

    model: str = opt("smollm2-135m", "preset name, .gguf file, local Hugging Face directory, or hub id")
    revision: str | None = opt(None, "hub revision (a commit hash pins the weights)")
    dtype: str = opt("float32", "compute dtype of the forward pass", choices=("float32", "bfloat16"))
    batch_contexts: int = opt(16, "contexts in one forward pass", gt=0)
    model_parallel: int = opt(1, "devices of a process that share one copy of the weights (heads, MLP units, vocabulary); the "
                              "others hold copies, as many as divide a batch", ge=1)


@dataclass(frozen=True)
class TextOptions:
    """Where documents come from and how they become rows of tokens."""

    source: tuple[str, ...] = opt(
        ("shakespeare", "python-stdlib"), "presets, local text/jsonl/parquet/arrow files, globs or directories, or hub ids")
    split: str = opt("train", "split of a hub dataset, or of a folder whose data files are named by split")
    field: str = opt("text", "name of the column: of text, of conversations (`messages`, put into the model's chat template) or "
                     "of token ids (`input_ids`)")
    streaming: bool = opt(False, "stream a hub dataset or large local files instead of materialising them")
    shuffle: bool = opt(True, "shuffle documents with the config seed (a buffer of 10,000 when streaming)")
    context: int = opt(128, "tokens of a row (the language model's context)", ge=2)
    packing: str = opt("packed", "how documents become rows. packed: one behind the other, cut into rows; document: each its own "
                       "row, cut at `context`; a shorter one is filled up with masked tokens", choices=("packed", "document"))
    bos: str = opt("row", "where the BOS token goes: `row` (first token of every row), `doc` (of every document) or `none`; "
                   "another token in its place: its text, or `doc:` and its text")
    separator: str = opt("eos", "token behind every document: `none`, the text of a token, or `eos`: EOS, but where that ends a "
                         "turn of a conversation, the token that ends a document in pre-training")
    special: bool = opt(False, "read strings of a document that spell a special token as that token; off: they are text")
    mask: tuple[str, ...] = opt(("first", "special"), "tokens that are never trained on, measured or indexed. first: of every "
                                "row, which models make an attention sink whatever is there; special: BOS, EOS, pad and the "
                                "tokenizer's other special tokens; repeated: all of a context exactly like an earlier one",
                                empty=True, choices=("first", "special", "repeated"))
    holdout: float = opt(0.02, "share of documents (by hash of their text) kept for evaluation", ge=0.0, lt=1.0)

    @property
    def bos_place(self) -> str:
        """`row`, `doc` or `none`."""
        return self.bos if self.bos in ("row", "doc", "none") else "doc" if self.bos.startswith("doc:") else "row"

    @property
    def bos_token(self) -> str | None:
        """The text of the token that stands for BOS; None: the tokenizer's own."""
        return None if self.bos in ("row", "doc", "none") else self.bos.removeprefix("doc:")


@dataclass(frozen=True)
class HarvestOptions:
    """Language model -> activation store."""

    store: str = opt("", "store directory; empty: `<run_dir>/store`")
    hookpoints: tuple[str, ...] = opt(("blocks.9.hook_resid_post",), "hookpoints written in the one pass")
    tokens: int = opt(1_000_000, "tokens to harvest (rounded up to whole contexts; less where the text ends)", gt=0)
    shard_bytes: int = opt(128 << 20, "bytes of activations in one shard, over all hookpoints: the unit of resuming; two shards "
                           "are in memory. Rounded down to whole contexts", gt=0)


@dataclass(frozen=True)
class StreamOptions:
    """Store -> deterministic shuffled batches, each row exactly once per epoch of its lane (`saejax.data.order`)."""

    block_contexts: int = opt(4, "contexts in one block, the unit of the global permutation", gt=0)
    window_rows: int = opt(65_536, "rows shuffled together, over all lanes; a process holds two such windows of its lanes", gt=0)
    mask_outliers: bool = opt(False, "in the place of a row whose norm exceeds 10 x the median norm, another of its window")


@dataclass(frozen=True)
class SAEOptions:
    """The sparse autoencoder. `default_config(kind)` fills in the published recipe of a kind."""

    kind: str = opt("topk", "activation function and objective", choices=KINDS)
    hookpoint: str = opt("blocks.9.hook_resid_post", "the hookpoint it reads, and reconstructs; one of `harvest.hookpoints`")
    target: str = opt("", "transcoder: the hookpoint that it predicts from `hookpoint`; empty: none")
    skip: bool = opt(False, "add x W_skip to what a transcoder predicts")
    crosscoder: tuple[str, ...] = opt((), "crosscoder: the hookpoints that it reads and reconstructs together, instead of "
                                      "`hookpoint`; empty: none", empty=True)
    d_in: int | None = opt(None, "expected width of the activations; none: whatever the store holds", gt=0)
    d_sae: int = opt(4608, "number of features", gt=0)
    k: int = opt(32, "active features per token (topk), per token on average over a batch (batchtopk), or the L0 that penalty "
                "`target_l0` aims at (jumprelu)", gt=0)
    k_start: int | None = opt(None, "active features at the first step, falling to `k` step by step over `train.k_anneal` "
                              "(topk, batchtopk); these steps cost as much as with this k; none: always `k`", gt=0)
    multi_topk: bool = opt(False, "add the error with 4 k features at 1/8, so that k can be changed after training (topk)")
    penalty: str = opt("l1", "what `penalty_coef` multiplies. relu: f ||W_dec||, or tanh(c f ||W_dec||) / c or log(1 + c f "
                       "||W_dec||) / c with c = 4; gated: l1 of the gate; jumprelu: L0, (L0 / k - 1)^2, or tanh(4 f ||W_dec||) "
                       "with a pre-activation loss of weight 3e-6", choices=tuple(PENALTIES))
    penalty_coef: float = opt(5.0, "lambda, the weight of the penalty (relu, gated, jumprelu)", ge=0.0)
    bandwidth: float | None = opt(None, "window around a threshold in which it receives gradient (jumprelu); none: 3/4 of the "
                                  "root mean square of the inputs' entries", gt=0.0)
    threshold_init: float | None = opt(None, "threshold of a new feature (jumprelu); none: as `bandwidth`", gt=0.0)
    groups: tuple[float, ...] = opt((), "shares of the dictionary, in order, whose nested prefixes each reconstruct the input "
                                    "(Matryoshka; batchtopk, jumprelu); empty: none", empty=True)
    normalize: str = opt("mean_sq_norm_D", "scalar normalisation of each hookpoint; lambda and thresholds only carry over "
                         "inside one convention", choices=NORMALIZATIONS)
    center: bool = opt(False, "subtract the store's mean from each hookpoint first")
    unit_decoder: bool = opt(True, "keep decoder rows at unit norm and drop the gradient parallel to them")
    pre_bias: bool = opt(True, "subtract b_dec from the input of the encoder")
    init: str = opt("input_scale", "how weights start (see Initialisation below)", choices=tuple(INITS))
    aux_k: int = opt(256, "dead features asked to explain the residual error; 0 turns AuxK off", ge=0)
    aux_coef: float = opt(1 / 32, "weight of the AuxK loss", ge=0.0)
    dead_tokens: int = opt(10_000_000, "a feature that has not fired for this many tokens is dead: for AuxK, for resampling "
                           "and in the log", gt=0)

    @property
    def sources(self) -> tuple[str, ...]:
        """The hookpoints that are read."""
        return self.crosscoder or (self.hookpoint,)

    @property
    def hookpoints(self) -> tuple[str, ...]:
        """The hookpoints whose activations a row consists of: those that are read, then a transcoder's target."""
        return self.sources + ((self.target,) if self.target else ())


@dataclass(frozen=True)
class ResampleOptions:
    """Resampling of dead features ("Towards Monosemanticity"), in the first half of the run; counted in tokens."""

    every_tokens: int | None = opt(None, "tokens between resampling steps, in the first half of the run; none: no resampling",
                                   gt=0)
    sample_rows: int = opt(819_200, "rows whose loss is measured to draw replacements from, p ~ loss^2", gt=0)


class Optimizer(NamedTuple):
    """What a value of `train.optimizer` stands for, see `TrainOptions`."""

    beta1: float
    state_bytes: int
    lazy: bool


OPTIMIZERS = {"adam": Optimizer(0.9, 12, False), "adam_bf16": Optimizer(0.9, 8, False), "second": Optimizer(0.0, 8, False),
              "second_bf16": Optimizer(0.0, 6, False), "lazy": Optimizer(0.0, 8, True), "lazy_bf16": Optimizer(0.0, 6, True)}


@dataclass(frozen=True)
class TrainOptions:
    """Optimisation of the SAE."""

    tokens: int = opt(10_000_000, "rows to train on, repeating epochs of the store as needed", gt=0)
    batch: int = opt(4096, "rows of a step; a multiple of the mesh's device count", gt=0)
    lr: float = opt(1e-4, "peak learning rate", gt=0.0)
    optimizer: str = opt("adam", "Adam, by what it keeps (docs/explanation/optimizer.md). adam: two moments, beta1 0.9; second: "
                         "the second one only, beta1 0; lazy: as second, and only rows of features that fired are read and "
                         "written (topk, batchtopk). _bf16: moments of matrices in bfloat16", choices=tuple(OPTIMIZERS))
    beta2: float = opt(0.999, "Adam's second-moment decay", ge=0.0, lt=1.0)
    eps: float = opt(6.25e-10, "Adam's epsilon", gt=0.0)
    clip: float | None = opt(1.0, "clip the global gradient norm to this; none: not at all", gt=0.0)
    lr_warmup: float = opt(0.0, "share of the steps over which the learning rate rises", ge=0.0, le=1.0)
    lr_decay: float = opt(0.2, "share of the steps, at the end, over which it falls to 0", ge=0.0, le=1.0)
    lr_shape: str = opt("linear", "shape of rise and fall; cosine: rises from a tenth of `lr`", choices=("linear", "cosine"))
    penalty_warmup: float = opt(0.05, "share of the steps over which lambda rises from 0", ge=0.0, le=1.0)
    target_l0: float | None = opt(None, "active features per token towards which lambda is steered (relu, gated, jumprelu with "
                                  "tanh; docs/explanation/kinds.md); none: lambda is `sae.penalty_coef`", gt=0.0)
    k_anneal: float = opt(0.1, "share of the steps over which k falls from `sae.k_start`, evenly in its logarithm", ge=0.0,
                          le=1.0)
    accumulate: int = opt(1, "parts of a batch that go through the SAE one after the other, their gradients averaged; batchtopk "
                          "and penalty `target_l0` count within a part", gt=0)
    ema: float = opt(0.0, "memory of a running mean of the parameters, which is then what evaluation and release use; 0: no mean",
                     ge=0.0, lt=1.0)
    compute_dtype: str = opt("auto", "dtype of both operands of every matrix product, backward ones too; parameters and sums "
                             "are float32. auto: bfloat16 on GPUs and TPUs, else float32",
                             choices=("auto", "float32", "bfloat16"))
    path: str = opt("auto", "how a step of kinds with k is computed (docs/explanation/selection.md). sparse: decoding and "
                    "gradients from the kept features only; dense: from all; auto: as is faster. The result is the same up "
                    "to rounding",
                    choices=("auto", "dense", "sparse"))
    deterministic: bool = opt(False, "on a GPU, the same bits in every run and after every resume, at a cost in speed "
                              "(docs/reference/checkpoint_format.md); CPUs and TPUs give them anyway")
    profile: int = opt(0, "steps to trace, once, when the first steps are done: `<run_dir>/profile` "
                       "(docs/how-to/profiling.md); 0: none",
                       ge=0)
    init_from: str = opt("", "start from this dictionary: whatever `saejax.load` reads, of the same kind and shape "
                             "(docs/how-to/other_libraries.md)")
    resample: ResampleOptions = field(default_factory=ResampleOptions)

    @property
    def beta1(self) -> float:
        """Adam's first-moment decay; 0: no first moment is kept."""
        return OPTIMIZERS[self.optimizer].beta1

    @property
    def state_bytes(self) -> int:
        """Bytes kept per parameter of a matrix, with the float32 parameter itself."""
        return OPTIMIZERS[self.optimizer].state_bytes

    @property
    def lazy(self) -> bool:
        """Whether the rows of features that fired are the only ones read and written."""
        return OPTIMIZERS[self.optimizer].lazy


@dataclass(frozen=True)
class CheckpointOptions:
    """Whole-state checkpoints (orbax, asynchronous)."""

    every_tokens: int = opt(1_000_000, "tokens between checkpoints", gt=0)
    keep: int = opt(2, "newest checkpoints kept", gt=0)
    keep_every_tokens: int | None = opt(None, "also keep the checkpoints at multiples of this (rounded up to one of "
                                        "`every_tokens`); none: the newest only", gt=0)


@dataclass(frozen=True)
class EvalOptions:
    """Measurements on held-out text."""

    contexts: int = opt(128, "held-out contexts", gt=0)


@dataclass(frozen=True)
class LogOptions:
    """What is written while training."""

    every_steps: int = opt(20, "steps between metric lines", gt=0)
    tensorboard: bool = opt(True, "write TensorBoard event files to `<run_dir>/tensorboard`")
    wandb: str = opt("", "Weights & Biases project; empty: off (needs the `wandb` extra)")
    progress: bool = opt(True, "show progress bars")


@dataclass(frozen=True)
class SweepOptions:
    """Several SAEs over one stream of activations, each with its own run directory `<run_dir>/<name>` (docs/how-to/sweeps.md)."""

    product: tuple[str, ...] = opt((), "keys and their values, as `sae.k=16,32,64`: one SAE for every combination", empty=True)
    variations: tuple[str, ...] = opt((), "one SAE each, as `recipe=relu sae.penalty_coef=3`; with `product` each of them in "
                                      "every combination", empty=True)


@dataclass(frozen=True)
class Config:
    """A whole experiment."""

    name: str = opt("run", "a short name, used for the default run directory")
    run_dir: str = opt("", "where the run lives; empty: `runs/<name>`")
    seed: int = opt(0, "seed of the text shuffle, the row order, the initialisation and the resampling", ge=0)
    data_seed: int | None = opt(None, "seed of the text shuffle and the row order, where it is not `seed`", ge=0)
    mesh: MeshOptions = field(default_factory=MeshOptions)
    lm: LMOptions = field(default_factory=LMOptions)
    text: TextOptions = field(default_factory=TextOptions)
    harvest: HarvestOptions = field(default_factory=HarvestOptions)
    stream: StreamOptions = field(default_factory=StreamOptions)
    sae: SAEOptions = field(default_factory=SAEOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)
    log: LogOptions = field(default_factory=LogOptions)
    sweep: SweepOptions = field(default_factory=SweepOptions)

    @property
    def seed_of_data(self) -> int:
        """The seed of the text shuffle and the row order."""
        return self.seed if self.data_seed is None else self.data_seed


# Keys that may differ between two starts of the same run: they change what is shown or kept, or which way to the same result is
# taken, never what is learned.
NEUTRAL = ("run_dir", "harvest.store", "log", "checkpoint", "eval", "mesh", "lm.model_parallel", "train.path", "train.profile")


def default_config(kind: str = "topk") -> ml_collections.ConfigDict:
    """The locked default config with the recipe of this name (docs/reference/config.md), for a config file to change."""
    if kind not in RECIPES:
        raise ConfigError(f"default_config: no recipe {kind!r}; choose one of {', '.join(RECIPES)}")
    config = _to_config_dict(Config())
    for path, value in RECIPES[kind].items():
        node = config
        *parents, leaf = path.split(".")
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return config.lock()


def _to_config_dict(node) -> ml_collections.ConfigDict:
    out = ml_collections.ConfigDict()
    hints = typing.get_type_hints(type(node))
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        if dataclasses.is_dataclass(value):
            out[f.name] = _to_config_dict(value)
        elif value is None:
            out[f.name] = config_dict.placeholder(base_type(hints[f.name]))
        else:
            out[f.name] = value
    return out


def resolve(config: ml_collections.ConfigDict) -> Config:
    """ConfigDict -> frozen `Config`, once. Raises one `ConfigError` that lists every wrong key, type and value."""
    plain = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    problems: list[str] = []
    resolved = build(Config, plain, "", problems)
    if not problems:
        problems = contradictions(resolved)
    if problems:
        raise ConfigError("; ".join(problems))
    return dataclasses.replace(
        resolved,
        run_dir=resolved.run_dir or f"runs/{resolved.name}",
        harvest=dataclasses.replace(
            resolved.harvest,
            store=resolved.harvest.store or f"{resolved.run_dir or f'runs/{resolved.name}'}/store"))


def to_json(config: Config) -> dict:
    """Plain JSON of a resolved config, with the schema version."""
    return {"schema_version": SCHEMA_VERSION, **json.loads(json.dumps(dataclasses.asdict(config)))}


def from_json(values: dict, where: str = "config.json") -> Config:
    """A resolved `Config` from what `to_json` wrote. Raises `ConfigError` for a newer schema or any unknown key."""
    values = dict(values)
    version = values.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise ConfigError(f"{where}: config schema version {version!r}, this saejax reads {SCHEMA_VERSION}; use the "
                          "saejax that wrote it")
    return resolve(values)


def read_config(file: Path) -> Config:
    """The config that a run directory keeps, read as JSON and never executed.

    Raises `CheckpointError` when the file is missing or not JSON, `ConfigError` for a newer schema or an unknown key.
    """
    return from_json(read_json(file, CheckpointError), str(file))


def flat(config: Config) -> dict[str, object]:
    """{"train.lr": 1e-4, ...} of a resolved config."""
    out: dict[str, object] = {}

    def walk(node, path):
        for f in dataclasses.fields(node):
            value = getattr(node, f.name)
            if dataclasses.is_dataclass(value):
                walk(value, join(path, f.name))
            else:
                out[join(path, f.name)] = value

    walk(config, "")
    return out


def differences(old: Config, new: Config) -> list[str]:
    """Lines "key: old -> new" of every difference that would change what a run computes (`NEUTRAL` keys are left out)."""
    a, b = flat(old), flat(new)
    skip = tuple(NEUTRAL)
    return [f"{key}: {a[key]!r} -> {b[key]!r}" for key in a
            if a[key] != b[key] and not any(key == s or key.startswith(s + ".") for s in skip)]
