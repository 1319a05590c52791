"""`Fields`: the keys of a model's config. All problems come as one error."""

from collections.abc import Callable, Mapping
from typing import Any

from saejax.base.errors import LMError
from saejax.base.keys import REQUIRED, Keys

# Keys that never change the forward pass at inference.
HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path architectures attention_dropout attn_pdrop auto_map
    bos_token_id cache_implementation chunk_size_feed_forward classifier_dropout dtype embd_pdrop eos_token_id
    finetuning_task gradient_checkpointing hidden_dropout id2label initializer_range is_llama_config label2id n_ctx
    output_attentions output_hidden_states pad_token_id problem_type reorder_and_upcast_attn resid_pdrop return_dict
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj task_specific_params
    tokenizer_class torch_dtype transformers.js_config transformers_version unsloth_fixed unsloth_version use_cache
""".split()
)


class Fields(Keys):
    """The keys of a config, `source` in the error. A null stands for the default, except in `optional`. A key that nobody reads
    is let through when its value is null or false, which is how configs say that something is off.
    """

    def __init__(self, values: Mapping[str, Any], source: str):
        super().__init__(values, f"{source} is not computed by the decoder", LMError, collect=True)

    def value(self, key: str, default: Any = REQUIRED) -> Any:
        value = super().value(key, default)
        return default if value is None else value

    def unread(self) -> list[str]:
        return [key for key in super().unread() if self.values[key] is not None and self.values[key] is not False]

    def optional(self, read: Callable[[str, Any], Any], key: str, default: Any) -> Any:
        """`read`, but None where a null turns the thing off; `default` where the key is absent."""
        return read(key, None if key in self.values else default)

    def only(self, **values: Any) -> None:
        """Keys of which one value is computed."""
        for key, value in values.items():
            self.checked(key, value, (value,).__contains__, f"only {value!r} is computed", value)
