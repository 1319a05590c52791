"""`Fields`: the keys of a model's config. All problems come as one error."""

from collections.abc import Callable, Mapping
from typing import Any

from saejax.base.errors import LMError
from saejax.base.keys import REQUIRED, Keys

# Keys that never change the forward pass at inference.
HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path _num_labels architectures
    attention_dropout attn_dropout attn_pdrop auto_map bad_words_ids begin_suppress_tokens bos_token_id
    cache_implementation chunk_size_feed_forward classifier_dropout decoder_start_token_id diversity_penalty do_sample
    dropout dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing hidden_dropout id2label
    initializer_range is_llama_config label2id length_penalty max_length min_length mlp_dropout model_max_length n_ctx
    n_special no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences output_attentions
    output_hidden_states output_logits output_past output_scores pad_token_id predict_special_tokens prefix problem_type
    remove_invalid_values reorder_and_upcast_attn repetition_penalty resid_dropout resid_pdrop return_dict
    return_dict_in_generate sep_token_id summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p
    torch_dtype torchscript transformers.js_config transformers_version typical_p unk_token_id unsloth_fixed
    unsloth_version use_bfloat16 use_cache xla_device
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
