"""The small index of tests/features, whose dashboard is looked at."""

from tests.features.conftest import config, index, lm_, sae, store, words  # noqa: F401
