"""SIGTERM and Ctrl-C become a question that a loop asks once a step; every process gets the same answer."""

import signal

import jax
import numpy as np


class Preemption:
    """Context manager; `requested(step)` is true once this job should save and leave.

    Under `jax.distributed` the runtime's own notifier is used (a Python handler installed after it would break the agreement
    between processes); in a single process SIGTERM and SIGINT set a flag, and a second one kills. The notifier agrees on one
    number, which no process has asked about yet, and answers yes to that one only: so questions are numbered one by one for as
    long as the program runs.
    """

    _asked = 0  # questions of this process

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

    def requested(self, step: int = 0) -> bool:
        """True when this step of the caller is the agreed last one. Several processes ask equally often, or `meet` afterwards."""
        if self._distributed:
            from jax.experimental import multihost_utils
            Preemption._asked += 1
            return multihost_utils.reached_preemption_sync_point(Preemption._asked)
        return self._signal is not None

    def meet(self) -> bool:
        """`requested` for processes that have not asked equally often before. A collective."""
        if self._distributed:
            from jax.experimental import multihost_utils
            Preemption._asked = int(multihost_utils.process_allgather(np.array(Preemption._asked)).max())
        return self.requested()
