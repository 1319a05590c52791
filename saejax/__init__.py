"""saejax: sparse autoencoders on language-model activations, from a laptop to a pod.

    import saejax
    sae = saejax.load("runs/demo")        # a run, a checkpoint step, a release, or files of another library
    acts = sae.encode(x)                  # x: [..., d_in] raw activations, numpy or jax
"""

from saejax.base.version import __version__ as __version__

__all__ = ["load"]


def __getattr__(name: str):
    if name == "load":  # not imported before it is used: `saejax --help` must not wait for jax
        from saejax.formats import load
        return load
    raise AttributeError(f"module 'saejax' has no attribute {name!r}")
