"""saejax: sparse autoencoders on language-model activations, from a laptop to a pod.

    import saejax
    sae = saejax.load("runs/demo")        # a run, a checkpoint step, a release, or files of another library
    acts = sae.encode(x)                  # x: [..., d_in] raw activations, numpy or jax
    s = saejax.open("runs/demo")          # the same with its language model, text and index: s.sae, s.lm, s.index
    s = saejax.run(config)                # trains one, as the command does: config of saejax.config.default_config
    saejax.store_of({"blocks.9.hook_resid_post": "acts.npy"}, "store")      # activations made elsewhere, to train on
"""

from saejax.base.version import __version__

__all__ = ["__version__", "compare", "evaluate", "lm", "load", "open", "run", "split", "store_of"]


def __getattr__(name: str):
    # Not imported before they are used: `saejax --help` must not wait for jax.
    if name == "load":
        from saejax.runs.notebook import load
        return load
    if name == "open":
        from saejax.runs.opening import open_subject
        return open_subject
    if name == "compare":
        from saejax.runs.comparison import compare_subjects
        return compare_subjects
    if name == "split":
        from saejax.runs.comparison import split_subjects
        return split_subjects
    if name == "evaluate":
        from saejax.runs.evaluation import evaluate_subject
        return evaluate_subject
    if name == "run":
        from saejax.runs.everything import run
        return run
    if name == "store_of":
        from saejax.data.arrays import store_of
        return store_of
    if name == "lm":
        import importlib
        return importlib.import_module("saejax.lm")
    raise AttributeError(f"module 'saejax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
