import pytest

from saejax.config import default_config, resolve
from tests import tiny_experiment as tiny


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory):
    from saejax.lm import load
    return load(str(tiny.write_model(tmp_path_factory.mktemp("model") / "tiny")))


@pytest.fixture(scope="session")
def text_files(tmp_path_factory):
    return tiny.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def config(text_files, tmp_path):
    c = default_config("topk")
    c.run_dir, c.text.source, c.text.context, c.text.holdout = str(tmp_path / "run"), (str(text_files),), 32, 0.3
    c.harvest.hookpoints, c.sae.hookpoint = (tiny.HOOKPOINT,), tiny.HOOKPOINT
    c.sae.d_sae, c.sae.k, c.harvest.chunk_rows, c.log.progress = tiny.D_SAE, 8, 32, False
    c.eval.contexts, c.eval.batch_contexts = 10, 4
    return resolve(c)
