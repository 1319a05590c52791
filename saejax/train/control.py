"""Running values that steer a run: the batch threshold, and the factor that brings a penalty's L0 to `train.target_l0`.

The controller is proportional-integral on where L0 is heading: e = log(L0 / goal) + T d log(L0) / d step, penalty =
lambda exp(P e + I sum e). The goal moves from the first L0 to the target over the first half of the steps, evenly in the
logarithm: a penalty that pulls at once kills features. L0 answers a change of the penalty late and, where thresholds integrate it
(jumprelu), for long; so e looks a tenth of the run ahead (T), and the integral is slow: it moves by 10 e over a run, at most 0.04
e per step. The slope is the difference of two running means of log L0, over at most 100 steps and 5 % of the run: one that
remembers the fall of the first half holds the penalty back when L0 has long stopped to fall.

Thresholds (jumprelu) integrate the penalty at their learning rate, which moves a logarithm by lr per step: some hundred steps are
over before any penalty has moved them. So the controller also moves all of them together, by REACH / steps of the run at most:
this brings a short run to its target, and is less than a published learning rate moves them by in a long one. The objective
`tanh` has thresholds so small that encoder biases decide what fires. These are moved at the end of the run only: biases that rise
while the penalty still grows let it grow far beyond what the L0 asks for, and the error is then a third larger.
"""

import jax
import jax.numpy as jnp

from saejax.config import Config
from saejax.config.recipes import WITH_K
from saejax.sae.params import SAESpec

PROPORTIONAL, INTEGRAL, FASTEST, AHEAD, APPROACH = 0.5, 10.0, 0.04, 0.1, 0.5
LONGEST, SHARE = 100, 0.05  # steps and share of a run that the longer mean of log L0 remembers; the shorter one a fifth of them
REACH, FULL = 4.0, 0.05  # how far log thresholds can be moved over a run; the error of log L0 from which they move at full speed
REACH_BIAS, FULL_BIAS, LATE = 3.0, 0.15, 0.2  # the same of biases, in bandwidths; the share of the run, its last, that moves them


def initial(config: Config) -> dict[str, jax.Array]:
    """The running values that a kind has, at step 0 (float32 scalars).

    threshold (batchtopk): what a release uses. log_l0, log_penalty: state of the controller.
    """
    names = ("threshold",) if config.sae.kind == "batchtopk" else ()
    if controlled(config):
        names = ("log_l0", "log_l0_long", "log_l0_first", "log_penalty")
    return {name: jnp.zeros((), jnp.float32) for name in names}


def controlled(config: Config) -> bool:
    """True where the penalty is steered; kinds with k are given `train.target_l0` as k instead."""
    return bool(config.train.target_l0) and config.sae.kind not in WITH_K


def penalty_factor(config: Config, moving: dict[str, jax.Array], target_l0: jax.Array, step: jax.Array,
                   total_steps: int) -> jax.Array:
    """What lambda is multiplied by at this step; 1 without a controller."""
    if "log_penalty" not in moving:
        return jnp.float32(1.0)
    error = jnp.where(step == 0, 0.0, _error(config, moving, target_l0, step, total_steps))
    return jnp.exp(PROPORTIONAL * error + moving["log_penalty"])


def shifts(config: Config, spec: SAESpec, moving: dict[str, jax.Array], target_l0: jax.Array, step: jax.Array,
           total_steps: int) -> dict[str, jax.Array]:
    """{parameter: what all its entries are raised by after this step}, empty but for jumprelu.

    Log thresholds by REACH / steps clip(log(L0 / goal) / FULL, -1, 1); with the objective `tanh` instead, in the last LATE of the
    run, encoder biases by -REACH_BIAS bandwidth / steps clip(log(L0 / goal) / FULL_BIAS, -1, 1).
    """
    if not controlled(config) or config.sae.kind != "jumprelu":
        return {}
    error = jnp.where(step == 0, 0.0, moving["log_l0"] - _log_goal(moving, target_l0, step / total_steps))
    if config.sae.objective == "tanh":
        error = jnp.where(step < (1 - LATE) * total_steps, 0.0, error)
        return {"b_enc": -REACH_BIAS * spec.bandwidth / total_steps * jnp.clip(error / FULL_BIAS, -1.0, 1.0)}
    return {"log_threshold": REACH / total_steps * jnp.clip(error / FULL, -1.0, 1.0)}


def _log_goal(moving: dict[str, jax.Array], target_l0: jax.Array, share: jax.Array) -> jax.Array:
    """log of the L0 aimed at after a share of the run: from the first L0 to the target over `APPROACH`, evenly."""
    remaining = jnp.clip(1 - share / APPROACH, 0.0, 1.0)
    return jnp.log(target_l0) + remaining * (moving["log_l0_first"] - jnp.log(target_l0))


def _error(config: Config, moving: dict[str, jax.Array], target_l0: jax.Array, step: jax.Array, total_steps: int) -> jax.Array:
    """e. jumprelu's objective `target_l0` pulls towards the target from both sides: there e is how far off L0 is, beyond 3 %."""
    short, long = _memories(total_steps)
    slope = (moving["log_l0"] - moving["log_l0_long"]) / (long - short)
    ahead = AHEAD * total_steps
    error = moving["log_l0"] + ahead * slope - _log_goal(moving, target_l0, (step + ahead) / total_steps)
    if config.sae.kind == "jumprelu" and config.sae.objective == "target_l0":
        error = jnp.abs(error) - 0.03
    return jnp.clip(error, -1.0, 1.0)


def _memories(total_steps: int) -> tuple[float, float]:
    """Steps that the shorter and the longer mean of log L0 remember."""
    longer = min(LONGEST, max(SHARE * total_steps, 10.0))
    return longer / 5, longer


def moved(config: Config, moving: dict[str, jax.Array], seen, step: jax.Array, target_l0: jax.Array,
          total_steps: int) -> dict[str, jax.Array]:
    """The running values after a step; seen: the batch's `LossParts`."""
    if "log_penalty" in moving:
        log_l0 = jnp.log(jnp.maximum(seen.l0, 0.01))
        moving = dict(moving)
        for name, steps in zip(("log_l0", "log_l0_long"), _memories(total_steps), strict=True):
            memory = jnp.minimum(1 - 1 / steps, step / (step + 1))
            moving[name] = memory * moving[name] + (1 - memory) * log_l0
        moving["log_l0_first"] = jnp.where(step == 0, log_l0, moving["log_l0_first"])
        gain = min(INTEGRAL / total_steps, FASTEST)
        log_penalty = moving["log_penalty"] + gain * _error(config, moving, target_l0, step, total_steps)
        return moving | {"log_penalty": jnp.clip(log_penalty, -12.0, 12.0)}
    if "threshold" not in moving:
        return moving
    return {"threshold": mean_of_least(moving["threshold"], seen.least, step, config.sae.threshold_beta)}


def mean_of_least(threshold: jax.Array, least: jax.Array, step: jax.Array, beta: float) -> jax.Array:
    """Exponential mean of `least`, the smallest kept activation of each batch (Bussmann et al. 2024); plain mean at first.

    beta grows as step / (step + 1) up to its final value, so that the first steps do not weigh more than later ones. A batch
    without any positive activation leaves the mean alone.
    """
    beta = jnp.minimum(beta, step / (step + 1))
    return jnp.where(jnp.isfinite(least), beta * threshold + (1 - beta) * least, threshold)
