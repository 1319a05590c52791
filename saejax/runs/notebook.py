"""`saejax.load` as a notebook meets it: the SAE shows itself."""

from pathlib import Path

from jax.sharding import Mesh

from saejax.formats import loading
from saejax.pages import cards
from saejax.sae.inference import SAE


def load(path: str | Path, mesh: Mesh | None = None, format: str = "auto", features: range | slice | None = None) -> SAE:
    sae = loading.load(path, mesh, format, features)
    sae.card = cards.sae
    return sae


load.__doc__ = loading.load.__doc__
