"""Each term of the plan's step time against the piece of the step that it stands for: python benchmarks/plan_terms.py

    [--shapes 768:16384:1024:32 768:65536:512:32] [--repeats 20]

A shape is width : features : rows : k, of `topk` on the sparse path on one device, the one that is here. Prints a Markdown table:
milliseconds of the piece alone, at best of the repeats; of CPU time of all cores beside them, which waits for no other process;
what `saejax.train.step_cost` says; measured over predicted. "all of these" is the sum of the terms of a step beside whole
training steps.
"""

import argparse
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import lax

from saejax.base import hardware, sharding
from saejax.bench.options import BenchOptions
from saejax.bench.training import Training
from saejax.sae import losses, pairs, row_gradients, sparse
from saejax.sae.objectives import read_rows
from saejax.sae.products import product
from saejax.sae.select import largest
from saejax.train import rows, step_cost
from saejax.train.step_work import Work

SHAPES = {"cpu": ("768:16384:1024:32", "768:65536:512:32"), "gpu": ("2304:131072:4096:64", "768:32768:8192:32")}


class Pieces:
    """The pieces of a step, each a program of its own, on what a step works on."""

    def __init__(self, training: Training):
        self.spec, here = training.spec, jax.sharding.SingleDeviceSharding(jax.devices()[0])  # and on no mesh
        self.state, self.rows = jax.tree.map(lambda value: jax.device_put(value, here), (training.state, training.rows))
        self.params = self.state.params
        self.config = step_cost.with_path(training.config, True)
        self.dtype, self.ends = jnp.dtype(self.spec.compute_dtype), (self.spec.d_sae,)
        self.batch = row_gradients.parts_of(self.spec, self.params, self.rows, 1)
        self.x_BD = self.batch.read(0)
        self.pairs = jax.jit(self.selected)(self.params, self.x_BD)
        self.error_BD = jax.random.normal(jax.random.key(1), (training.batch, self.spec.width_out)) * 1e-3
        self.room = row_gradients.room_for(self.spec, training.batch * self.spec.k)
        self.fired_F = sparse.fired(self.spec, self.pairs)

    def selected(self, params, x_BD):
        return sparse.selected(self.spec, params, x_BD, self.spec.k)

    def encoder(self, W_enc) -> sparse._Encoder:
        tile = sparse.tile_size(self.spec.d_sae, jax.default_backend())
        return sparse._Encoder(W_enc, self.params.b_enc, jnp.ones_like(self.params.b_enc, bool), self.dtype, tile)

    def timed(self) -> Iterator[tuple[tuple[str, ...], Callable, tuple]]:
        """(terms, function, arguments)."""
        W_enc, W_dec = (value.astype(self.dtype) for value in (self.params.W_enc, self.params.W_dec))

        def multiplied(W_enc, x_BD):
            encoder = self.encoder(W_enc)
            return lax.map(lambda x_TD: lax.optimization_barrier(product("td,fd->tf", x_TD, W_enc, self.dtype))[:, :1],
                           *encoder.tiles(x_BD))

        yield ("product", "tile re-reads"), multiplied, (W_enc, self.x_BD)
        pre = lax.map(lambda x_TD: product("td,fd->tf", x_TD, W_enc, self.dtype), *self.encoder(W_enc).tiles(self.x_BD))
        yield ("selection",), lambda pre, b: lax.map(lambda pre_TF: largest(pre_TF + b, self.spec.k), pre), (pre,
                                                                                                             self.params.b_enc)
        del pre
        yield ("product", "tile re-reads", "selection"), self.selected, (self.params.replace(W_enc=W_enc), self.x_BD)
        yield ("decode",), lambda *given: pairs.decoded(self.dtype, *given, self.ends), (W_dec, self.pairs)
        yield ("value gradients",), lambda *given: pairs.slopes(self.dtype, *given, self.ends), (W_dec, self.error_BD[None],
                                                                                               self.pairs)
        yield ("two weight gradients",), self.summed, (self.parts(), self.fired_F)
        yield ("input",), self.read, (self.params, self.rows)

    def parts(self):
        slopes = pairs.slopes(self.dtype, self.params.W_dec, self.error_BD[None], self.pairs, self.ends)
        of_part = pairs.Backward(self.pairs, slopes, self.x_BD, self.error_BD[None].astype(self.dtype), self.dtype, self.ends)
        return jax.tree.map(lambda value: value[None], of_part)

    def summed(self, parts, fired_F):
        return sparse.weight_gradients(parts, sparse.rows_of(fired_F, self.room), False)

    def read(self, params, rows_BW):
        """Normalisation, what the encoder reads, the casts of both matrices, and the error of a reconstruction."""
        x_BW = self.state.normalization.apply(rows_BW)
        error_BD = x_BW - self.error_BD - params.b_dec
        casts = (params.W_enc.astype(self.dtype), params.W_dec.astype(self.dtype)) if self.dtype != jnp.float32 else ()
        return (read_rows(self.spec, params, x_BW), error_BD, losses.squared_error(x_BW, error_BD).sum(),
                losses.variance_total(x_BW), *casts)

    def moved(self, kept, fired_F, gradient):
        """Adam's update with clipping and the constraints, in place."""
        zero = jnp.float32(0)
        parts = losses.LossParts(zero, zero, zero, zero, fired_F, {}, zero)
        of_rows = row_gradients.RowGradients(fired_F, self.room, self.room, lambda rows: gradient)
        shared = self.params.replace(W_enc=None, b_enc=None, W_dec=None)
        step = rows.Step(self.config, self.spec, None, jnp.float32(1e-4), jnp.bool_(True))
        return rows.applied(step, *kept, rows.Gradient(shared, [of_rows]), parts)[:2]

    def dead(self, room: int):
        """AuxK of so many dead features, and its gradients."""
        def of(params, x_BD, error_BD, dead_F):
            batch = row_gradients.Batch(1, len(x_BD), None, lambda i: x_BD)
            dead = row_gradients.Dead(dead_F, error_BD[None])
            make = row_gradients.of_dead_in_room if room < self.spec.d_sae else row_gradients.of_many_dead
            aux, found = make(self.spec, self.config.sae, params, batch, dead, min(room, self.room))
            return aux, found.turn()

        return of, (self.params, self.x_BD, self.error_BD, jnp.arange(self.spec.d_sae) < room)


