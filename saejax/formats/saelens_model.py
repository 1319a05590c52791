"""What SAELens did to the language model before it took activations (`model_from_pretrained_kwargs` of a file's metadata).

center_writing_weights takes from every row that is written into the residual stream its mean over the width, in models with
LayerNorm (TransformerLens leaves others alone): the SAE then reads rows less their mean. Other keys change nothing at the
hookpoints where SAEs are, or are refused by name.
"""

import re
from collections.abc import Mapping

from saejax.base.errors import FormatError
from saejax.sae.row_norm import CENTER, LAYER_NORM, NONE

KEY = "model_from_pretrained_kwargs"
# Where the model runs and how it is stored; what folds a norm's weights or shifts the logits, which no hookpoint below shows.
_HARMLESS = frozenset("""
    attn_implementation cache_dir center_unembed default_padding_side default_prepend_bos device device_map dtype fold_ln
    local_files_only low_cpu_mem_usage move_to_device n_devices token torch_dtype trust_remote_code
""".split())
# Of attention's inside, which these rewrite, the residual stream shows nothing.
_INSIDE = frozenset("fold_value_biases refactor_factored_attn_matrices".split())
_WRITTEN = re.compile(r"(hook_embed|hook_pos_embed|blocks\.\d+\.(hook_resid_(pre|mid|post)|hook_attn_out|hook_mlp_out))")
_LAYER_NORM = re.compile(r"gpt|pythia|neox|opt-|bloom|stanford|phi-?[12]\b|phi-1|gelu-|solu-|attn-only|tiny-?stories|santacoder")
_RMS_NORM = re.compile(r"llama|gemma|qwen|qwq|mistral|mixtral|phi-?[34]|olmo-?2|smollm|\byi-|deepseek")


def input_norm(kwargs: Mapping, model: str, hookpoints: tuple[str, ...], norm: str, source: str) -> str:
    """`SAEConfig.input_norm`, from the one that the SAE itself has. Raises `FormatError` naming each key that is not computed."""
    said, refused = {name: value for name, value in kwargs.items() if value not in (None, False)}, []
    inside = any("hook_z" in name or ".attn." in name or "normalized" in name for name in hookpoints)
    for name in said.keys() - _HARMLESS - (frozenset() if inside else _INSIDE) - {"center_writing_weights"}:
        refused.append(f"{KEY}.{name}={said[name]!r} (changes what the SAE read, and is not computed)")
    if "fold_ln" in said and any("normalized" in name for name in hookpoints):
        refused.append(f"{KEY}.fold_ln=True (changes what the SAE read at {', '.join(hookpoints)}, and is not computed)")
    centred = "center_writing_weights" in said and any(map(_WRITTEN.fullmatch, hookpoints))
    short = model.rsplit("/", 1)[-1].lower()
    layer_norm = bool(_LAYER_NORM.search(short))
    if centred and not layer_norm and not _RMS_NORM.search(short):
        refused.append(f"{KEY}.center_writing_weights=True (it centres models with LayerNorm, and whether {model!r} is one is "
                       "not known here; give metadata.model_name its name on the hub)")
    if centred and norm not in (NONE, LAYER_NORM):
        refused.append(f"{KEY}.center_writing_weights=True beside normalize_activations={norm!r}")
    if refused:
        raise FormatError(f"{source}: {'; '.join(sorted(refused))}")
    return CENTER if centred and layer_norm and norm == NONE else norm
