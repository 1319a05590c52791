"""The command as a user meets it: help, one-line errors, exit codes, and a whole run on a tiny model."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import saejax
from saejax.base.records import RunPaths
from saejax.cli.main import JOBS, main
from tests import tiny_experiment as tiny


@pytest.fixture
def config_file(model_and_text, tmp_path):
    return tiny.write_config(tmp_path / "config.py", *model_and_text, tmp_path / "run")


def command(*arguments, devices=1, **options):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    return subprocess.run([sys.executable, "-m", "saejax.cli.main", *map(str, arguments)], capture_output=True, text=True,
                          timeout=240, env=env, **options)


def one_error(capsys, *arguments) -> str:
    """The error line of a command that must end with exit code 2 and print nothing else."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("saejax: error: "), err
    return err


def test_help_lists_every_job_without_waiting_for_jax():
    done = command("--help")
    assert done.returncode == 0 and done.stderr == ""
    for name, job in JOBS.items():
        assert re.search(rf"^  {name} +{re.escape(job.summary)}$", done.stdout, re.MULTILINE)
    assert re.findall(r"^(\w+):$", done.stdout, re.MULTILINE)[:5] == ["make", "understand", "act", "exchange", "operate"]
    loads = "import sys, saejax.cli.main as m; m.main(['--help']); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loads], capture_output=True).returncode == 0


