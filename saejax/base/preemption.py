"""SIGTERM and Ctrl-C become a question that a loop asks once a step; every process gets the same answer."""

import signal

import jax

from saejax.base.errors import SaejaxError

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: state is saved, start the same command again


class Preempted(SaejaxError):
    """The run was asked to stop and has saved its state; the command line exits with `EXIT_PREEMPTED`."""


class Preemption:
    """Context manager; `requested(step)` is true once this job should save and leave.

    Under `jax.distributed` the runtime's own notifier is used (a Python handler installed after it would break the agreement
    between processes); in a single process SIGTERM and SIGINT set a flag, and a second one kills.
    """

    def __init__(self):
        self._distributed = jax.distributed.is_initialized()
        self._signal: int | None = None
        self._old: dict[int, object] = {}

    def __enter__(self):
        if not self._distributed:
            try:
                self._old = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
            except ValueError:  # not the main thread (a notebook server, a test): signals are somebody else's
                self._old = {}
        return self

    def _handle(self, number, _frame):
        self._signal = number
        signal.signal(number, self._old.get(number) or signal.SIG_DFL)

    def __exit__(self, *_):
        for number, old in self._old.items():
            signal.signal(number, old)

    @property
    def asked_alone(self) -> bool:
        """True once a job of a single process was asked to leave; several processes leave together, at a `requested` step."""
        return self._signal is not None

    def requested(self, step: int) -> bool:
        """True when this step is the agreed last one. With several processes: a collective, once per step."""
        if self._distributed:
            from jax.experimental import multihost_utils
            return multihost_utils.reached_preemption_sync_point(step)
        return self._signal is not None
