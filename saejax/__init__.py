"""saejax: sparse autoencoders on language-model activations, from a laptop to a pod."""

__version__ = "0.1.0"
