"""Language models: a Flax NNX decoder with hookpoints, its weights and its tokenizer.

lm = saejax.lm.load("smollm2-135m")
acts = capture(lm.model, tokens_BT, ["blocks.9.hook_resid_post"])
text = lm.tokenizer.decode(generate(lm.model, [lm.tokenizer.encode("Once")], 20)[0])
"""

from saejax.lm.arch import LMConfig
from saejax.lm.generate import Sampling, generate
from saejax.lm.hookpoints import check_hookpoint, hookpoint_of, hookpoints, layer_of, width_of
from saejax.lm.load import LM, Files, files, load
from saejax.lm.mesh import make_mesh, place
from saejax.lm.model import Decoder, capture, cross_entropy
from saejax.lm.tokenizer import Tokenizer

__all__ = [
    "LM",
    "Decoder",
    "Files",
    "LMConfig",
    "Sampling",
    "Tokenizer",
    "capture",
    "check_hookpoint",
    "cross_entropy",
    "files",
    "generate",
    "hookpoint_of",
    "hookpoints",
    "layer_of",
    "load",
    "make_mesh",
    "place",
    "width_of",
]
