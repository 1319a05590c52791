"""Reading and writing SAEs: the release directory, and one module per foreign format."""

from saejax.formats.loading import load

__all__ = ["load"]
