"""A program: one compiled step that trains one SAE, or several of equal shape at once (`vmap`) over the same rows."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from saejax import sharding
from saejax.config import Config
from saejax.sae import SAESpec
from saejax.train import determinism, optim
from saejax.train.member import Member
from saejax.train.state import TrainState
from saejax.train.step import Hyperparameters, one_step


def make_joint_step(configs: Sequence[Config], spec: SAESpec, total_steps: int):
    """`step(states, rows_BW) -> (states, metrics)` of SAEs whose configs differ in seed, name, directory and `Hyperparameters`.

    Every leaf of states and metrics has a leading axis, one entry per SAE, replicated over the mesh. Rows are normalised once:
    so the encoders of all SAEs are one matrix product. Branches are taken when any SAE needs them (`sharding.any_member`).
    """
    own_N = jax.tree.map(lambda *values: jnp.stack(values), *map(Hyperparameters.of, configs))

    def train_steps(states: TrainState, rows_BW: jax.Array):
        shared = jax.tree.map(lambda value_N: value_N[0], states.normalization)

        def of_one(own: Hyperparameters, state: TrainState):
            new, metrics = one_step(configs[0], spec, total_steps, own, state.replace(normalization=shared), rows_BW)
            return new.replace(normalization=state.normalization), metrics

        return jax.vmap(of_one, axis_name=sharding.MEMBERS)(own_N, states)

    return jax.jit(train_steps, donate_argnums=0, compiler_options=determinism.compiler_options(configs[0].train))


@jax.jit
def stacked(states: Sequence[TrainState]) -> TrainState:
    """One tree whose leaves have a leading axis, one entry per state."""
    return jax.tree.map(lambda *values: jnp.stack(values), *states)


@jax.jit
def lane_of(states: TrainState, lane: jax.Array) -> TrainState:
    """One entry of stacked states."""
    return jax.tree.map(lambda value: lax.dynamic_index_in_dim(value, lane, keepdims=False), states)


@functools.partial(jax.jit, donate_argnums=0)
def _with_lane(states: TrainState, state: TrainState, lane: jax.Array) -> TrainState:
    return jax.tree.map(lambda all_, one: lax.dynamic_update_index_in_dim(all_, one, lane, 0), states, state)


class Program:
    """Members that train in one step function, a lane each. The lanes stay as many as they were when a member ends before the
    others, so that the others' values do not depend on it: its lane idles.
    """

    def __init__(self, members: Sequence[Member], make: Callable):
        """make: `make_step` for one member, `make_joint_step` for several."""
        self.members, self._make, self._state = tuple(members), make, None
        self._step_fn = functools.lru_cache(maxsize=2)(self._compiled)
        first = members[0]
        self.spec, self.total = first.spec, first.total
        self.annealing = optim.annealing_steps(first.config.sae, first.config.train, self.total)

    @property
    def training(self) -> list[tuple[int, Member]]:
        """(lane, member) of those that are not at their end."""
        return [(lane, member) for lane, member in enumerate(self.members) if member.training]

    def load(self, states: Mapping[Member, TrainState]) -> None:
        """Takes the states of the members that train; the other lanes run with a copy that nobody reads."""
        idle = next(iter(states.values()), None)
        if idle is None or len(self.members) == 1:
            self._state = idle
        else:
            self._state = stacked([states.get(member, idle) for member in self.members])

    def step(self, number: int, rows_BW: jax.Array) -> dict[str, jax.Array]:
        """Dispatches a step and returns its metrics, of several members with a leading axis."""
        self._state, metrics = self._step_fn(number <= self.annealing)(self._state, rows_BW)
        return metrics

    def wait(self) -> None:
        """Until the devices have done every step that was dispatched."""
        jax.block_until_ready(self._state)

    def _compiled(self, annealing: bool):
        """The compiled step: while k falls one with room for `sae.k_start`, in which it is a value, then one of k features."""
        configs = [member.config for member in self.members]
        spec = dataclasses.replace(self.spec, k=configs[0].sae.k_start) if annealing else self.spec
        return self._make(configs[0] if len(configs) == 1 else configs, spec, self.total)

    def state_of(self, lane: int) -> TrainState:
        """The state of one member."""
        return self._state if len(self.members) == 1 else lane_of(self._state, jnp.int32(lane))

    def put(self, lane: int, state: TrainState) -> None:
        """Replaces the state of one member."""
        self._state = state if len(self.members) == 1 else _with_lane(self._state, state, jnp.int32(lane))
