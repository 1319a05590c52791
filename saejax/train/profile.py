"""A trace of some steps by `jax.profiler`, once in a run."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from saejax.base.logs import say
from saejax.base.storage import is_writer

SETTLED = 10  # steps after a start until those that are traced: compilation and first reads are over


def window(steps: int, start: int, total: int, every: int) -> range:
    """The steps to trace of a run that goes on after step `start`: `SETTLED` steps later, and where they fit between two
    checkpoints not across one. Fewer where the run has fewer; never its first step, which compiles.
    """
    first = start + SETTLED + 1
    checkpoint = -(-first // every) * every
    if first <= checkpoint < first + steps and steps + SETTLED <= every:
        first = checkpoint + SETTLED + 1
    first = max(start + 2, min(first, total - steps + 1))
    return range(first, min(first + steps, total + 1)) if steps else range(0)


class Profile:
    """Traces the steps of `window`. The first process writes, of its own devices; the others only keep step."""

    def __init__(self, folder: Path, steps: range, settle: Callable[[], None]):
        """folder: where there is a trace already, none is made. settle: waits until the devices have done all that they were
        given; called before the first of the steps and after the last, never else.
        """
        self.folder, self.steps, self.settle, self.running = folder, steps, settle, False
        if not (steps and is_writer()):
            self.steps = range(0)
        elif traces(folder):
            self.steps = range(0)
            say(f"{folder} holds a profile already; delete or rename it for another one")

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_) -> None:
        if self.running:
            self._stop()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step."""
        if number not in self.steps:
            yield
            return
        if not self.running:
            self._start()
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        if number == self.steps[-1]:
            self._stop()

    def _start(self) -> None:
        self.settle()
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call of the host: slow, and hides the rest
        jax.profiler.start_trace(self.folder, create_perfetto_trace=True, profiler_options=options)
        self.running = True

    def _stop(self) -> None:
        self.settle()
        jax.profiler.stop_trace()
        self.running, steps, self.steps = False, self.steps, range(0)
        say(f"profile of steps {steps[0]} to {steps[-1]}: open {traces(self.folder)[-1]} at https://ui.perfetto.dev, or "
            f"`pip install xprof && xprof --logdir={self.folder}` (docs/how-to/profiling.md)")


def traces(folder: Path) -> list[Path]:
    """The files for Perfetto of a directory, oldest first."""
    return sorted(folder.glob("plugins/profile/*/perfetto_trace.json.gz"))
