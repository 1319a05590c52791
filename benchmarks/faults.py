"""Faults on purpose, with a tiny language model: two writers at once, disks that fill up, processes that are killed.

    python benchmarks/faults.py writers --trials=20 --seed=0
    python benchmarks/faults.py disk --trials=8 --seed=0        (mounts file systems in memory: Linux, as root)
    python benchmarks/faults.py kills --trials=8 --seed=0

`writers`: two equal `saejax run` at a random distance. Right: one does the work, the other is refused in one line or finds all
done; no traceback, and no metric line is lost. `disk`: harvest, train, features and release on a disk with too little room,
of a random size. Right: one line, exit code 2, and the same command finishes when there is room. `kills`: SIGKILL for one of two
processes that make tokens, harvest or train, at a random moment. Right: the other one ends within the heartbeat and 5 s, and the
same commands then finish with the bytes and parameters of a run that nobody disturbed. Prints a table in Markdown; exit
code 1 when any trial went wrong.
"""

import argparse
import functools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests import tiny_experiment as tiny  # noqa: E402
from tests.kills import HEARTBEAT, STAGES, Experiment  # noqa: E402

JOBS = ("harvest", "train", "features", "release")
KIB = 1024


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "saejax", *map(str, words)]


def start(*words: str | Path) -> subprocess.Popen:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return subprocess.Popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT)


def wrong_with(code: int, out: str, err: str, codes: tuple[int, ...]) -> str:
    """What a user should not have seen; empty when all is well."""
    lines = [line for line in err.splitlines() if line.startswith("saejax: error:")]
    if "Traceback" in out + err:
        return "a traceback"
    if code not in codes:
        return f"exit code {code}"
    return f"{len(lines)} error lines" if code == 2 and len(lines) != 1 else ""


def two_writers(place: Path, model: Path, text: Path, wait: float) -> tuple[str, str]:
    """(how the two ended, what was wrong) of two equal commands, the second `wait` seconds after the first."""
    config = tiny.write_config(place / "config.py", model, text, place / "run", "c.log.every_steps = 1")
    first = start("run", f"--config={config}")
    time.sleep(wait)
    second = start("run", f"--config={config}")
    ended = [(job.communicate(timeout=600), job.returncode) for job in (first, second)]
    wrong = [trouble for (out, err), code in ended if (trouble := wrong_with(code, out, err, (0, 2)))]
    codes = [code for _, code in ended]
    steps = [json.loads(line)["step"] for line in (place / "run/metrics.jsonl").read_text().splitlines()]
    if 0 not in codes:
        wrong.append("nobody finished")
    if steps != list(range(1, 33)):
        wrong.append(f"metrics of {len(steps)} of 32 steps")
    if list((place / "run").rglob(".lease")):
        wrong.append("a lease is left")
    return " and ".join(map(str, codes)), "; ".join(wrong)


