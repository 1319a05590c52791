"""A config and a topology -> what training it there needs and takes, as one JSON value.

docs/explanation/plan_model.md has the formulas.
"""

import dataclasses
import math
from collections import Counter

import jax
from jax.sharding import AbstractMesh, AxisType

from saejax.base import hardware, sharding
from saejax.base.errors import ConfigError
from saejax.base.hardware import Topology
from saejax.base.records import MeshOptions
from saejax.config import Config
from saejax.data import order
from saejax.data.manifest import contexts_of_shard
from saejax.data.store import model_name
from saejax.plan.compiled import compile_step
from saejax.plan.source import Source, find
from saejax.sae import SAESpec
from saejax.train import step_cost
from saejax.train.state import abstract_state
from saejax.train.step_cost import Work

SCHEMA_VERSION = 1
LM_SHARE = 0.4  # of the peak that a language model's forward pass reaches
# What one core of a host does, as measured (docs/measurements/benchmarks.md), and how many of them work on it.
CORES, TOKENIZED, WRITTEN = 16, 6e5, 5e8  # tokens/s; B/s
DISK = 1.0e9  # B/s at which a host writes a checkpoint
# Hours that a chip runs until it, or what it hangs on, fails. Source: Grattafiori et al. 2024 (Llama 3), 3.3.4: 419 unexpected
# interruptions of 16,384 GPUs in 54 days.
CHIP_HOURS = 16_384 * 54 * 24 / 419
_ROW_BYTES = 44  # beside its activations, of the shard that is written: squares, norms, token, mask
_GB = 1e9


def make_plan(config: Config, topology: str | None = None, *, compiled: bool = False) -> dict:
    """What a config needs: on this topology, or without one only which topologies it fits.

    compiled: also compile the step for the topology.
    Raises `ConfigError`: unknown topology; a mesh, batch or dictionary that does not divide (with the nearest that do); a
    dictionary that cannot fit (by how much, what would).
    """
    chosen = None if topology is None else hardware.parse(topology)
    if chosen is not None:
        dtype = hardware.compute_dtype(config.train.compute_dtype, chosen.chip.platform)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, compute_dtype=dtype))
    source = find(config)
    spec = SAESpec.from_options(config.sae, source.widths, config.train.compute_dtype)
    plan = {"schema_version": SCHEMA_VERSION, "sae": _sae(config, spec), "harvest": _harvest(config, spec, source)}
    if chosen is not None:
        mesh = mesh_on(config, spec, chosen)
        plan |= on_topology(config, spec, chosen, *mesh)
        if source.lm_flops is not None:
            plan["harvest"] |= _harvest_time(config, source, plan["harvest"], chosen)
        if compiled:  # whether it fits is then the compiler's word
            plan["compiled"] = compile_step(config, spec, chosen, *mesh)
        else:
            _check_fits(config, spec, chosen, plan)
    plan["fits"] = fitting(config, spec)
    if not plan["fits"]:
        raise ConfigError(f"config.sae.d_sae: {config.sae.d_sae} features of width {spec.d_in} fit none of the known topologies "
                          "over which config.train.batch and config.sae.d_sae divide; " + _advice(config))
    return plan


def mesh_on(config: Config, spec: SAESpec, topology: Topology) -> tuple[int, int]:
    """(data, dict) that training would have on so many devices: `config.mesh`, or the best shape where it leaves both open."""
    n, mesh = topology.size, config.mesh
    if (mesh.data, mesh.dict) == (-1, -1):
        return step_cost.best_mesh(config, spec, topology)
    possible = step_cost.shapes(n, config.train.batch, config.sae.d_sae)
    best = possible and "{}x{}".format(*step_cost.best_mesh(config, spec, topology))
    try:
        data, dict_ = sharding.mesh_sizes(mesh, n)
        sharding.check_divides(config.train.batch, config.sae.d_sae, data, dict_, config.train.accumulate)
    except ConfigError as error:
        raise ConfigError(f"{error}; of the {n} chips of {topology.name} the shapes data x dict that divide all are "
                          f"{_nearest(possible, mesh)}" + (f", the best by the model {best}" if best else "")) from None
    return data, dict_


def _nearest(possible: list[tuple[int, int]], mesh: MeshOptions) -> str:
    wanted = mesh.dict if mesh.dict > 0 else mesh.data
    side = 1 if mesh.dict > 0 else 0
    near = sorted(possible, key=lambda shape: abs(math.log(shape[side] / wanted)))[:3]
    return ", ".join(f"{data}x{dict_}" for data, dict_ in near) or "none"


