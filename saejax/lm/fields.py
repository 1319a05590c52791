"""`Fields`: reads a model's config key by key, collects every problem, and refuses what is set and nobody read."""

from collections.abc import Mapping
from typing import Any

from saejax.base.errors import LMError

REQUIRED = object()

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


class Fields:
    """The key-value pairs of a config. Each getter notes a problem instead of raising; `finish` raises them as one.

    `label` names the source in the error. A null stands for the default, except in `optional`. A key that nobody reads
    is let through when its value is null or false, which is how configs say that something is off.
    """

    def __init__(self, raw: Mapping[str, Any], label: str, harmless: frozenset[str] = HARMLESS):
        self.raw, self.label = dict(raw), label
        self.seen = set(harmless)
        self.problems: list[str] = []

    def get(self, key: str, default: Any = None) -> Any:
        """The value, unchecked."""
        self.seen.add(key)
        value = self.raw.get(key)
        if value is not None:
            return value
        if default is REQUIRED:
            self.problems.append(f"{key} is missing")
            return None
        return default

    def size(self, key: str, default: Any = REQUIRED) -> int:
        """A whole number of at least 1."""
        value = self.get(key, default)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        if key in self.raw and self.raw[key] is not None:
            self.problems.append(f"{key}={short(value)} (not a size)")
        return 1

    def number(self, key: str, default: Any = REQUIRED) -> float:
        value = self.get(key, default)
        return 1.0 if value is None else self.as_number(key, value)

    def optional(self, key: str, default: float | None) -> float | None:
        """A number that null turns off; `default` where the key is absent."""
        self.seen.add(key)
        value = self.raw.get(key, default)
        return None if value is None else self.as_number(key, value)

    def switch(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            self.problems.append(f"{key}={short(value)} (not true or false)")
            return default
        return value

    def choice(self, key: str, names: Mapping[str, str], default: str) -> str:
        """The decoder's name of a value that the config spells in its own way."""
        value = self.get(key, default)
        if not isinstance(value, str) or value not in names:
            self.problems.append(f"{key}={short(value)} (computed are {', '.join(names)})")
            return names[default]
        return names[value]

    def only(self, **values: Any) -> None:
        """Keys of which one value is computed."""
        for key, value in values.items():
            if self.get(key, value) != value:
                self.problems.append(f"{key}={short(self.raw[key])} (only {value!r} is computed)")

    def ignore(self, *keys: str) -> None:
        """Keys that this kind of model does not use."""
        self.seen.update(keys)

    def as_number(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.problems.append(f"{key}={short(value)} (not a number)")
            return 1.0
        return float(value)

    def numbers(self, key: str, value: Any) -> tuple[float, ...]:
        if not isinstance(value, list | tuple):
            self.problems.append(f"{key}={short(value)} (not a list of numbers)")
            return ()
        return tuple(self.as_number(key, item) for item in value)

    def all_problems(self) -> list[str]:
        """Every problem noted, and every key that was not read and is neither null nor false."""
        return self.problems + [
            f"{key}={short(value)} (unknown field)"
            for key, value in self.raw.items()
            if value is not None and value is not False and key not in self.seen
        ]

    def finish(self) -> None:
        """Raises one LMError with `all_problems`, if there are any."""
        if problems := self.all_problems():
            raise LMError(f"{self.label} is not computed by the decoder: {'; '.join(problems)}")


def short(value: Any) -> str:
    """`repr`, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
