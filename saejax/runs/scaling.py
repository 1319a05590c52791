"""A scaling study: every SAE of a sweep trained, measured on held-out text, and kept as a point.

The points lie in `<run_dir>/points.json`. A run that has one is not touched again: a study can be made in pieces, its grid can
grow, and of what was measured only the points have to be kept.
"""

import dataclasses
import gc
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from saejax.base import hardware, lease
from saejax.base.errors import ConfigError, ScalingError
from saejax.base.logs import say
from saejax.base.records import MeshOptions, RunPaths
from saejax.base.storage import decided, is_writer, write_json
from saejax.config import Config
from saejax.data.manifest import spec_digest
from saejax.data.order import RowOrder
from saejax.data.store import Store, is_complete
from saejax.runs.evaluation import evaluated_all
from saejax.runs.everything import subject_of
from saejax.runs.experiment import harvested, preflight, trained
from saejax.runs.subject import forget_language_model
from saejax.sae import SAESpec
from saejax.scaling.points import Point, parsed_recipe, read_points, recipe_of
from saejax.scaling.recipe import recipe, sizes
from saejax.scaling.sweep import is_sweep, members
from saejax.train.checkpoint import steps_in
from saejax.train.compilation_cache import kept
from saejax.train.member import Outcome, settled, total_steps
from saejax.train.step_cost import Work, flops, mesh_options

POINTS = "points.json"


def measured_points(config: Config, *, limit: int | None = None, epochs: bool = False) -> list[Point]:
    """The points of a study: those that are there, and of the runs of its sweep that have none yet the `limit` shortest
    (None: all), which are trained to their end and measured. A run that was stopped for its loss is a point, too, with
    the reason.

    epochs: a store that is shorter than the longest run is meant, and is read several times. Raises `ConfigError` for a config
    without a sweep and for a store that is too short, `ScalingError` for points of another config.
    """
    if not is_sweep(config):
        raise ConfigError("config.sweep: is empty, and a scaling study is a sweep; vary sae.d_sae and train.tokens, as in "
                          "configs/scaling_smollm2.py")
    grid, file = [settled(member) for member in members(config)], Path(config.run_dir) / POINTS
    points = {point.run: point for point in (read_points(file) if file.is_file() else [])}
    for member in grid:
        _check_same(points.get(_name(member)), member, file)
    waiting = sorted((member for member in grid if _name(member) not in points), key=_length)
    chosen = waiting[:limit]
    if not chosen:
        return list(points.values())
    preflight(config, [dataclasses.replace(member, mesh=_mesh(grid)) for member in waiting])
    if not (epochs or is_complete(config.harvest.store)):
        _check_length(grid, _once(config, *_of_text(config)))
    with lease.writing(config.run_dir), kept(Path(config.run_dir)):
        say("1/3 harvest")
        store = harvested(config)
        gc.collect()  # the language model's weights, before the training state needs the memory
        if not epochs:
            _check_length(grid, _once(config, store.rows, store.kept_rows))
        say(f"2/3 train: {len(chosen)} of {len(waiting)} runs that have no point yet")
        parts = _rounds([dataclasses.replace(member, mesh=_mesh(grid, store.width)) for member in chosen])
        outcomes = [outcome for part in parts for outcome in trained(config, part, store)]
        gc.collect()
        say("3/3 evaluate")
        for point in _measured(outcomes, store):
            points[point.run] = point
            if is_writer():
                write_json(file, [point.to_json() for point in points.values()])
    return list(points.values())


def _measured(outcomes: Sequence[Outcome], store: Store):
    """A point of every run, those that were stopped first; what is done is evaluated in one pass."""
    for outcome in outcomes:
        if outcome.trouble:
            config = outcome.config
            yield _point(config, store, loss=None, loss_name="", alive=None, dead_fraction=None,
                         dead_tokens=config.eval.contexts * config.text.context,
                         diverged=f"loss or gradient not finite, stopped at step {outcome.step}")
    for subject, evaluation in evaluated_all([subject_of(outcome) for outcome in outcomes if not outcome.trouble]):
        tokens, text = evaluation["tokens"], evaluation.get("measured_on", "held-out text")
        yield _point(subject.config, store, loss=evaluation["fvu"], loss_name=f"FVU on {tokens:,} tokens of {text}",
                     alive=subject.sae.cfg.d_sae - evaluation["density_histogram"]["never"],
                     dead_fraction=evaluation["dead_fraction"], dead_tokens=tokens)
        del subject  # its dictionary, before the next one's
    forget_language_model()


