"""Sparse autoencoders: parameters, encode and decode, objectives. Knows nothing of language models or training runs."""

from saejax.sae.model import decode, encode, pre_activations, reconstruct
from saejax.sae.params import SAEParams, SAESpec, from_tensors, init_params, param_shapes, param_shardings, tensors

__all__ = ["SAEParams", "SAESpec", "decode", "encode", "from_tensors", "init_params", "param_shapes", "param_shardings",
           "pre_activations", "reconstruct", "tensors"]
