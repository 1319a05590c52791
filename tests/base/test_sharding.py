"""Arrays on a mesh, on their way to the hosts."""

import numpy as np
import pytest

from saejax.base import sharding
from saejax.base.records import MeshOptions


@pytest.mark.parametrize("mesh", [(1, 8), (2, 4)])
@pytest.mark.parametrize("axis", ["features", "rows_at_rest"])
@pytest.mark.parametrize("at_once", [1, 500, 10**6])
def test_block_by_block_it_is_the_array(mesh, axis, at_once, monkeypatch):
    """One row of a shard at a time; blocks that do not divide it; all in one."""
    monkeypatch.setattr(sharding, "AT_ONCE", at_once)
    value = np.arange(40 * 3 * 2, dtype=np.int32).reshape(40, 3, 2)
    placed = sharding.place(value, sharding.sharding(sharding.make_mesh(MeshOptions(*mesh)), axis, None, None))
    assert np.array_equal(sharding.by_blocks(placed), value)
