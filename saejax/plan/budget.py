"""A budget of FLOPs, time or money, and a fitted law -> how large the dictionary, how long the run.

Among the runs that spend the whole budget, the one with the least loss of the law's surface is recommended. Under a budget of
time the steps of a run are the time over its predicted step time, which grows otherwise with the features than FLOPs do:
docs/how-to/plan.md says what follows. Shapes: C candidates.
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from saejax.base import hardware, sharding
from saejax.base.errors import ConfigError, ScalingError
from saejax.base.hardware import Topology
from saejax.config import Config
from saejax.config.recipes import WITH_K
from saejax.plan.law import Fitted, fitted
from saejax.plan.plan import mesh_on, timing
from saejax.plan.source import find
from saejax.sae import SAESpec
from saejax.scaling.laws import Laws, Optimum
from saejax.scaling.points import Point
from saejax.scaling.sums import Estimate, decades_beyond
from saejax.train import step_cost
from saejax.train.step_cost import USABLE, Work

SCHEMA_VERSION = 1
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_MONEY = ("usd", "eur", "$", "€")
_FLOPS = ("", "flop", "flops")
_LEAST_FLOPS = 1e9       # a number without a unit that is smaller was meant as something else
_FROM, _TO = 64, 2**30   # features of the candidates, four in each factor of 2
_FINE = 64               # between which the optimum is looked for in so many parts of a factor of 2


@dataclass(frozen=True)
class Budget:
    """What may be spent. kind: "flops", "time" (amount in seconds) or "money"."""

    given: str
    kind: str
    amount: float


@dataclass(frozen=True)
class Candidate:
    """A number of features. On a topology: the mesh, the time of a step, the bytes on a chip and whether they fit."""

    features: int
    mesh: tuple[int, int] | None = None
    step_seconds: float | None = None
    bytes_per_chip: int | None = None
    fits: bool = True


def read(text: str) -> Budget:
    """1e20 (FLOPs), 24h, 3d, 90m, 500usd. Raises `ConfigError`."""
    match = re.fullmatch(r"(\d+\.?\d*(?:e[+-]?\d+)?)\s*([a-z$€]*)", text.strip().lower().replace("_", ""))
    amount, unit = (float(match[1]), match[2]) if match else (math.nan, "")
    kind = "flops" if unit in _FLOPS else "time" if unit in _SECONDS else "money" if unit in _MONEY else None
    if match is None or kind is None or not 0 < amount < math.inf:
        raise ConfigError(f"budget={text}: not a budget; write FLOPs as 1e20, time as 24h, 3d or 90m, money as 500usd")
    if kind == "flops" and amount < _LEAST_FLOPS:
        raise ConfigError(f"budget={text}: a number without a unit is FLOPs, and these are too few; for time write {text}h")
    return Budget(text, kind, amount * _SECONDS[unit] if kind == "time" else amount)


def seconds_of(budget: Budget, topology: Topology | None, price: float | None) -> float | None:
    """How long the topology can be had; None for FLOPs. price: of a chip for an hour. Raises `ConfigError`."""
    if price is not None and budget.kind != "money":
        raise ConfigError(f"price={price:g}: has no effect on budget={budget.given}, which is not money; leave it out")
    if budget.kind == "flops":
        return None
    if topology is None:
        raise ConfigError(f"budget={budget.given}: how far it goes depends on the chips; give a topology, for example h200:8")
    if budget.kind == "time":
        return budget.amount
    if not price:
        raise ConfigError(f"budget={budget.given}: money takes a price above 0, what one chip costs for an hour")
    return budget.amount / (price * topology.size) * 3600


def recommend(config: Config, points: Iterable[Point], budget: Budget, *, topology: str | None = None,
              price: float | None = None, compute: str = "dense", leave_out: tuple[int, int] | None = None) -> dict:
    """What to train for a budget, as one JSON value. compute: "dense" or "sparse", the FLOPs of the law and of a budget of FLOPs.
    leave_out: (features, tokens); runs with at least so many of both do not count for the law.

    Raises `ConfigError`: a budget without the topology or price it takes, a batch or mesh that does not divide, nothing that
    fits; `ScalingError`: points that have no law, or not one of this recipe.
    """
    chosen = None if topology is None else hardware.parse(topology)
    seconds = seconds_of(budget, chosen, price)
    spec = SAESpec.from_options(config.sae, find(config).widths, config.train.compute_dtype)
    law = fitted(config, spec, points, compute=compute, leave_out=leave_out)
    laws: Laws = law.found.laws
    options = Options.of(budget, seconds, laws, _candidates(config, spec, chosen))
    best, taken = options.best(fitting=False), options.best()
    options.check_inside(best)
    one, steps = options.candidates[taken], int(options.steps_C[taken])
    spent = laws.cost.of_step(one.features) * steps
    features_law, steps_law = options.optimum(laws)
    return {"schema_version": SCHEMA_VERSION,
            "sae": {"name": config.name, "kind": config.sae.kind, "d_in": spec.d_in, "batch": config.train.batch,
                    "lr": config.train.lr},
            "budget": _spent(budget, seconds, chosen, price) | {"compute": spent},
            "law": _law(law, one.features, steps),
            "recommended": {"features": one.features, "steps": steps, "tokens": steps * law.batch,
                            "loss": laws.predict(one.features, steps)._asdict(),
                            "k": config.sae.k if config.sae.kind in WITH_K else None, "lr": _lr(law, spent)},
            "optimum": {"features": features_law._asdict(), "steps": steps_law._asdict()},
            "same_flops": [_of_flops("surface", laws.optimal(spent, by="surface"), True),
                           _of_flops("envelope", laws.optimal(spent), laws.has_offset)],
            "topology": None if chosen is None else _on(chosen, one, steps, law.batch),
            "without_memory_limit": None if taken == best else options.told(best),
            "harvest": {"tokens": steps * law.batch, "config_tokens": config.harvest.tokens,
                        "passes": steps * law.batch / config.harvest.tokens}}


@dataclass(frozen=True, eq=False)
class Options:
    """The candidates that a budget pays at least one step of, with the steps that it pays and the loss that the surface says."""

    budget: Budget
    seconds: float | None
    candidates: list[Candidate]
    steps_C: np.ndarray
    loss_C: np.ndarray

    @classmethod
    def of(cls, budget: Budget, seconds: float | None, laws: Laws, candidates: list[Candidate]) -> "Options":
        """Raises `ScalingError` where the budget pays for next to nothing."""
        steps_C = np.array([budget.amount / laws.cost.of_step(c.features) if seconds is None else seconds / c.step_seconds
                            for c in candidates])
        paid = [(c, steps) for c, steps in zip(candidates, steps_C, strict=True) if steps >= 1]
        if len(paid) < 3:
            raise ScalingError(f"budget={budget.given}: pays for no step of more than {candidates[0].features:,} features")
        loss_C = np.array([laws.predict(c.features, steps).value for c, steps in paid])
        return cls(budget, seconds, [c for c, _ in paid], np.array([steps for _, steps in paid]), loss_C)

    def best(self, fitting: bool = True) -> int:
        """Which candidate has the least loss, of those that fit. Raises `ConfigError` where none does."""
        there = [i for i, candidate in enumerate(self.candidates) if candidate.fits or not fitting]
        if not there:
            raise ConfigError(f"budget={self.budget.given}: not even {self.candidates[0].features:,} features fit these chips; "
                              "take more of them, or a smaller config.train.batch")
        return min(there, key=self.loss_C.__getitem__)

    def check_inside(self, best: int) -> None:
        """Raises `ScalingError` where the loss has no bottom among the candidates."""
        if best in (0, len(self.candidates) - 1):
            raise ScalingError(f"budget={self.budget.given}: the law has no optimum between {self.candidates[0].features:,} and "
                               f"{self.candidates[-1].features:,} features")

    def optimum(self, laws: Laws) -> tuple[Estimate, Estimate]:
        """(features, steps) of the least loss between the candidates, whether it fits or not: step times lie on lines in logs
        between theirs.
        """
        u_C = np.log([c.features for c in self.candidates])
        u_F = np.linspace(u_C[0], u_C[-1], math.ceil((u_C[-1] - u_C[0]) / math.log(2) * _FINE))
        if self.seconds is None:
            return laws.least(np.exp(u_F), self.budget.amount / laws.cost.of_step(np.exp(u_F)))
        return laws.least(np.exp(u_F), np.exp(np.interp(u_F, u_C, np.log(self.steps_C))))

    def told(self, i: int) -> dict:
        """One candidate as plain JSON."""
        one = self.candidates[i]
        return {"features": one.features, "steps": int(self.steps_C[i]), "loss": float(self.loss_C[i]),
                "bytes_per_chip": one.bytes_per_chip}


def _candidates(config: Config, spec: SAESpec, topology: Topology | None) -> list[Candidate]:
    """4, 5, 6 and 7 times the powers of 2, rounded up to what the mesh divides."""
    least = max(_FROM, 4 * config.sae.k if config.sae.kind in WITH_K else 0)
    sizes = [m << e for e in range(4, 28) for m in (4, 5, 6, 7)]
    sizes = [n for n in sizes if least <= n <= _TO]
    if topology is None:
        return [Candidate(n) for n in sizes]
    unit, mesh = topology.size, config.mesh
    if (mesh.data, mesh.dict) != (-1, -1):
        unit = sharding.mesh_sizes(mesh, topology.size)[1]
    sizes = sorted({-(-n // unit) * unit for n in sizes})
    dtype = hardware.compute_dtype(config.train.compute_dtype, topology.chip.platform)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, compute_dtype=dtype))
    return [_on_topology(config, spec, topology, n) for n in sizes]


def _on_topology(config: Config, spec: SAESpec, topology: Topology, features: int) -> Candidate:
    config = dataclasses.replace(config, sae=dataclasses.replace(config.sae, d_sae=features))
    spec = dataclasses.replace(spec, d_sae=features)
    mesh = mesh_on(config, spec, topology)
    work = Work.of(config, spec, *mesh, topology.chip)
    used = step_cost.state_size(work) + sum(step_cost.working(work, topology.chip.platform).values())
    return Candidate(features, mesh, timing(config, work, topology)["step_seconds"], round(used),
                     step_cost.fits(work, topology.chip))


def _spent(budget: Budget, seconds: float | None, topology: Topology | None, price: float | None) -> dict:
    hours = None if seconds is None else seconds / 3600 * topology.size
    return {"given": budget.given, "kind": budget.kind, "seconds": seconds, "chip_hours": hours, "price": price}


def _law(law: Fitted, features: float, steps: int) -> dict:
    """What the recommendation rests on, and by how many powers of ten it lies outside of it."""
    laws, decades = law.found.laws, law.found.decades(features, steps)
    return {"compute": laws.compute, "loss_name": laws.loss_name, "points": laws.points, "fitted_range": list(laws.fitted_range),
            **{f"{name}_range": list(ends) for name, ends in law.found.ranges.items()}, "batch": law.batch, "lr": law.found.lr,
            "k": list(law.k), "differs": list(law.minor), "refused": list(law.found.refused),
            "decades": decades["budgets"], "features_decades": decades["features"], "steps_decades": decades["steps"]}


def _lr(law: Fitted, compute: float) -> dict:
    """By the law of the learning rate where there is one, else that of the law's runs."""
    rates = law.found.rates
    if rates is None:
        return {"value": law.found.lr, "low": None, "high": None, "by": "runs", "decades": None}
    fitted_range = rates.budgets[0].compute, rates.budgets[-1].compute
    return rates.law.at(compute)._asdict() | {"by": "law", "decades": decades_beyond(compute, fitted_range)}


def _of_flops(by: str, found: Optimum, offset: bool) -> dict:
    return {"by": by, "offset": offset, "decades": found.decades,
            **{name: getattr(found, name)._asdict() for name in ("features", "steps", "loss")}}


def _on(topology: Topology, candidate: Candidate, steps: int, batch: int) -> dict:
    data, dict_ = candidate.mesh
    return {"name": topology.name, "chips": topology.size, "mesh": {"data": data, "dict": dict_},
            "step_seconds": candidate.step_seconds, "tokens_per_second": batch / candidate.step_seconds,
            "bytes_per_chip": candidate.bytes_per_chip, "usable": round(USABLE * topology.chip.memory),
            "seconds": steps * candidate.step_seconds}
