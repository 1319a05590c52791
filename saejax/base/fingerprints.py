"""One hash mixer, and the fingerprint of arrays that no mesh changes."""

import jax
import jax.numpy as jnp
import numpy as np


def mix(x):
    """The murmur3 finaliser: a bijection of uint32. On the host where `x` is a numpy array."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x85EBCA6B)
    x = x ^ (x >> np.uint32(13))
    x = x * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def unmix(x: np.ndarray) -> np.ndarray:
    """The inverse of `mix`, on the host."""
    x = np.asarray(x, np.uint32)
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(pow(0xC2B2AE35, -1, 2**32))
    x = x ^ (x >> np.uint32(13)) ^ (x >> np.uint32(26))
    x = x * np.uint32(pow(0x85EBCA6B, -1, 2**32))
    return x ^ (x >> np.uint32(16))


def _leaf_fingerprint(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    u = jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)
    sharding = jax.typeof(u).sharding
    for d in range(x.ndim):
        i = jax.lax.broadcasted_iota(jnp.uint32, u.shape, d, out_sharding=sharding)
        u = mix(u ^ (i * jnp.uint32(0x9E3779B1) + jnp.uint32(d + 1)))
    # Both sums in one reduction: of two, XLA keeps `u` for the second, an array as large as the leaf.
    return jnp.stack(jax.lax.reduce((u, mix(u ^ jnp.uint32(0x5BD1E995))), (jnp.uint32(0), jnp.uint32(0)),
                                    lambda a, b: (a[0] + b[0], a[1] + b[1]), tuple(range(x.ndim))))


@jax.jit
def _fingerprints(leaves):
    return [_leaf_fingerprint(x) for x in leaves]


def fingerprints(tree) -> dict[str, str]:
    """{leaf path: 16 hex digits} of a tree of arrays, equal for every mesh, sharding and process count.

    Each element's bits are mixed with its global coordinates (the murmur3 finaliser) and summed with wrap-around; integer
    addition is associative, so the sharding does not matter. Detects accidents, not attackers. One pass over memory; no
    host ever holds a whole array. Every process must call it.
    """
    paths, leaves = zip(*jax.tree_util.tree_flatten_with_path(tree)[0], strict=True)
    words = jax.device_get(_fingerprints(list(leaves)))
    return {jax.tree_util.keystr(p, simple=True, separator="."): f"{int(a):08x}{int(b):08x}"
            for p, (a, b) in zip(paths, (np.asarray(w) for w in words), strict=True)}