def writers(trials: int, seed: int) -> bool:
    rng, bad = random.Random(seed), 0
    print("| trial | second started after | exit codes | wrong |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model, text = tiny.write_model(place / "model"), tiny.write_text(place / "text")
        for trial in range(trials):
            (place / str(trial)).mkdir()
            wait = rng.choice((0.0, 2 * rng.random(), 12 * rng.random()))
            codes, wrong = two_writers(place / str(trial), model, text, wait)
            bad += bool(wrong)
            print(f"| {trial} | {wait:.2f} s | {codes} | {wrong or 'nothing'} |", flush=True)
    print(f"\n{trials} trials, {bad} went wrong")
    return bad == 0


def size_of(folder: Path) -> int:
    return sum(-(-file.stat().st_size // 4096) * 4096 for file in folder.rglob("*") if file.is_file())


class Disk:
    """A file system in memory whose size can be changed."""

    def __init__(self, place: Path):
        self.place = place
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512m", "tmpfs", place], check=True)

    def resize(self, size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", self.place], check=True)

    def close(self) -> None:
        subprocess.run(["umount", "-l", self.place], check=True)


def words_of(job: str, config: Path, run: Path) -> list[str]:
    """The command line of a job; harvest and train have a config, the others a run."""
    return [job, f"--config={config}"] if job in ("harvest", "train") else [job, str(run)]


def made_before(job: str, config: Path, run: Path) -> None:
    """All that comes before a job, in its place."""
    for earlier in {"harvest": [], "train": ["harvest"], "features": ["harvest", "train"], "release": ["harvest", "train"]}[job]:
        done = start(*words_of(earlier, config, run))
        _, err = done.communicate()
        assert done.returncode == 0, err


def disk_full(disk: Disk, job: str, config: Path, need: int, share: float) -> tuple[int, str]:
    """(bytes of room, what was wrong) of a job with `share` of the room it needs, then of the same with enough."""
    run = disk.place / "run"
    room = size_of(disk.place) + max(4 * KIB, int(share * need))
    disk.resize(room)
    first = start(*words_of(job, config, run))
    out, err = first.communicate(timeout=600)
    wrong = [trouble for trouble in [wrong_with(first.returncode, out, err, (2,))] if trouble]
    disk.resize(512 * KIB * KIB)
    again = start(*words_of(job, config, run))
    out, err = again.communicate(timeout=600)
    wrong += [f"again: {trouble}" for trouble in [wrong_with(again.returncode, out, err, (0,))] if trouble]
    return room, "; ".join(wrong)


def disk(trials: int, seed: int, jobs: tuple[str, ...]) -> bool:
    rng, bad = random.Random(seed), 0
    print("| job | trial | room for | wrong |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model, text = tiny.write_model(place / "model"), tiny.write_text(place / "text")
        for job in jobs:
            disk_ = Disk(place / job)
            try:
                run = disk_.place / "run"
                config = tiny.write_config(place / "config.py", model, text, run)
                made_before(job, config, run)
                shutil.copytree(disk_.place, place / f"before_{job}")
                need = needed(disk_, job, config, run)
                for trial in range(trials):
                    disk_.resize(512 * KIB * KIB)
                    refill(disk_.place, place / f"before_{job}")
                    share = rng.uniform(0.02, 0.9)
                    room, wrong = disk_full(disk_, job, config, need, share)
                    bad += bool(wrong)
                    print(f"| {job} | {trial} | {100 * share:.0f} % of {need // KIB} KiB | {wrong or 'nothing'} |", flush=True)
            finally:
                disk_.close()
    print(f"\n{trials * len(jobs)} trials, {bad} went wrong")
    return bad == 0


def refill(target: Path, source: Path) -> None:
    for file in target.iterdir():
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    shutil.copytree(source, target, dirs_exist_ok=True)


def needed(disk_: Disk, job: str, config: Path, run: Path) -> int:
    """Bytes that a job adds, run once with room for all."""
    before = size_of(disk_.place)
    done = start(*words_of(job, config, run))
    _, err = done.communicate()
    assert done.returncode == 0, err
    return size_of(disk_.place) - before


def kills(trials: int, seed: int) -> bool:
    bad, worst = 0, 0.0
    print("| stage | trial | killed | at | the other one ended after | wrong |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        experiment = Experiment(Path(folder))
        for stage in STAGES:
            for number in range(seed, seed + trials):
                trial = experiment.trial(stage, number)
                bad, worst = bad + bool(trial.wrong), max(worst, trial.late)
                row = (stage, number, f"process {trial.killed}", trial.at, f"{trial.late:.1f} s", trial.wrong or "nothing")
                print(f"| {' | '.join(map(str, row))} |", flush=True)
    print(f"\n{trials * len(STAGES)} trials, {bad} went wrong; heartbeat {HEARTBEAT} s, the longest wait {worst:.1f} s")
    return bad == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("writers", "disk", "kills"))
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", default=",".join(JOBS), help="of `disk`: some of harvest, train, features, release")
    args = parser.parse_args()
    jobs = tuple(args.jobs.split(","))
    run = {"writers": writers, "kills": kills, "disk": functools.partial(disk, jobs=jobs)}[args.what]
    sys.exit(0 if run(args.trials, args.seed) else 1)


if __name__ == "__main__":
    main()
