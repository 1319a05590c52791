"""The metric file survives crashes and resumes: steps strictly increase."""

import pytest

from saejax.errors import ConfigError
from saejax.logs import MetricWriter, read_metrics


def test_resume_cuts_what_came_after_and_torn_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with_lines = MetricWriter(path)
    for step in (1, 2, 3):
        with_lines.write(step, {"loss": step / 2})
    with_lines.close()
    with open(path, "a") as f:
        f.write('{"step": 4, "lo')
    assert [m["step"] for m in read_metrics(path)] == [1, 2, 3]
    resumed = MetricWriter(path, resume_step=2)
    resumed.write(3, {"loss": 9.0})
    resumed.close()
    assert read_metrics(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1}, {"step": 3, "loss": 9}]


def test_a_new_run_starts_a_new_file(tmp_path):
    for _ in range(2):
        writer = MetricWriter(tmp_path / "m.jsonl", tensorboard=tmp_path / "tb")
        writer.write(1, {"loss": 1.0})
        writer.close()
    assert len(read_metrics(tmp_path / "m.jsonl")) == 1
    assert any(p.name.startswith("events.out.tfevents") for p in (tmp_path / "tb").iterdir())


def test_wandb_without_the_extra_names_it(tmp_path):
    try:
        import wandb  # noqa: F401
        pytest.skip("wandb is installed")
    except ImportError:
        with pytest.raises(ConfigError, match=r"pip install 'saejax\[wandb\]'"):
            MetricWriter(tmp_path / "m.jsonl", wandb_project="x")
