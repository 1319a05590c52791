"""8 simulated CPU devices for every test; tests marked `slow` run only with `--slow`."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Many tests start the same run again: compile each program once, for this suite and the next one.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parent.parent / ".jax_cache")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import hypothesis  # noqa: E402, F401  (early: its late import inside pytest's summary trips over a parser bug of Python 3.11.7)
import pytest  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


# Files that take longest: begun first, so that no worker is left alone with one of them at the end (`--no-loadscope-reorder`: by
# itself pytest-xdist begins with the files of most tests, and the longest have few).
LONGEST = ("test_guards", "docs/test_run", "plan/test_tpu", "plan/test_tpu_jobs", "train/test_step", "scaling/test_sweep",
           "runs/test_scaling", "train/test_recipes", "train/test_resume", "data/test_harvest", "test_release",
           "train/test_processes", "lm/test_generate", "lm/test_hooks", "test_main")


def pytest_collection_modifyitems(config, items):
    def rank(item) -> int:
        name = item.path.with_suffix("").as_posix()
        return next((n for n, longest in enumerate(LONGEST) if name.endswith(longest)), len(LONGEST))

    items.sort(key=rank)  # keeps the order inside a file
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow tier: run with --slow or `make test-all`")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def model_and_text(tmp_path_factory):
    """Directories of the tiny language model and of its text."""
    from tests import tiny_experiment
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_experiment.write_model(folder / "model"), tiny_experiment.write_text(folder / "text")


@pytest.fixture(scope="session")
def finished(model_and_text, tmp_path_factory):
    """(config file, run directory) of a finished run, made once by the command itself; copy it before changing it."""
    from saejax.cli.main import main
    from tests import tiny_experiment
    folder = tmp_path_factory.mktemp("finished")
    config = tiny_experiment.write_config(folder / "config.py", *model_and_text, folder / "run")
    assert main(["run", f"--config={config}"]) == 0
    return config, folder / "run"
