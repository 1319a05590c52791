"""Two processes make tokens, harvest or train; one of them is killed; the other must end, and the same commands must then finish
with what they would have made undisturbed. For the campaign in `benchmarks/faults.py`, and for one trial in the tests.
"""

import json
import random
import string
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import saejax
from tests import tiny_experiment as tiny
from tests.processes import environment, free_port

STAGES = ("tokens", "harvest", "train")
HEARTBEAT = 10  # seconds after which a process that is not heard of counts as dead
_GRACE = 5
_WAIT = 240
_WITHIN = {"tokens": 1.0, "harvest": 4.0, "train": 3.0}  # seconds from the beginning of the stage
_SETTINGS = """c.text.holdout, c.harvest.tokens, c.harvest.shard_bytes = 0.02, 1_000_000, 200_000
c.stream.window_rows, c.mesh.data, c.train.batch, c.train.tokens = 8192, 2, 128, 128 * 300
c.checkpoint.every_tokens, c.log.every_steps = 128 * 25, 1
"""


def write_text(file: Path) -> Path:
    """Two million letters in documents of 20 words."""
    rng = random.Random(0)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 7))) for _ in range(2000)]
    file.write_text("".join(json.dumps({"text": " ".join(rng.choices(words, k=20))}) + "\n" for _ in range(18_000)))
    return file


@dataclass(frozen=True)
class Trial:
    """What became of it. at: what was there when process `killed` was killed; late: seconds until the other one had ended."""

    at: str
    killed: int
    late: float
    wrong: str


class Experiment:
    """A config for two processes, and what these make of it when nobody disturbs them."""

    def __init__(self, place: Path):
        self.place = place
        self.model, self.text = tiny.write_model(place / "model"), write_text(place / "text.jsonl")
        config = self._config("undisturbed")
        self.seconds = {}
        for job in ("harvest", "train"):
            began = time.monotonic()
            self._finish(job, config)
            self.seconds[job] = time.monotonic() - began
        self.run = place / "undisturbed"

    def _config(self, name: str) -> Path:
        return tiny.write_config(self.place / f"{name}.py", self.model, self.text, self.place / name, _SETTINGS)

    def _start(self, job: str, config: Path) -> list[subprocess.Popen]:
        port = free_port()
        command = [sys.executable, "-m", "saejax", job, f"--config={config}", "--distributed", "--num-processes=2",
                   f"--coordinator=127.0.0.1:{port}", f"--heartbeat={HEARTBEAT}"]
        return [subprocess.Popen([*command, f"--process-id={i}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                 env=environment(1)) for i in range(2)]

    def _finish(self, job: str, config: Path) -> None:
        jobs = self._start(job, config)
        try:
            errors = [each.communicate(timeout=_WAIT)[1] for each in jobs]
        finally:
            for each in jobs:
                each.kill()
        if any(each.returncode for each in jobs):
            raise AssertionError(f"{job} ended with {[each.returncode for each in jobs]}: " + "\n".join(e[-600:] for e in errors))

    def trial(self, stage: str, seed: int) -> Trial:
        """Kills one process a random time after the stage has begun."""
        rng = random.Random(f"{stage}-{seed}")
        name, job = f"{stage}{seed}", "train" if stage == "train" else "harvest"
        run, config, after, victim = self.place / name, self._config(name), rng.uniform(0, _WITHIN[stage]), rng.randrange(2)
        if stage == "train":
            self._finish("harvest", config)
        jobs = self._start(job, config)
        try:
            if not self._begun(stage, run, jobs):
                return Trial("", victim, 0.0, f"{stage} did not begin: {jobs[0].communicate()[1][-300:]}")
            time.sleep(after)
            jobs[victim].kill()
            killed, at = time.monotonic(), self._progress(run)
            self._begins_to_end(jobs[1 - victim])
            late = time.monotonic() - killed
        finally:
            for each in jobs:
                each.kill()
                each.communicate()
        wrong = [] if late <= HEARTBEAT + _GRACE else [f"the other one ended {late:.0f} s later"]
        try:
            for each in ("harvest", "train"):
                self._finish(each, config)
            wrong += self.differences(run)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            wrong.append(str(error))
        return Trial(at, victim, late, "; ".join(wrong))

    @staticmethod
    def _begun(stage: str, run: Path, jobs: list[subprocess.Popen]) -> bool:
        sign = {"tokens": "store/text/spec.json", "harvest": "store/shards/*.bin", "train": "metrics.jsonl"}[stage]
        deadline = time.monotonic() + _WAIT
        while time.monotonic() < deadline and all(job.poll() is None for job in jobs):
            if any(file.stat().st_size for file in run.glob(sign)):
                return True
            time.sleep(0.001)
        return False

    @staticmethod
    def _progress(run: Path) -> str:
        text = run / "store/text"
        if (metrics := run / "metrics.jsonl").exists():
            return f"{len(metrics.read_text().splitlines())} of 300 steps"
        if (text / "tokens.json").exists():
            return f"{len(list(run.glob('store/shards/*.bin')))} shards of 489"
        return f"{len(list(text.glob('part-*.json')))} parts of 64"

    @staticmethod
    def _begins_to_end(job: subprocess.Popen) -> None:
        try:
            job.communicate(timeout=3 * (HEARTBEAT + _GRACE))
        except subprocess.TimeoutExpired:
            pass

    def differences(self, run: Path) -> list[str]:
        """What is not as in the undisturbed run: bytes of the store, parameters, lines of metrics."""
        store, expected = ({file.relative_to(where).as_posix(): file.read_bytes() for file in (where / "store").rglob("*")
                            if file.is_file()} for where in (run, self.run))
        out = [f"{name} differs" for name in sorted(store.keys() | expected.keys()) if store.get(name) != expected.get(name)][:3]
        mine, theirs = (saejax.load(where).params for where in (run, self.run))
        out += [f"{name} differs" for name in ("W_enc", "b_enc", "W_dec", "b_dec")
                if not np.array_equal(getattr(mine, name), getattr(theirs, name))]
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        return out + ([] if steps == list(range(1, 301)) else [f"metrics of {len(steps)} of 300 steps"])
