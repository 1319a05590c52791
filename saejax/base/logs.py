"""What a person and a machine see of a run: progress bars, JSONL, TensorBoard, optional Weights & Biases."""

import contextlib
import json
import logging
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from saejax.base.errors import ConfigError
from saejax.base.storage import disk_errors, is_writer, safe_name, write_bytes

LINE_SECONDS = 15.0  # between the lines of a progress bar that is no terminal's


def say(message: str) -> None:
    """One line to stderr, from one process, without tearing a progress bar."""
    if is_writer():
        tqdm.write(message, file=sys.stderr)


@contextlib.contextmanager
def one_line_of_retries(what: str) -> Iterator[None]:
    """Within it a hub that does not answer is one line about `what`, not two of the library's for every try. Whatever else the
    library says is shown.
    """
    said = False

    def shown(record: logging.LogRecord) -> bool:
        nonlocal said
        message = record.getMessage()
        if message.startswith("Retrying in") and not said:
            said = True
            say(f"{what}: the hub does not answer; trying again")
        return not (message.startswith("Retrying in") or "thrown while requesting" in message)

    logger = logging.getLogger("huggingface_hub.utils._http")
    logger.addFilter(shown)
    try:
        yield
    finally:
        logger.removeFilter(shown)


class Progress:
    """How far a piece of work is, with rate and time left: on a terminal a bar. On a pipe or in a file whole lines: one every
    `LINE_SECONDS`, also while nothing advances, and a last one.
    """

    def __init__(self, title: str, total: int | None, *, initial: int = 0, unit: str = "tok", enabled: bool = True):
        shape = {"total": total, "initial": initial, "unit": unit, "unit_scale": True}
        terminal = sys.stderr.isatty() or not (enabled and is_writer())
        self._bar = tqdm(**shape, desc=title, disable=not (enabled and is_writer()), dynamic_ncols=True, mininterval=0.5,
                         smoothing=0.1, file=sys.stderr) if terminal else _Lines(prefix=title, **shape)

    def advance(self, n: int, **shown) -> None:
        """Moves the bar by `n` units; `shown` values appear behind it."""
        if shown:
            self._bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items()}, refresh=False)
        self._bar.update(n)

    def shorten(self, n: int) -> None:
        """`n` units of the total will not come."""
        if self._bar.total is not None:
            self._bar.total -= n

    def close(self) -> None:
        self._bar.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class _Lines:
    """What `Progress` needs of a tqdm bar, in whole lines. A thread writes them, so that a long step shows some, too."""

    def __init__(self, total: int | None, initial: int, **shape):
        self.total, self._n, self._shape, self._start = total, initial, {"initial": initial, **shape}, time.monotonic()
        self._file, self._closing = sys.stderr, threading.Event()
        self._writer = threading.Thread(target=self._write_lines, name="saejax-progress", daemon=True)
        self._writer.start()

    def set_postfix(self, shown: dict[str, str], refresh: bool) -> None:
        self._shape["postfix"] = ", ".join(f"{name}={value}" for name, value in shown.items())

    def update(self, n: int) -> None:
        self._n += n

    def close(self) -> None:
        if not self._closing.is_set():
            self._closing.set()
            self._writer.join()
            self._write_line()

    def _write_lines(self) -> None:
        while not self._closing.wait(LINE_SECONDS):
            self._write_line()

    def _write_line(self) -> None:
        line = tqdm.format_meter(self._n, self.total, time.monotonic() - self._start, ncols=0, ascii=True, **self._shape)
        with contextlib.suppress(OSError, ValueError):  # nobody reads it: no reason to stop the work
            self._file.write(f"{line}\n")
            self._file.flush()


class MetricWriter:
    """Appends one JSON object per line, and the same scalars to TensorBoard and wandb. Only one process writes.

    A resumed run continues the same file: lines of steps after the resumed one are cut off first, so that `tokens_seen` is
    strictly increasing whatever happened before. At Weights & Biases it continues the run whose id is kept in `wandb_id` beside
    the file.
    """

    def __init__(self, jsonl: Path, *, tensorboard: Path | None = None, wandb_project: str = "", name: str = "",
                 config: dict | None = None, resume_step: int = 0):
        self._file = self._board = self._wandb = None
        self._start = time.monotonic()
        if not is_writer():
            return
        kept = [line for line in _lines(jsonl) if line["step"] <= resume_step] if resume_step else []
        write_bytes(jsonl, "".join(json.dumps(line) + "\n" for line in kept).encode())
        with disk_errors(jsonl):
            self._file = open(jsonl, "a", buffering=1)
        if tensorboard is not None:
            with disk_errors(tensorboard):
                self._board = _Board(tensorboard, resume_step)
        if wandb_project:
            self._wandb = _start_wandb(wandb_project, name, config or {}, jsonl.with_name("wandb_id"), resumed=resume_step > 0)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line {"step", **values}. Raises `DiskError` when the disk is full."""
        if self._file is None:
            return
        with disk_errors(self._file.name):
            self._file.write(json.dumps({"step": step, **{k: _plain(v) for k, v in values.items()}}) + "\n")
            if self._board is not None:
                self._board.write(step, values)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        sinks = ((self._file, "close"), (self._board, "close"), (self._wandb, "finish"))
        with contextlib.ExitStack() as closing:
            for sink, close in sinks:
                if sink is not None:
                    closing.enter_context(disk_errors("metrics"))
                    closing.callback(getattr(sink, close))
        self._file = self._board = self._wandb = None


class _Board:
    """A TensorBoard event file, written as the values come: a thread that meets a full disk would leave the others waiting."""

    def __init__(self, folder: Path, resume_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        if resume_step:  # what is there of later steps no longer counts
            self._events.write_event(Event(step=resume_step + 1, file_version="brain.Event:2"))
            self._events.write_event(Event(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: dict[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary
        scalars = [Summary.Value(tag=key, simple_value=float(value)) for key, value in values.items()]
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    def close(self) -> None:
        self._events.close()


def _plain(value):
    value = float(value)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _start_wandb(project: str, name: str, config: dict, id_file: Path, *, resumed: bool):
    try:
        import wandb
    except ImportError as e:
        raise ConfigError(f"config.log.wandb: {project!r} needs the extra: pip install 'saejax[wandb]'") from e
    if not (resumed and id_file.is_file()):
        write_bytes(id_file, secrets.token_hex(8).encode())  # of its own: equal configs may run in many places
    run_id = safe_name(id_file.read_text(), ConfigError)
    # What is only shown or kept may differ between two starts of a run: config values are allowed to change.
    return wandb.init(project=project, name=name, config=config, id=run_id, resume="allow", allow_val_change=True)


def _lines(path: Path) -> list[dict]:
    if not path.exists():
        return []
    out = []
    for line in path.read_text().splitlines():
        try:
            out.append(json.loads(line))
        except ValueError:
            break  # a line torn by a crash: it and what follows are rewritten by the resumed run
    return out


def read_metrics(path: Path) -> list[dict]:
    """The metric lines of a run, oldest first; a torn last line is left out."""
    return _lines(Path(path))
