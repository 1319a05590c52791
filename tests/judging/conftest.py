"""The small index of the features' tests, and what questions about it are made of."""

import pytest

from saejax.judging import material
from tests.features.conftest import config, index, lm_, sae, store, words  # noqa: F401  (fixtures)


@pytest.fixture(scope="session")
def found(index, sae, words):  # noqa: F811
    """{feature: material} of three features, 200 activations of each drawn."""
    return material.gather(index, sae, words, [0, 3, 11], draw=200, progress=False)
