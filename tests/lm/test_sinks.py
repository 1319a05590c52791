import numpy as np
import pytest

from saejax import lm
from saejax.config import TextOptions
from saejax.data.tokens import token_batches

LAYER = "blocks.15.hook_resid_post"


@pytest.mark.parametrize("bos, first, least, most", [("row", 1, 0, 1.5), ("none", 1, 0, 1.5), ("none", 0, 5, 20)])
def test_norms_that_are_kept(smollm2, bos, first, least, most):
    """Root mean square norm over median norm of what is trained on: the first token of a row is a sink whatever it is."""
    options = TextOptions(source=("shakespeare",), bos=bos, mask=("first", "special")[not first:])
    batch = next(token_batches(options, smollm2.tokenizer, 4, seed=0))
    x_BTD = np.asarray(lm.capture(smollm2.model, batch.tokens_BT, (LAYER,))[LAYER], np.float64)
    norms = np.linalg.norm(x_BTD, axis=-1)[batch.keep_BT]
    assert least < np.sqrt((norms ** 2).mean()) / np.median(norms) <= most


def test_the_separator_of_the_demo_is_that_of_pre_training(smollm2):
    tokenizer = smollm2.tokenizer
    assert tokenizer.token(tokenizer.eos_id) == "<|im_end|>" and tokenizer.token(tokenizer.separator_id) == "<|endoftext|>"
