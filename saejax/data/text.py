"""A text: where it comes from, how it becomes rows of tokens, and what decides these."""

from dataclasses import dataclass

from saejax.config import Config, TextOptions
from saejax.data.sources import Sources


@dataclass(frozen=True)
class Text:
    """A text and how it becomes rows of tokens."""

    options: TextOptions
    seed: int = 0

    @classmethod
    def of(cls, config: Config) -> "Text":
        """The text of a config, as it was harvested."""
        return cls(config.text, config.seed_of_data)

    def __repr__(self) -> str:
        o = self.options
        return f"Text({', '.join(o.source)}, {o.split}, contexts of {o.context} tokens)"[:150]


def describe(options: TextOptions, sources: Sources, seed: int) -> dict:
    """What decides the token rows, as plain JSON for a manifest; no paths."""
    return {"sources": sources.names, "digest": sources.digest, "field": options.field, "split": options.split,
            "streaming": options.streaming, "shuffle": options.shuffle, "seed": seed, "bos": options.bos,
            "separator": options.separator, "holdout": options.holdout, "special": options.special,
            "mask": sorted(options.mask), **({"packing": options.packing} if options.packing != "packed" else {}),
            **({"revisions": sources.revisions} if sources.revisions else {})}
