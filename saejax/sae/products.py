"""Matrix products whose dtype means what it says on every backend, in the backward pass too."""

import functools

import jax
import jax.numpy as jnp
from jax import lax


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def product(equation: str, a: jax.Array, b: jax.Array, dtype, out_sharding=None) -> jax.Array:
    """einsum(equation, a, b) with both operands in `dtype` and float32 sums; float32.

    float32 is float32: GPUs would take TF32 and TPUs bfloat16 for it by default. bfloat16: both operands of the two products of
    the backward pass, too, are bfloat16; their sums, and so the gradients of float32 parameters, are float32. Each letter of an
    operand occurs in the other one or in the result. Gradients are placed as the operands are.
    """
    return _einsum(equation, a, b, jnp.dtype(dtype), out_sharding)


def _einsum(equation: str, a: jax.Array, b: jax.Array, dtype, out_sharding) -> jax.Array:
    precision = lax.Precision.DEFAULT if dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    return jnp.einsum(equation, a.astype(dtype), b.astype(dtype), precision=precision, out_sharding=out_sharding,
                      preferred_element_type=jnp.promote_types(dtype, jnp.float32))


def _backward(equation: str, dtype, out_sharding, saved: tuple[jax.Array, jax.Array], gradient: jax.Array):
    (a, b), dtype = saved, jnp.dtype(dtype)
    operands, result = equation.split("->")
    of_a, of_b = operands.split(",")
    to_a = _einsum(f"{result},{of_b}->{of_a}", gradient, b, dtype, _placement(a))
    to_b = _einsum(f"{of_a},{result}->{of_b}", a, gradient, dtype, _placement(b))
    return to_a.astype(a.dtype), to_b.astype(b.dtype)


product.defvjp(lambda equation, a, b, dtype, out_sharding: (product(equation, a, b, dtype, out_sharding), (a, b)), _backward)


def _placement(like: jax.Array):
    """PartitionSpec of an array on an explicit mesh; None where there is none, and inside `shard_map`."""
    placed = jax.typeof(like).sharding
    return placed.spec if placed.mesh.axis_types and placed.mesh.are_all_axes_explicit else None
