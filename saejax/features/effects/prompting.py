"""One prompt for language model and SAE: its tokens, and where in the model the SAE reads and writes."""

import jax
import numpy as np

from saejax.base.errors import PromptError, SteeringError
from saejax.lm import LM, check_hookpoint, hookpoints, prompts, width_of
from saejax.lm.prompts import Text
from saejax.sae.inference import SAE
from saejax.sae.row_norm import NONE, normalise_rows


def encoded(lm_: LM, prompt: Text) -> np.ndarray:
    """Token ids [T] of a prompt, BOS before it where the model has one. Raises `PromptError`: empty, or too long."""
    return lm_.tokens(prompt)


def single_token(lm_: LM, text: str) -> int:
    """The id of a text that is one token (`Tokenizer.id_of`). Raises `PromptError` where it is none or several."""
    found = lm_.tokenizer.id_of(text) if isinstance(text, str) else None
    if found is None:
        n = len(lm_.tokenizer.encode(text)) if isinstance(text, str) else 0
        raise PromptError(f"{text!r} is {f'{n} tokens' if n != 1 else 'no token'} of this model; give one (a leading blank often "
                          "matters)")
    return found


def special(lm_: LM, tokens_T: np.ndarray) -> np.ndarray:
    """bool [T]: the first token and the special ones, which an SAE has not seen."""
    return np.isin(tokens_T, sorted(lm_.tokenizer.special_ids)) | (np.arange(len(tokens_T)) == 0)


def padded(lm_: LM, tokens_T: np.ndarray) -> np.ndarray:
    """[1, T'] as `lm.prompts.padded` makes it."""
    return prompts.padded(lm_.cfg, [tokens_T])


def check_place(lm_: LM, sae: SAE) -> None:
    """Raises `HookpointError` for a hookpoint that the model does not have, `SteeringError` where widths or order do not fit."""
    for names, width in ((sae.cfg.hookpoints, sae.cfg.d_in), (sae.cfg.targets, sae.cfg.spec.width_out)):
        for name in names:
            check_hookpoint(lm_.cfg, name)
        found = [width_of(lm_.cfg, name) for name in names]
        if sum(found) != width:
            raise SteeringError(f"the SAE is {width} wide at {', '.join(names)}, this model {' + '.join(map(str, found))}; load "
                                f"the model that it was trained on ({sae.cfg.model})")
    order = hookpoints(lm_.cfg)
    if max(map(order.index, sae.cfg.hookpoints)) > order.index(sae.cfg.targets[0]) and sae.cfg.target:
        raise SteeringError(f"the transcoder writes to {sae.cfg.target} before it has read {sae.cfg.hookpoint}, which "
                            "this model has no place for")


def check_one_place(sae: SAE) -> None:
    """Raises `SteeringError` for a crosscoder: a change at its first layer would change what it reads at the others."""
    if len(sae.cfg.targets) > 1:
        raise SteeringError(f"a crosscoder ({sae.cfg.hookpoint}) reads above where it first writes, so that its features have no "
                            "value to set in one pass: it is neither steered nor ablated")


def check_feature(sae: SAE, feature: int) -> int:
    """`feature`, or `SteeringError` when there is no such feature."""
    if not 0 <= feature < sae.cfg.d_sae:
        raise SteeringError(f"feature {feature}: there is no such feature; they are numbered 0 to {sae.cfg.d_sae - 1}")
    return feature


def row_scales(sae: SAE, x: jax.Array) -> jax.Array | float:
    """[..., 1]: what a unit of activation is worth in raw units at each row; 1 but where the SAE normalises rows (`input_norm`).
    """
    if sae.cfg.input_norm == NONE or sae.cfg.d_out is not None:
        return 1.0
    return normalise_rows(sae.cfg.input_norm, x.reshape(-1, x.shape[-1]))[1].reshape(*x.shape[:-1], 1)
