"""`RopeConfig` from a Hugging Face config, wherever that version of transformers put it.

transformers 5 writes `rope_parameters` (for Gemma 3 one per layer type); older files have `rope_theta`, `rope_scaling`,
`partial_rotary_factor` and, by family, `rotary_emb_base`, `rotary_pct` or `rope_local_base_freq`.
"""

import math
from collections.abc import Mapping

from saejax.base.keys import short
from saejax.lm.arch import RopeConfig
from saejax.lm.fields import Fields

_TYPES = {
    "default": "none",
    "linear": "linear",
    "llama3": "llama3",
    "longrope": "longrope",
    "su": "longrope",
    "yarn": "yarn",
}
_LAYER_TYPES = ("full_attention", "sliding_attention")


def rope(
    fields: Fields,
    head_dim: int,
    theta: float,
    max_context: int,
    *,
    nested: str | None = None,
    theta_key: str = "rope_theta",
    part_key: str = "partial_rotary_factor",
    part: float | None = None,
) -> RopeConfig:
    """The rope of the model, or of its layers of type `nested`; every problem is noted in `fields`.

    `theta` and `part` (share of each head that rotates; None: the family only rotates whole heads) are the family's
    defaults, `theta_key` and `part_key` its old names for them.
    """
    blocks = _blocks(fields, nested)
    found = {(fields.number(theta_key), theta_key)} if fields.value(theta_key, None) is not None else set()
    share = fields.number(part_key, part or 1.0)
    merged: dict = {}
    for where, block in blocks:
        if block.get("rope_theta") is not None:
            found.add((fields.inside(block, where).number("rope_theta"), where))
        merged |= {key: value for key, value in block.items() if value is not None}
    values = sorted({value for value, _ in found})
    if len(values) > 1:
        fields.refuse(f"rope_theta is given as {' and '.join(map(str, values))}")
    where = blocks[-1][0] if blocks else "rope_parameters"
    inner = fields.inside(merged, where)
    inner.ignore("rope_theta", "rope_type", "type")
    share = inner.number("partial_rotary_factor", share)
    if part is None and share != 1.0:
        fields.refuse(f"{part_key}={share!r} (only 1.0 is computed)")
    kinds = list(dict.fromkeys(str(block.get("rope_type", block.get("type", "default"))) for _, block in blocks))
    kind = kinds[-1] if kinds else "default"
    common = {"theta": values[-1] if values else theta, "dim": int(head_dim * share)}
    scaling = _TYPES.get(kind)
    for (place, _), own in zip(blocks, kinds, strict=False):
        if own not in _TYPES:
            fields.refuse(f"{place}.rope_type={short(own)} (computed are {', '.join(_TYPES)})")
    if len(kinds) > 1:
        fields.refuse(f"rope_type is given as {' and '.join(kinds)}")
    if scaling is None or len(kinds) > 1:
        return RopeConfig(**common)
    top = fields.value("original_max_position_embeddings", None)
    made = RopeConfig(**common, scaling=scaling, **_SCALINGS[scaling](inner, top, max_context))
    inner.refuse_unread()
    return made


def _blocks(fields: Fields, nested: str | None) -> list[tuple[str, Mapping]]:
    """The rope objects that apply, with their place in the config."""
    found = []
    for where in ("rope_scaling", "rope_parameters"):
        block = fields.get(where, dict, {})
        if set(block) & set(_LAYER_TYPES):
            if nested is None or set(block) - set(_LAYER_TYPES):
                fields.refuse(f"{where}={short(dict(block))} (one rope for all layers is computed here)")
                continue
            block, where = fields.inside(block, where).get(nested, dict, {}), f"{where}.{nested}"
        elif nested == "sliding_attention":
            # Older Gemma 3 files scale the rope of full-attention layers only.
            continue
        if block:
            found.append((where, block))
    return found


def _none(inner: Fields, top: int | None, max_context: int) -> dict:
    return {}


def _linear(inner: Fields, top: int | None, max_context: int) -> dict:
    return {"factor": inner.number("factor")}


def _original(inner: Fields, top: int | None, max_context: int) -> int:
    own = inner.size("original_max_position_embeddings", max_context)
    return top if isinstance(top, int) and not isinstance(top, bool) else own


def _llama3(inner: Fields, top: int | None, max_context: int) -> dict:
    numbers = {key: inner.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor")}
    return numbers | {"original_context": _original(inner, top, max_context)}


def _longrope(inner: Fields, top: int | None, max_context: int) -> dict:
    original = _original(inner, top, max_context)
    factor = inner.number("factor", max_context / original)
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    factors = {f"{key}s": inner.numbers(key) for key in ("short_factor", "long_factor")}
    return factors | {
        "original_context": original,
        "attention_factor": inner.number("attention_factor", default),
    }


def _yarn(inner: Fields, top: int | None, max_context: int) -> dict:
    """As transformers' `_compute_yarn_parameters`: what is absent, null or 0 has the default of the paper."""
    inner.ignore("finetuned")
    original = _original(inner, top, max_context)
    factor = inner.number("factor", max_context / original)
    mscale, all_dim = inner.number("mscale", 0.0), inner.number("mscale_all_dim", 0.0)
    default = _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor, 1.0)
    return {
        "factor": factor,
        "original_context": original,
        "beta_fast": inner.number("beta_fast", 32.0) or 32.0,
        "beta_slow": inner.number("beta_slow", 1.0) or 1.0,
        "truncate": inner.get("truncate", bool, True),
        "attention_factor": inner.number("attention_factor", default),
    }


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


_SCALINGS = {"none": _none, "linear": _linear, "llama3": _llama3, "longrope": _longrope, "yarn": _yarn}
