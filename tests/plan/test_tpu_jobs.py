"""Programs that run after training, compiled for TPU slices that are not there."""

import importlib.util
import math

import jax
import jax.numpy as jnp
import pytest

from saejax.base import sharding
from saejax.base.hardware import parse
from saejax.plan.compiled import mesh_for, read
from saejax.sae import SAESpec
from saejax.sae.inference import measured_raw
from saejax.sae.params import abstract_params
from saejax.sae.row_norm import LAYER_NORM
from tests.hlo import arrays

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: the extra tpu-plan")]
CHIPS, FEATURES, WIDTH, ROWS = 16, 2**20, 1024, 1024


def test_evaluation_holds_of_the_dictionary_its_shard():
    spec = SAESpec("topk", WIDTH, FEATURES, 32)
    mesh = mesh_for(parse("v5e:4x4"), 1, CHIPS)
    rows = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.sharding(mesh, "rows_at_rest"))
            for shape, dtype in (((ROWS, WIDTH), jnp.float32), ((ROWS,), bool))]
    with jax.set_mesh(mesh):
        program = measured_raw.trace(spec, LAYER_NORM, abstract_params(spec, mesh, folded=True), *rows)
        program = program.lower(lowering_platforms=("tpu",)).compile()
    found, matrix = read(program, 1, CHIPS), 4 * FEATURES * WIDTH
    assert found["memory"]["arguments"] == pytest.approx(2 * matrix / CHIPS, rel=0.02)
    # Beside them pre-activations of a tile of rows or features, and what is made of them; rows and their reconstruction.
    assert found["peak_bytes"] - found["memory"]["arguments"] < 0.25 * matrix
    if "collectives_unknown" not in found:
        assert max(math.prod(shape) for _, shape, _ in arrays(program.as_text())) <= FEATURES * WIDTH // CHIPS