@pytest.mark.parametrize("job", JOBS)
def test_help_of_a_job(job, capsys):
    assert main([*job.split(), "--help"]) == 0
    text = capsys.readouterr().out
    for part in (f"saejax {job}", "usage:", "Reads", "writes", "options:", "example:", "exit codes:"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 110


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"saejax {saejax.__version__}\n"


@pytest.mark.parametrize("arguments, message", [
    ([], "no job given"),
    (["trian"], "unknown job 'trian'; did you mean 'train'?"),
    (["train"], "saejax train: give --config=FILE or a run directory"),
    (["inspect"], "saejax inspect: give PATH"),
    (["train", "--config=missing.py"], "--config=missing.py: there is no such file"),
    (["train", "--config=CONFIG", "--config.sae.kk=3"], "unknown key 'sae.kk'; did you mean --config.sae.k?"),
    (["train", "--config=CONFIG", "--config.kind=relu"], "did you mean --config.sae.kind?"),
    (["train", "--config=CONFIG", "--config.sae=3"], "config.sae is a section"),
    (["train", "--config=CONFIG", "--config.sae.k=many"], "config.sae.k: expected int, got 'many'"),
    (["train", "--config=CONFIG", "--config.train.tokens=1e6"], "train.tokens: expected int, got '1e6'; write 1000000"),
    (["train", "--config=CONFIG", "--config.log.progress=maybe"], "log.progress: expected bool, got 'maybe'"),
    (["train", "--config=CONFIG", "--config.sae.kind=relux"], "config.sae.kind: 'relux' is not one of relu, topk"),
    (["train", "--config=CONFIG", "--config.train.lr=-1"], "config.train.lr: -1.0 must be greater than 0.0"),
    (["train", "--config=CONFIG", "--frobnicate"], "unknown option --frobnicate"),
    (["eval", "--contxts=3", "runs/x"], "unknown option --contxts; did you mean --contexts?"),
    (["train", "--config.sae.k=3"], "--config.sae.k needs --config=FILE"),
    (["train", "--config=CONFIG", "some/run"], "give one of them"),
    (["train", "no/such/run"], "no/such/run: does not exist"),
    (["inspect", "no/such/path"], "no/such/path: does not exist"),
    (["inspect", "x", "--config.sae.k=3"], "saejax inspect takes no --config"),
    (["train", "--config=CONFIG", "--distributed", "--num_processes=2"], "--coordinator, --process-id missing"),
    (["train", "--config=CONFIG", "--process_id=1"], "need --distributed"),
    (["train", "--config=CONFIG"], "no activation store here"),
    (["train", "--config=CONFIG", "--config.train.batch=100"], "batch: 100 rows.*nearest valid value is 96 or 104"),
    (["train", "--config=CONFIG", "--config.sae.d_sae=65", "--config.mesh.data=1"],
     "config.sae.d_sae: 65 features.*nearest valid value is 72"),
    (["train", "--config=CONFIG", "--config.mesh.data=3", "--config.mesh.dict=2"], "does not use the 8 devices here"),
    (["harvest", "--config=CONFIG", "--config.harvest.hookpoints=('blocks.9.hook_resid_post',)",
      "--config.sae.hookpoint=blocks.9.hook_resid_post"], "the model has 3 layers"),
    (["harvest", "--config=CONFIG", "--config.lm.model=no_such_model"], "no_such_model"),
    (["harvest", "--config=CONFIG", "--config.text.source=no_such.txt"], "no_such.txt"),
])
def test_mistakes_end_in_one_line(arguments, message, config_file, tmp_path, capsys):
    error = one_error(capsys, *(a.replace("CONFIG", str(config_file)) for a in arguments))
    assert re.search(message, error) or message in error, error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("line, message", [
    ("c.sae.kk = 3", "unknown key 'kk'"),
    ("c.train.bach = 3", "unknown key 'bach'; did you mean 'batch'"),
    ("c.sae.k = 'many'", "TypeError.*many"),
    ("1 / 0", "ZeroDivisionError"),
    ("if", "SyntaxError"),
    ("import no_such_module", "ModuleNotFoundError"),
])
def test_a_broken_config_file_is_named_with_its_line(line, message, model_and_text, tmp_path, capsys):
    file = tiny.write_config(tmp_path / "config.py", *model_and_text, tmp_path / "run", extra=line)
    number = next(i for i, text in enumerate(file.read_text().splitlines(), 1) if text.strip() == line)
    error = one_error(capsys, "train", f"--config={file}")
    assert f"{file}:{number}: " in error and re.search(message, error), error


def test_a_config_file_without_a_config(tmp_path, capsys):
    (tmp_path / "none.py").write_text("def get_config():\n    return {'sae': 1}\n")
    assert "get_config() returned" in one_error(capsys, "train", f"--config={tmp_path / 'none.py'}")
    (tmp_path / "empty.py").write_text("")
    assert "get_config" in one_error(capsys, "train", f"--config={tmp_path / 'empty.py'}")


def test_exit_codes_and_streams_of_the_real_command(config_file):
    done = command("train", f"--config={config_file}", "--config.train.batch=100", devices=8)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("saejax: error: config.train.batch: 100 rows")
    assert "Traceback" not in done.stderr


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("saejax.cli.main.overview", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["--help"])


def test_a_run_leaves_everything_and_says_so(finished, capsys):
    config, run = finished
    assert main(["run", f"--config={config}"]) == 0
    out = capsys.readouterr().out
    assert 0 < float(re.search(r"^L0 +([\d.]+)", out, re.MULTILINE)[1]) <= 8
    for label in ("FVU", "explained variance", "CE clean / spliced", "CE recovered", "silent on held-out text",
                  "tokens/s harvest", "tokens/s training"):
        assert re.search(rf"^{re.escape(label)} +\S", out, re.MULTILINE), out
    assert f"report   {run / 'report.html'}" in out
    paths = RunPaths(run)
    for file in (paths.config, paths.metrics, paths.evaluation, paths.release / "cfg.json", paths.report):
        assert file.is_file()
    assert json.loads((paths.release / "metrics.json").read_text())["contexts"] == 8


def test_a_second_call_measures_nothing_again(finished, monkeypatch, capsys):
    config, run = finished
    before = (run / "eval.json").read_bytes()

    def refuse(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr("saejax.runs.evaluation.evaluate_all", refuse)
    monkeypatch.setattr("saejax.train.loop.shared_step", refuse)
    assert main(["run", f"--config={config}"]) == 0 and main(["eval", str(run)]) == 0
    assert (run / "eval.json").read_bytes() == before


def test_eval_puts_runs_side_by_side_and_as_json(finished, capsys):
    _, run = finished
    steps = sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())
    assert main(["eval", str(run), str(run / "checkpoints" / str(steps[0])), "--contexts=4", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["step"], second["step"]) == (steps[-1], steps[0]) and first["contexts"] == second["contexts"] == 4
    assert first["fvu"] != second["fvu"] and first["ce_clean"] == second["ce_clean"]


def test_evaluation_with_the_model_split_over_devices(finished, model_and_text, tmp_path):
    extra = "c.lm.model_parallel = 2\nc.lm.batch_contexts = 4"
    config = tiny.write_config(tmp_path / "config.py", *model_and_text, tmp_path / "run", extra)
    assert main(["run", f"--config={config}"]) == 0
    split, whole = (next(e["result"] for e in json.loads((run / "eval.json").read_text())["entries"] if e["key"]["contexts"] == 8)
                    for run in (tmp_path / "run", finished[1]))
    assert split["ce_clean"] == pytest.approx(whole["ce_clean"], rel=1e-5)
    assert split["ce_zero"] == pytest.approx(whole["ce_zero"], rel=1e-5)
    assert split["explained_variance"] == pytest.approx(whole["explained_variance"], abs=0.02)


def test_release_of_any_step(finished, tmp_path, capsys):
    _, run = finished
    step = min((p for p in (run / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    assert main(["release", str(step), f"--out={tmp_path / 'sae'}"]) == 0
    assert f"step {step.name}" in capsys.readouterr().out
    x = np.random.default_rng(0).standard_normal((5, tiny.D_IN)).astype(np.float32)
    np.testing.assert_array_equal(saejax.load(tmp_path / "sae").encode(x), saejax.load(step).encode(x))


def test_a_moved_run_is_still_a_run(finished, tmp_path, capsys):
    import shutil
    _, run = finished
    shutil.copytree(run, tmp_path / "elsewhere")
    assert main(["eval", str(tmp_path / "elsewhere")]) == 0 and main(["train", str(tmp_path / "elsewhere")]) == 0


def test_a_config_for_a_finished_run_changes_only_what_decides_no_result(finished, capsys):
    config, run = finished
    assert main(["eval", f"--config={config}", "--config.eval.contexts=5", "--json"]) == 0
    [result] = json.loads(capsys.readouterr().out)
    assert result["contexts"] == 5
    for job in ("eval", "release"):
        error = one_error(capsys, job, f"--config={config}", "--config.sae.k=3", "--config.seed=9")
        assert f"{run}: this run was made with another config (" in error and "sae.k: 8 -> 3" in error and "seed: 0 -> 9" in error


def test_another_config_may_not_take_a_run_directory(finished, capsys):
    config, run = finished
    error = one_error(capsys, "run", f"--config={config}", "--config.train.lr=0.5")
    assert "belongs to another config" in error and "train.lr: 0.001 -> 0.5" in error


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(model_and_text, tmp_path):
    run = tmp_path / "run"
    config = tiny.write_config(tmp_path / "config.py", *model_and_text, run,
                               extra="c.train.tokens, c.checkpoint.every_tokens = 640_000, 160_000")
    arguments = [sys.executable, "-m", "saejax.cli.main", "run", f"--config={config}"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (run / "metrics.jsonl").is_file():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75 and "state saved" in err.splitlines()[-1], err
    stopped = max(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())
    assert stopped < 10_000
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0 and f"at step {stopped} of 10000" in done.stderr
