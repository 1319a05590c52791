"""What the dtype of the products means: on every backend, in every product of a step, forward and backward."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.base import hardware, sharding
from saejax.base.errors import ConfigError
from saejax.base.records import MeshOptions
from saejax.sae import SAEParams, SAESpec, pre_activations
from saejax.sae.inference import fold, unfold
from saejax.sae.normalization import Normalization
from saejax.sae.products import product
from saejax.train import loop
from saejax.train.member import settled
from saejax.train.state import abstract_state
from saejax.train.step import make_step
from tests.train.synthetic import HOOKPOINT, VARIANTS, WIDTHS, make_config, make_store

LAZY = {"train__optimizer": "lazy"}
DOT = re.compile(r"\(tensor<([^>]*)>, tensor<([^>]*)>\) -> tensor<([^>]*)>")


def dots(text: str) -> list[tuple[tuple[int, ...], set[str], str, str]]:
    """(shape of the result, dtypes of the operands, dtype of the result, precision) of every dot of a lowered program."""
    found = []
    for line in text.splitlines():
        if "dot_general" in line:
            a, b, out = DOT.search(line).groups()
            precision = re.search(r"precision = \[(\w+), \1\]", line) or ["", "DEFAULT"]
            shape = tuple(map(int, re.findall(r"(\d+)x", out)))
            found.append((shape, {a.split("x")[-1], b.split("x")[-1]}, out.split("x")[-1], precision[1]))
    return found


def lowered(kind: str, dtype: str, platform: str, tmp_path, **changes) -> str:
    """The step of a recipe, as it goes to the compiler of a platform that is not here."""
    config = make_config(kind, tmp_path, train__compute_dtype=dtype, **changes)
    spec = SAESpec.from_options(config.sae, WIDTHS, dtype)
    mesh = sharding.make_mesh(MeshOptions(2, 4))
    width = sum(WIDTHS[name] for name in config.sae.hookpoints)
    with jax.set_mesh(mesh):
        rows = jax.ShapeDtypeStruct((32, width), jnp.bfloat16, sharding=sharding.sharding(mesh, "rows_at_rest", None))
        return make_step(config, spec, 10).trace(abstract_state(config, spec, mesh), rows).lower(
            lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("dtype, operands, precision", [("bfloat16", "bf16", "DEFAULT"), ("float32", "f32", "HIGHEST")])
@pytest.mark.parametrize("kind, changes", [
    ("relu", {}), ("topk", {"train__path": "dense"}), ("topk", {"train__path": "sparse"}), *(
        pytest.param(kind, {}, marks=pytest.mark.slow)
        for kind in (*(k for k in VARIANTS), "gated", "jumprelu", "jumprelu_tanh", "batchtopk", "matryoshka_jumprelu")),
    pytest.param("topk", {"train__path": "dense", "sae__multi_topk": True}, marks=pytest.mark.slow),
    pytest.param("topk", LAZY, marks=pytest.mark.slow),
    pytest.param("matryoshka", {"train__path": "dense"}, marks=pytest.mark.slow),
    pytest.param("matryoshka", LAZY, marks=pytest.mark.slow)])
def test_every_product_of_a_step_has_the_dtype_that_is_asked_for(tmp_path, kind, changes, dtype, operands, precision, platform):
    """Both operands; sums in float32. What is as large as the dictionary is a product of matrices, but for one mat-vec."""
    found = dots(lowered(kind, dtype, platform, tmp_path, **changes))
    assert len(found) >= 1
    for shape, of, out, asked in found:
        assert (of, out) == ({operands}, "f32"), shape
        assert asked == precision, shape


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("mesh_shape", [None, (2, 4)])
def test_product_and_its_gradients(mesh_shape, dtype, tolerance):
    rng = np.random.default_rng(0)
    a, b, g = (rng.standard_normal(shape).astype(np.float32) for shape in ((8, 12), (16, 12), (8, 16)))

    def of(a, b, g):
        out, back = jax.vjp(lambda a, b: product("bd,fd->bf", a, b, dtype), a, b)
        return out, *back(g)

    if mesh_shape:
        mesh = sharding.make_mesh(MeshOptions(*mesh_shape))
        axes = (("rows", None), ("features", None), ("rows", "features"))
        with jax.set_mesh(mesh):
            got = jax.jit(of)(*(sharding.place(v, sharding.sharding(mesh, *ax)) for v, ax in zip((a, b, g), axes, strict=True)))
            assert got[2].sharding.spec == sharding.spec("features", None)
    else:
        got = jax.jit(of)(a, b, g)
    for expected, value in zip((a @ b.T, g @ b, g.T @ a), got, strict=True):
        assert value.dtype == jnp.float32
        assert np.linalg.norm(value - expected) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("ratio", [1, 10, 30])
def test_rows_far_from_zero_are_rounded_around_b_dec(ratio):
    """bfloat16: the error of pre-activations does not grow with ||mean|| / ||x - mean|| (2.4 % at 10 where x is rounded)."""
    rng = np.random.default_rng(1)
    d, f = 1024, 256
    mean = rng.standard_normal(d)
    around = rng.standard_normal((64, d))
    mean *= ratio * np.linalg.norm(around, axis=1).mean() / np.linalg.norm(mean)
    x, W, mean = (mean + around).astype(np.float32), rng.standard_normal((f, d)).astype(np.float32), mean.astype(np.float32)
    spec = SAESpec("relu", d, f, pre_bias=True, compute_dtype="bfloat16")
    params = SAEParams(W_enc=jnp.asarray(W), b_enc=jnp.zeros(f), W_dec=jnp.asarray(W), b_dec=jnp.asarray(mean))
    exact = (x.astype(np.float64) - mean) @ W.T.astype(np.float64)
    got = np.asarray(jax.jit(pre_activations, static_argnums=0)(spec, params, x), np.float64)
    assert np.linalg.norm(got - exact) <= 0.004 * np.linalg.norm(exact)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_b_dec_through_the_encoder(dtype):
    """-(sum of the gradients of pre-activations) W_enc: what subtracting it from every row gives."""
    rng = np.random.default_rng(2)
    x, W, g = (rng.standard_normal(shape).astype(np.float32) for shape in ((32, 12), (64, 12), (32, 64)))
    spec = SAESpec("relu", 12, 64, pre_bias=True, compute_dtype=dtype)
    params = SAEParams(W_enc=jnp.asarray(W), b_enc=jnp.zeros(64), W_dec=jnp.asarray(W), b_dec=jnp.ones(12))
    got = jax.grad(lambda params: (pre_activations(spec, params, x) * g).sum())(params)
    expected = -g.astype(np.float64).sum(0) @ W
    assert np.linalg.norm(got.b_dec - expected) <= (1e-5 if dtype == "float32" else 1e-2) * np.linalg.norm(expected)
    assert np.linalg.norm(got.W_enc - g.T @ (x - 1)) <= (1e-5 if dtype == "float32" else 1e-2) * np.linalg.norm(got.W_enc)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_products_outside_training_are_float32(platform):
    """Encoding and decoding of a release, folding and unfolding ask for full precision."""
    spec = SAESpec("relu", 16, 32, pre_bias=False)
    params = SAEParams(*(jnp.ones(shape) for shape in ((32, 16), (32,), (32, 16), (16,))))
    normal = Normalization(scale=jnp.ones(16), center=jnp.ones(16))

    def all_of(params, x):
        folded = fold(spec, params, normal)
        return unfold(spec, folded, normal, unit_decoder=True), pre_activations(spec, folded, x)

    found = dots(jax.jit(all_of).trace(params, jnp.ones((4, 16))).lower(lowering_platforms=(platform,)).as_text())
    assert len(found) == 3 and all((of, asked) == ({"f32"}, "HIGHEST") for _, of, _, asked in found)


@pytest.mark.parametrize("wanted, platform, capability, expected", [
    ("auto", "cpu", None, "float32"), ("auto", "tpu", None, "bfloat16"), ("auto", "gpu", "9.0", "bfloat16"),
    ("auto", "gpu", "10.0", "bfloat16"), ("auto", "gpu", None, "bfloat16"), ("auto", "gpu", "7.5", "float32"),
    ("bfloat16", "cpu", None, "bfloat16"), ("float32", "gpu", "9.0", "float32")])
def test_what_auto_is(wanted, platform, capability, expected):
    assert hardware.compute_dtype(wanted, platform, capability) == expected


def test_a_dtype_that_the_hardware_has_not(tmp_path):
    with pytest.raises(ConfigError, match="compute capability 7.0.*set float32, or auto"):
        hardware.compute_dtype("bfloat16", "gpu", "7.0")
    with pytest.raises(ConfigError, match="config.train.compute_dtype: .*float16"):
        make_config("topk", tmp_path, train__compute_dtype="float16")


def test_spec_of_auto_is_that_of_the_devices_here(tmp_path):
    config = make_config("topk", tmp_path)
    assert config.train.compute_dtype == "auto"
    assert SAESpec.from_options(config.sae, {HOOKPOINT: 16}, "auto").compute_dtype == "float32"


def test_a_run_goes_on_in_the_dtype_that_it_began_with(tmp_path):
    """As one that a GPU began does on this CPU, where auto alone would be float32."""
    store = make_store(tmp_path / "store")
    begun = make_config("topk", tmp_path / "run", train__compute_dtype="bfloat16", train__tokens=320)
    loop.train(begun, store)
    config = make_config("topk", tmp_path / "run", train__tokens=320)
    assert (settled(begun), settled(config).train.compute_dtype) == (begun, "bfloat16")
    assert loop.train(config, store).spec.compute_dtype == "bfloat16"
    assert settled(make_config("topk", tmp_path / "other")).train.compute_dtype == "float32"