def _point(config: Config, store: Store, **measured) -> Point:
    """A run's sizes and compute beside what was measured.

    Dense FLOPs: 2 (2 D_in + 3 D_out) F a row, so 10 B D F a step. Sparse: those of the sparse path (`step_cost.flops`), whether
    the run took it or not; None for kinds that have none. The store counts by what its rows are, not by how many: one that grew
    for longer runs is the same recipe.
    """
    widths = {hookpoint: store.width(hookpoint) for hookpoint in config.sae.hookpoints}
    spec = SAESpec.from_options(config.sae, widths, config.train.compute_dtype)
    work, steps = Work.of(config, spec, 1, 1, hardware.chip_of(jax.local_devices()[0])), total_steps(config)
    sparse = flops(dataclasses.replace(work, pairs=True)) if work.k and work.decodes == 1 else None
    return Point(
        run=_name(config), recipe=recipe_of(recipe(config) | {"store": spec_digest(store.spec)}), d_in=spec.d_in, steps=steps,
        **sizes(config),
        flops_dense=float(steps * work.rows * spec.d_sae * (4 * spec.d_in + 6 * spec.width_out)),
        flops_sparse=None if sparse is None else steps * sparse, **measured)


def _check_same(point: Point | None, config: Config, file: Path) -> None:
    """Raises `ScalingError` where the point of a run is of another config."""
    if point is None:
        return
    wanted = {**recipe(config), **sizes(config), "steps": total_steps(config)}
    found = {**parsed_recipe(point.recipe), **{name: getattr(point, name) for name in (*sizes(config), "steps")}}
    different = [f"{key}: {found.get(key)!r} -> {value!r}" for key, value in wanted.items() if found.get(key) != value]
    if different:
        raise ScalingError(f"{file}: the point of {point.run!r} is of another config ({'; '.join(different)}); choose another "
                           "config.run_dir, or delete the file and the run")


def _check_length(grid: Sequence[Config], rows: int) -> None:
    longest = max(total_steps(member) * member.train.batch for member in grid)
    if rows < longest:
        raise ConfigError(f"config.harvest.tokens: the store gives {rows:,} rows once and the longest run takes {longest:,}; it "
                          "would see rows again that shorter runs see once. Harvest more, or allow several epochs (epochs)")


def _once(config: Config, rows: int, kept_rows: int) -> int:
    """Rows of a store that a stream hands out before its first lane begins anew."""
    order = RowOrder.for_batches(rows, config.text.context, config.stream, config.train.batch)
    return kept_rows * order.lanes * min(map(order.blocks_of, range(order.lanes))) // order.n_blocks


def _of_text(config: Config) -> tuple[int, int]:
    """(rows of the store that a config makes, those that are not masked) at most: where the text does not end early."""
    contexts = -(-config.harvest.tokens // config.text.context)
    return contexts * config.text.context, contexts * (config.text.context - ("first" in config.text.mask))


def _rounds(configs: Sequence[Config]) -> list[list[Config]]:
    """What trains side by side: runs of one length, shorter ones first, that stand at the same step."""
    def key(config: Config) -> tuple[int, int]:
        steps = steps_in(RunPaths(Path(config.run_dir)).checkpoints)
        return config.train.tokens, -decided(max(steps, default=0))

    keyed = [(key(config), config) for config in configs]
    return [[config for _, config in part] for _, part in itertools.groupby(sorted(keyed, key=lambda x: x[0]), lambda x: x[0])]


def _mesh(grid: Sequence[Config], width_of: Callable[[str], int] | None = None) -> MeshOptions:
    """The mesh that suits the largest dictionary and divides all: one, so that a point does not depend on what trained beside it.
    """
    largest = max(grid, key=lambda member: member.sae.d_sae)
    found = mesh_options(largest, jax.devices(), width_of)
    if (largest.mesh.data, largest.mesh.dict) != (-1, -1):
        return found
    parts = math.gcd(found.dict, *(member.sae.d_sae for member in grid))
    return MeshOptions(found.data * found.dict // parts, parts)


def _length(config: Config) -> tuple[int, int]:
    """By it runs are taken: those of one length read the store once."""
    return config.train.tokens, config.sae.d_sae


def _name(config: Config) -> str:
    return Path(config.run_dir).name
