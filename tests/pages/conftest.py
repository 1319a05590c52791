"""The small index of tests/features, whose dashboard is looked at."""

import pytest

from saejax.pages.dashboard import write_dashboard
from tests.features.conftest import config, index, lm_, sae, store, words  # noqa: F401


@pytest.fixture(scope="module")
def site(index, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("site") / "dashboard"
    return write_dashboard(index, out, title="tiny", figures=[("L0", "8")], progress=False)