def on_topology(config: Config, spec: SAESpec, topology: Topology, data: int, dict_: int) -> dict:
    """Memory, collectives and time of a step on a mesh of this topology."""
    state = abstract_state(config, spec, AbstractMesh((data, dict_), ("data", "dict"), axis_types=(AxisType.Explicit,) * 2))
    kept, platform = step_cost.state_bytes(state), topology.chip.platform
    work = Work.of(config, spec, data, dict_, topology.chip)
    memory = kept | {name: round(size) for name, size in step_cost.working(work, platform).items() if size}
    total, usable = sum(memory.values()), round(step_cost.USABLE * topology.chip.memory)
    moved = step_cost.collectives(work, platform)
    where = {"name": topology.name, "chips": topology.size, "mesh": {"data": data, "dict": dict_},
             "path": "sparse" if work.pairs else "dense, in tiles" if work.tiled else "dense"}
    best = step_cost.best_mesh(config, spec, topology)
    if best != (data, dict_):
        rate = timing(config, Work.of(config, spec, *best, topology.chip), topology)["tokens_per_second"]
        where["best"] = {"data": best[0], "dict": best[1], "tokens_per_second": rate}
    time = timing(config, work, topology)
    return {"topology": where,
            "memory": {"by_kind": memory, "total": total, "usable": usable, "fits": total <= usable},
            "flops": {"per_step_per_chip": round(step_cost.flops(work)),
                      "per_token": round(step_cost.flops(work) * work.chips / work.rows)},
            "collectives": [dataclasses.asdict(c) for c in moved],
            "collective_bytes": dict(Counter({a: sum(c.bytes for c in moved if c.axis == a) for a in ("dict", "data")})),
            "time": time, "checkpoint": _checkpoint(config, sum(kept.values()), dict_, topology, time["tokens_per_second"])}


def timing(config: Config, work: Work, topology: Topology) -> dict:
    """Seconds of a step by what takes them, and what follows: tokens/s, days, the rate at which the store is read."""
    parts, row = step_cost.seconds(work, topology), 2 * work.row_width
    fed = work.rows * row / topology.size / topology.chip.host
    step = max(sum(parts.values()), fed)
    sources, rate = parts | {"rows from the host": fed}, work.rows / step
    dead = step_cost.aux_seconds(work, topology)
    return {"seconds": parts, "aux_seconds": {str(most): value for most, value in dead.items()}, "step_seconds": step,
            "input_seconds": fed, "bound": max(sources, key=sources.__getitem__),
            "step_seconds_at_peak": sum(step_cost.seconds(work, topology, at_peak=True).values()),
            "tokens_per_second": rate, "store_bytes_per_second": rate * row, "input": _input(config, row, rate, topology),
            "steps": math.ceil(config.train.tokens / work.rows), "days": config.train.tokens / rate / 86_400}


def _checkpoint(config: Config, kept: int, dict_: int, topology: Topology, rate: float) -> dict:
    """What saving costs, and what a failure does: on average half of what was trained since the checkpoint before is lost.

    The step waits while the state is copied to the hosts. The interval with the least loss is sqrt(2 x that x the time between
    failures). Source: Young 1974, "A first order approximation to the optimum checkpoint interval".
    """
    size, stall, interval = kept * dict_, kept / topology.chip.host, config.checkpoint.every_tokens / rate
    between = CHIP_HOURS * 3600 / topology.size
    best = math.sqrt(2 * stall * between)
    return {"bytes": size, "write_seconds": size / (topology.hosts * DISK), "stall_seconds": stall,
            "interval_seconds": interval, "failure_seconds": between, "lost": stall / interval + interval / 2 / between,
            "best_every_tokens": round(best * rate), "best_lost": stall / best + best / 2 / between}


def _input(config: Config, row: int, rows_per_second: float, topology: Topology) -> dict:
    """What every host reads of the store, and holds of it: two windows of each of its lanes, and a batch."""
    rows, batch = order.of_a_large_store(config), config.train.batch
    over = order.amplification(batch, rows.lanes, topology.hosts)
    here = math.ceil(rows.lanes * over / topology.hosts)
    size = batch // rows.lanes
    return {"hosts": topology.hosts, "lanes": rows.lanes, "read_over": over,
            "bytes_per_second_and_host": row * rows_per_second * over / topology.hosts,
            "host_bytes": rows.batches_held(size) * here * size * row, "contexts_of_a_batch": order.contexts_of_a_batch(config)}


def fitting(config: Config, spec: SAESpec) -> list[dict]:
    """Of every chip the smallest topologies that a config fits, each on its best mesh: the smallest three."""
    out, found = [], Counter()
    for topology in hardware.every():
        if found[topology.chip.name] == 3 or not step_cost.shapes(topology.size, config.train.batch, config.sae.d_sae):
            continue
        data, dict_ = step_cost.best_mesh(config, spec, topology)
        work = Work.of(config, spec, data, dict_, topology.chip)
        if step_cost.fits(work, topology.chip):
            found[topology.chip.name] += 1
            time = timing(config, work, topology)
            used = step_cost.state_size(work) + sum(step_cost.working(work, topology.chip.platform).values())
            out.append({"topology": topology.name, "chips": topology.size, "mesh": {"data": data, "dict": dict_},
                        "bytes_per_chip": round(used), "tokens_per_second": time["tokens_per_second"], "days": time["days"]})
    return out