class Best:
    """The least milliseconds, and those of CPU time, of what runs inside it, over the repeats."""

    def __init__(self):
        self.wall = self.cpu = float("inf")

    def __enter__(self) -> None:
        self.start = time.perf_counter(), time.process_time()

    def __exit__(self, *_) -> None:
        wall, cpu = self.start
        self.wall, self.cpu = min(self.wall, time.perf_counter() - wall), min(self.cpu, time.process_time() - cpu)


def best(function: Callable, args: tuple, repeats: int) -> Best:
    """Of a call."""
    compiled, found = jax.jit(function), Best()
    jax.block_until_ready(compiled(*args))
    for _ in range(repeats):
        with found:
            jax.block_until_ready(compiled(*args))
    return found


def best_moved(pieces: Pieces, repeats: int) -> Best:
    """Of the optimizer, which changes parameters and moments in place."""
    spec, state, found = pieces.spec, pieces.state, Best()
    gradient = pieces.params.replace(**{name: jnp.full((pieces.room, width), 1e-5) for name, width in (
        ("W_enc", spec.d_in), ("W_dec", spec.width_out))}, b_enc=jnp.full(pieces.room, 1e-5), b_dec=None)
    compiled, kept = jax.jit(pieces.moved, donate_argnums=0), jax.tree.map(jnp.copy, (state.params, state.opt_state))
    kept = jax.block_until_ready(compiled(kept, pieces.fired_F, gradient))
    for _ in range(repeats):
        with found:
            kept = jax.block_until_ready(compiled(kept, pieces.fired_F, gradient))
    return found


def best_step(training: Training, repeats: int) -> Best:
    training.seconds("sparse", 1)
    found = Best()
    for _ in range(repeats):
        with found:
            training.seconds("sparse", 1)
    return found


def line(what: str, found: Best, seconds: float) -> None:
    figures = " | ".join(f"{1e3 * value:.3g}" for value in (found.wall, found.cpu, seconds))
    print(f"| {what} | {figures} | {found.wall / seconds:.2f} |", flush=True)


def table(shape: str, repeats: int) -> None:
    d_in, d_sae, batch, k = map(int, shape.split(":"))
    mesh, device = sharding.single_device_mesh(), jax.devices()[0]
    training = Training("topk", BenchOptions(d_in=d_in, d_sae=d_sae, batch=batch, k=k), mesh)
    print(f"\ntopk {d_in:,} to {d_sae:,}, {batch:,} rows, k = {k}, {training.spec.compute_dtype}, {device.device_kind}\n")
    print("| piece | measured, ms | CPU time, ms | predicted, ms | ratio |\n|---|---|---|---|---|")
    topology = hardware.present([device])
    work = Work.of(step_cost.with_path(training.config, True), training.spec, 1, 1, topology.chip)
    terms = step_cost.seconds(work, topology)
    pieces = Pieces(training)
    for names, function, args in pieces.timed():
        line(", ".join(names), best(function, args, repeats), sum(terms[name] for name in names))
    line("optimizer", best_moved(pieces, repeats), terms["optimizer"])
    for room, seconds in step_cost.aux_seconds(work, topology).items():
        line(f"AuxK, up to {room:,} dead features", best(*pieces.dead(room), repeats), seconds)
    del pieces
    line("all of these but AuxK: a whole step", best_step(training, repeats), sum(terms.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES.get(jax.default_backend(), SHAPES["gpu"]))
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    for shape in args.shapes:
        table(shape, args.repeats)
        jax.clear_caches()


if __name__ == "__main__":
    main()
