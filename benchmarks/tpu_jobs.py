"""What comes after training at pod scale, compiled for TPU slices that are not there: python benchmarks/tpu_jobs.py [WORD ...]

The programs that evaluation, a release, resampling and an index run over the mesh of a dictionary; of all those whose name has
the words given. Needs the TPU compiler (pip install -e '.[tpu-plan]') and no TPU; the step of an index takes minutes. What is
printed is the compiler's word, not a measurement. `time` alone prints what the plan's terms say of an evaluation.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from tpu_compile import LAZY, config_of, each_in_its_process

from saejax.base import hardware, sharding
from saejax.config import Config
from saejax.features.index import accumulate, logits, neighbours, tables
from saejax.features.index import state as st
from saejax.features.index.lookup import Lookup
from saejax.lm.hf_config import from_hf
from saejax.plan.compiled import mesh_for, outcome
from saejax.plan.plan import LM_SHARE
from saejax.plan.source import flops_per_token
from saejax.sae import SAESpec
from saejax.sae.inference import ROWS, SAE, SAEConfig, fold, measured_raw
from saejax.sae.params import abstract_params
from saejax.sae.row_norm import LAYER_NORM
from saejax.train import resample, step_cost
from saejax.train.state import abstract_state
from saejax.train.step_cost import Work

FEATURES, WIDTH, CONTEXT, EXAMPLES, TOKENS = 2**25, 4096, 128, 1 << 17, 131_072
# Source: config.json of Llama 3 8B.
LLAMA = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "vocab_size": 128_256,
         "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
         "rope_theta": 500_000.0, "hidden_act": "silu", "tie_word_embeddings": False}
KINDS = {"v5p:4x8x8": ("topk", "relu"), "v5e:16x16": ("topk",)}


@dataclass(frozen=True)
class Setting:
    """A dictionary on a slice: nothing of it is there but shapes."""

    kind: str
    topology: hardware.Topology
    config: Config
    mesh: Mesh

    @classmethod
    def of(cls, kind: str, topology: str, features: int = FEATURES) -> "Setting":
        chosen = hardware.parse(topology)
        small = {} if chosen.chip.memory > 5e10 or kind != "topk" else LAZY
        return cls(kind, chosen, config_of(kind, features, WIDTH, 16_384, small), mesh_for(chosen, 1, chosen.size))

    @property
    def trained(self) -> SAESpec:
        return SAESpec.from_options(self.config.sae, {name: WIDTH for name in self.config.sae.sources}, "bfloat16")

    @property
    def sae(self) -> SAE:
        spec = self.trained
        cfg = SAEConfig(kind=spec.kind, d_in=WIDTH, d_sae=spec.d_sae, k=spec.k, pre_bias=spec.pre_bias,
                        hookpoints=self.config.sae.sources, model="", input_norm=LAYER_NORM)
        out = SAE(abstract_params(spec, self.mesh, folded=True), cfg)
        out.mesh = self.mesh
        return out

    def array(self, shape: tuple[int, ...], dtype, *axes: str | None) -> jax.ShapeDtypeStruct:
        """axes: logical ones, of the dimensions that are split."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.sharding(self.mesh, *axes))

    def rows(self, n: int, dtype=jnp.float32, where: str = "rows_at_rest") -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Rows, and which of them count."""
        return self.array((n, WIDTH), dtype, where), self.array((n,), bool, where)

    @property
    def index_batch(self) -> int:
        """Contexts of a batch of the index."""
        return accumulate.batch_contexts(self.sae, CONTEXT, 10**6)

    @property
    def index_rows(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        return self.rows(self.index_batch * CONTEXT, jnp.bfloat16, "rows")


def evaluation(s: Setting, rows: int = ROWS, dtype: str = "float32"):
    spec = dataclasses.replace(s.sae.cfg.spec, compute_dtype=dtype)
    return measured_raw.trace(spec, LAYER_NORM, s.sae.params, *s.rows(rows))


def folding(s: Setting):
    state = abstract_state(s.config, s.trained, s.mesh)
    return jax.jit(fold, static_argnums=0, donate_argnums=1).trace(s.trained, state.params, state.normalization)


def to_hosts(s: Setting):
    """A block of a matrix on its way to every process, as formats of one file need it."""
    size = sharding.AT_ONCE // s.mesh.size // (4 * WIDTH)
    return sharding.some_of_each.trace(s.sae.params.W_enc, s.array((), jnp.int32), s.mesh, "dict", size)


def resampling_losses(s: Setting):
    return jax.jit(resample._row_losses, static_argnums=0).trace(
        s.trained, abstract_state(s.config, s.trained, s.mesh), s.rows(s.config.train.batch, jnp.bfloat16)[0])


def resampling_rows(s: Setting):
    C, norm = resample._AT_ONCE, s.array((), jnp.float32)
    return jax.jit(resample._place_rows, static_argnums=(0, 1), donate_argnums=2).trace(
        s.trained, s.config.sae, abstract_state(s.config, s.trained, s.mesh), s.rows(s.config.train.batch, jnp.bfloat16)[0],
        *2 * [s.array((C,), jnp.int32)], (norm, norm))


def resampling_norms(s: Setting):
    dead_F = s.array((FEATURES,), bool, "features")
    return jax.jit(resample._alive_norms).trace(abstract_state(s.config, s.trained, s.mesh), dead_F)


def index_state(s: Setting) -> st.FeatureState:
    shapes = jax.eval_shape(functools.partial(st.empty, FEATURES))
    return jax.tree.map(lambda x: s.array(x.shape, x.dtype, "features"), shapes)


def index_step(s: Setting):
    return accumulate.make_step(s.sae, CONTEXT, s.index_batch).trace(
        index_state(s), s.sae.params, *s.index_rows, s.array((), jnp.uint32))


def index_table(s: Setting):
    return Lookup.of(s.sae, 32).prepare.trace(s.sae.params, s.index_rows[0])


def index_lookup(s: Setting):
    lookup, numbers = Lookup.of(s.sae, 32), s.array((EXAMPLES,), jnp.int32)
    table = lookup.prepare.eval_shape(s.sae.params, s.index_rows[0])
    return lookup.gather.trace(s.sae.params, table, s.index_rows[1], numbers, numbers)


def index_neighbours(s: Setting):
    return neighbours._nearest.trace(s.sae.params.W_dec, s.array((256, WIDTH), jnp.float32), s.array((256,), jnp.int32),
                                     n=tables.NEAR)


def index_rows(s: Setting):
    return logits._gathered.trace(s.sae.params.W_dec, s.array((256,), jnp.int32))


PROGRAMS: dict[str, Callable] = {
    "evaluation": evaluation,
    "evaluation, bfloat16": functools.partial(evaluation, dtype="bfloat16"),
    "evaluation, 131,072 rows": functools.partial(evaluation, rows=TOKENS),
    "evaluation, 1,048,576 rows": functools.partial(evaluation, rows=8 * TOKENS),
    "release, folding": folding,
    "release, a matrix to all hosts": to_hosts,
    "resampling, losses": resampling_losses,
    "resampling, rows": resampling_rows,
    "resampling, norms": resampling_norms,
    "index, step": index_step,
    "index, table": index_table,
    "index, lookup": index_lookup,
    "index, neighbours": index_neighbours,
    "index, rows": index_rows,
}


def evaluation_seconds(topology: str, dtype: str) -> dict[str, float]:
    """What evaluating `TOKENS` takes by the plan's terms, one after the other. The model is of the shape of Llama 3 8B, read at
    its middle; it runs below that once and above it four times, with six products with the unembedding; all chips work on it.
    """
    s = Setting.of("topk", topology)
    train = dataclasses.replace(s.config.train, compute_dtype=dtype)
    work = Work.of(dataclasses.replace(s.config, train=train), dataclasses.replace(s.trained, compute_dtype=dtype), 1,
                   s.topology.size, s.topology.chip)
    parts, calls, chip = step_cost.seconds(work, s.topology), TOKENS / work.rows, s.topology.chip
    terms = {name: calls * parts[name] for name in ("product", "selection", "decode")}
    terms["W_enc read again"] = TOKENS / work.rows * parts["tile re-reads"]
    terms["collectives"] = calls * sum(c.bytes for c in step_cost.collectives(work, "tpu") if c.what != "error") \
        / s.topology.ring(s.topology.size)
    model, middle = from_hf(LLAMA), (f"blocks.{LLAMA['num_hidden_layers'] // 2 - 1}.hook_resid_post",)
    below, whole = (flops_per_token(model, names, CONTEXT) for names in (middle, ("ln_final.hook_normalized",)))
    flops = below + 4 * (whole - below) + 6 * 2 * model.d_model * model.vocab_size
    terms["language model"] = flops * TOKENS / (LM_SHARE * chip.flops * s.topology.size)
    # Activations to the host and to where they rest, reconstructions back, both to what measures and splices them.
    terms["rows by way of the hosts"] = 6 * 4 * WIDTH * TOKENS / s.topology.hosts / chip.host
    return terms


def print_seconds() -> None:
    names = " | ".join(evaluation_seconds("v5p:4x8x8", "float32"))
    print(f"| SAE products | topology | {names} | all | 5 x (product + model) |")
    print("|" + "---|" * 11)
    for topology in KINDS:
        for dtype in ("float32", "bfloat16"):
            terms = evaluation_seconds(topology, dtype)
            values = [*terms.values(), sum(terms.values()), 5 * (terms["product"] + terms["language model"])]
            print(f"| {dtype} | {topology} | " + " | ".join(f"{value:.3f}" for value in values) + " |")


def one(name: str) -> None:
    """Prints what the compiler says of a program, as one line of JSON."""
    program, kind, topology = name.split("|")
    s = Setting.of(kind, topology)

    def lower():
        with jax.set_mesh(s.mesh):
            return PROGRAMS[program](s).lower(lowering_platforms=("tpu",))

    print(json.dumps(outcome(lower, 1, s.topology.size)))


def row(name: str, found: dict) -> str:
    program, kind, topology = name.split("|")
    head = f"| {program} | {kind} | {topology} "
    if "refused" in found:
        return f"{head}| {found['refused']} | | {found['seconds_to_compile']:.0f} |"
    given, estimate = found["memory"]["arguments"], found["step_seconds"]
    moved = "-" if "collectives_unknown" in found else f"{sum(found['collective_bytes'].values()) / 1e9:.3f}"
    return (f"{head}| {given / 1e9:.2f} + {(found['peak_bytes'] - given) / 1e9:.2f} | {moved} "
            f"| {f'{estimate * 1e3:.0f}' if estimate else '-'} | {found['seconds_to_compile']:.0f} |")


def main(words: list[str]) -> None:
    if words == ["time"]:
        return print_seconds()
    print("| program | SAE | topology | GB per chip: arguments + more | GB moved | ms, compiler | s to compile |")
    print("|" + "---|" * 7)
    names = [f"{program}|{kind}|{topology}" for topology, kinds in KINDS.items() for kind in kinds for program in PROGRAMS
             if kind == "topk" or program.split(",")[0] in ("evaluation", "index")]
    each_in_its_process(__file__, [name for name in names if all(word in name for word in words)], row)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2])
    else:
        main(sys.argv[1:])