def _check_fits(config: Config, spec: SAESpec, topology: Topology, plan: dict) -> None:
    memory = plan["memory"]
    if memory["fits"]:
        return
    mesh = plan["topology"]["mesh"]
    over = (memory["total"] - memory["usable"]) / _GB
    would = []
    best = step_cost.best_mesh(config, spec, topology)
    if step_cost.fits(Work.of(config, spec, *best, topology.chip), topology.chip):
        would.append(f"the mesh {best[0]}x{best[1]} fits")
    larger = [option["topology"] for option in fitting(config, spec) if option["topology"].split(":")[0] == topology.chip.name]
    would += [f"the smallest {topology.chip.name} that fits is {larger[0]}"] if larger else []
    would += [f"the largest dictionary here is about {_largest(config, spec, topology, mesh):,} features"]
    raise ConfigError(f"config.sae.d_sae: {config.sae.d_sae:,} features of width {spec.d_in} need {memory['total'] / _GB:.1f} GB "
                      f"on each chip of {topology.name} (mesh {mesh['data']}x{mesh['dict']}), {over:.1f} GB more than the "
                      f"{memory['usable'] / _GB:.1f} GB that arrays can have; {'; '.join(would)}; {_advice(config)}")


def _largest(config: Config, spec: SAESpec, topology: Topology, mesh: dict) -> int:
    """The largest multiple of 1,024 x dict features that fits this mesh."""
    step, work = 1024 * mesh["dict"], Work.of(config, spec, mesh["data"], mesh["dict"], topology.chip)
    low, high = 0, max(1, config.sae.d_sae // step)
    while low < high:
        middle = (low + high + 1) // 2
        if step_cost.fits(dataclasses.replace(work, d_sae=middle * step), topology.chip):
            low = middle
        else:
            high = middle - 1
    return low * step


def _advice(config: Config) -> str:
    own = "config.train.accumulate" if config.train.accumulate == 1 and not config.train.lazy else "a smaller config.train.batch"
    smallest = "lazy_bf16" if config.train.lazy else "second_bf16"
    state = f" config.train.optimizer = {smallest!r}," if config.train.state_bytes > 6 else ""
    return f"or take more chips, fewer features,{state} or {own} for less working memory"


def _sae(config: Config, spec: SAESpec) -> dict:
    state = abstract_state(config, spec, AbstractMesh((1, 1), ("data", "dict"), axis_types=(AxisType.Explicit,) * 2))
    return {"name": config.name, "kind": spec.kind, "shape": spec.shape, "d_in": spec.d_in, "d_out": spec.width_out,
            "d_sae": spec.d_sae, "k": spec.k, "batch": config.train.batch, "accumulate": config.train.accumulate,
            "compute_dtype": config.train.compute_dtype, "tokens": config.train.tokens,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            "state_bytes_per_parameter": round(step_cost.bytes_per_parameter(config, spec), 3)}


def _harvest(config: Config, spec: SAESpec, source: Source) -> dict:
    """The store's size, and what a harvested token costs against a trained one (FLOPs; the dense path's where it depends)."""
    harvested = config.harvest.tokens
    width = sum(source.widths.values())
    per_row = 2 * width + 4  # bfloat16 rows; token
    rows = config.text.context * contexts_of_shard(config.harvest.shard_bytes, config.text.context, width)
    batch = config.text.context * config.lm.batch_contexts
    chip = dataclasses.replace(hardware.CHIPS["v5e"], memory=math.inf)  # with room for all pre-activations
    train = step_cost.flops(Work.of(config, spec, 1, 1, chip)) / config.train.batch
    out = {"model": model_name(config.lm.model), "hookpoints": list(source.widths), "store_tokens": harvested,
           "store_bytes": harvested * per_row, "shards": math.ceil(harvested / rows),
           "host_bytes": 2 * 2 * width * (rows + batch) + _ROW_BYTES * rows,  # two shards, two batches
           "passes": config.train.tokens / harvested, "train_flops_per_token": round(train)}
    if source.lm_flops is not None:
        total = source.lm_flops * harvested
        out |= {"lm_flops_per_token": round(source.lm_flops), "lm_parameters": source.lm_params,
                "share_of_flops": total / (total + train * config.train.tokens)}
    return out


def _harvest_time(config: Config, source: Source, harvest: dict, topology: Topology) -> dict:
    """Seconds of a harvest: tokens come first, then the model and the writer work side by side."""
    speed = LM_SHARE * topology.chip.flops * (1.0 if config.lm.dtype == "bfloat16" else topology.chip.float32)
    cores = topology.hosts * (2 if topology.chip.platform == "cpu" else CORES)
    stages = {"tokenizer": config.harvest.tokens / (cores * TOKENIZED),
              "model": source.lm_flops * config.harvest.tokens / (speed * topology.size),
              "writer": harvest["store_bytes"] / (cores * WRITTEN)}
    return {"stage_seconds": stages, "slowest": max(stages, key=stages.__getitem__),
            "seconds": stages["tokenizer"] + max(stages["model"], stages["writer"])}
