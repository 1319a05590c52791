"""Several processes become one job: how they find each other, within a time limit, and whether they were given the same config.

Nothing here touches a device before `jax.distributed` has started; importing this module does not import jax.
"""

import hashlib
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Mapping

import numpy as np

from saejax.base.errors import ConfigError

START, HEARTBEAT = 300, 100  # seconds until all processes must have met; until a silent one counts as dead
EXIT_MISTAKE = 2


def announced(env: Mapping[str, str] = os.environ) -> str:
    """Who says that this is one of several processes: "Slurm" (a step of several tasks), "TPU workers" (GKE), "environment"
    (JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES, as launch/jobset.yaml sets them), or nobody ("").

    A Cloud TPU VM does not say it without asking the network: there the processes are named by hand (docs/how-to/launch.md).
    """
    if env.get("JAX_COORDINATOR_ADDRESS") and _count(env.get("JAX_NUM_PROCESSES")) > 1:
        return "environment"
    if _count(env.get("SLURM_STEP_NUM_TASKS")) > 1 and env.get("SLURM_PROCID"):
        return "Slurm"
    if "," in env.get("TPU_WORKER_HOSTNAMES", ""):
        return "TPU workers"
    return ""


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None, *,
          timeout: int | None = None, heartbeat: int | None = None) -> None:
    """Joins the job, before anything asks jax for its devices. What is not given comes from the environment or the cluster.

    timeout: seconds until all processes must be there, else this process says what is missing and leaves with code 2: jax itself
    would abort without a word that helps. heartbeat: seconds after which a process that died ends the others. Raises
    `ConfigError` when neither flags nor environment say where the others are.
    """
    import jax
    timeout, heartbeat = timeout or START, heartbeat or HEARTBEAT
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if num_processes is None and process_id is None and announced() == "environment":
        num_processes = _count(os.environ["JAX_NUM_PROCESSES"])
        process_id = _process_id()
    if coordinator is not None and not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[\w.\-]+):\d{1,5}", coordinator):
        raise ConfigError(f"coordinator={coordinator}: write HOST:PORT, for example localhost:29500")
    if None not in (num_processes, process_id) and not 0 <= process_id < num_processes:
        raise ConfigError(f"process_id={process_id}: the processes of num_processes={num_processes} are numbered from 0 to "
                          f"{num_processes - 1}")
    watch = threading.Timer(timeout, _give_up, (coordinator, num_processes, process_id, timeout))
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, initialization_timeout=timeout + 60,
                                   heartbeat_timeout_seconds=heartbeat)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"distributed: {' '.join(str(error).split())[:300]}; give coordinator, num_processes and "
                          "process_id") from error
    finally:
        watch.cancel()


def _count(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0


def _process_id() -> int:
    """JAX_PROCESS_ID, or the number that Kubernetes gives a pod of an indexed job."""
    for name in ("JAX_PROCESS_ID", "JOB_COMPLETION_INDEX"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    raise ConfigError("JAX_NUM_PROCESSES is set, but neither JAX_PROCESS_ID nor JOB_COMPLETION_INDEX says which process this is; "
                      "set one of them")


def _give_up(coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int) -> None:
    """Says why the processes have not met, and ends this one: nothing else interrupts the wait."""
    where = coordinator or "the coordinator"
    if process_id == 0:
        reason = f"not all {num_processes} processes came to {where}; start the others, or correct num_processes"
    elif coordinator is not None and not _answers(coordinator):
        reason = f"nothing answers at {coordinator}; is process 0 running there, and may this machine reach that port?"
    else:
        reason = f"{where} answers, but the job is not complete; are all processes running, each with a number of its own?"
    print(f"saejax: error: distributed: no job after {timeout} s: {reason}", file=sys.stderr, flush=True)
    os._exit(EXIT_MISTAKE)


def _answers(address: str) -> bool:
    host, port = address.rsplit(":", 1)
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=3):
            return True
    except OSError:
        return False


def check_agreement(values: Mapping[str, object],
                    advice: str = "start all of them with the same config, flags and version") -> None:
    """Raises `ConfigError` in every process when not all of them have the same values, naming keys and processes.

    values: by config key (or other names), anything with a `repr` that does not depend on the machine. Two small collectives.
    advice: what to do about it.
    """
    import jax
    if jax.process_count() == 1:
        return
    names = sorted(values)
    # First the names: with another version of the program the values would not even line up.
    _raise_unless_equal(_gathered([_digest("\n".join(names))]), ["what was given (another version of saejax?)"], advice)
    _raise_unless_equal(_gathered([_digest(repr(values[name])) for name in names]), names, advice)


def gathered(value) -> list:
    """What every process has, plain JSON, in the order of the processes: numbers exactly. A collective."""
    import jax
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array(len(data), np.int32))).ravel()
    all_PN = np.asarray(multihost_utils.process_allgather(np.pad(data, (0, int(sizes.max()) - len(data)))))
    return [json.loads(row[:size].tobytes()) for row, size in zip(all_PN.reshape(len(sizes), -1), sizes, strict=True)]


def summed_over_processes(value: np.ndarray) -> np.ndarray:
    """The sum of a small array over all processes, of which all but one have zeros in each place. One small collective."""
    import jax
    return _gathered(value).sum(0, dtype=value.dtype) if jax.process_count() > 1 else value


def _digest(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


def _gathered(values: list[int] | np.ndarray) -> np.ndarray:
    """[processes, ...] of every process's values."""
    from jax.experimental import multihost_utils
    return np.asarray(multihost_utils.process_allgather(np.asarray(values, np.uint32)))


def _raise_unless_equal(all_PN: np.ndarray, names: list[str], advice: str) -> None:
    different = (all_PN != all_PN[0]).any(0)
    if not different.any():
        return
    others = ", ".join(str(i) for i in np.flatnonzero((all_PN != all_PN[0]).any(1))[:8])
    keys = [name for name, wrong in zip(names, different, strict=True) if wrong]
    named = f"{', '.join(keys[:5])}{' and others' if len(keys) > 5 else ''}"
    raise ConfigError(f"{named}: not the same in all {len(all_PN)} processes "
                      f"(process {others} differs from process 0); {advice}")
