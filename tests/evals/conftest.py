import pytest

from tests import tiny_experiment as tiny


@pytest.fixture(scope="session")
def tiny_lm(model_and_text):
    from saejax.lm import load
    return load(str(model_and_text[0]))


@pytest.fixture
def config(model_and_text, tmp_path):
    return tiny.make_config(*model_and_text, tmp_path / "run", **{"eval.contexts": 10})
