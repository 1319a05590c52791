"""What the files of an SAE leave open and nobody gave: all of it, in one line."""

from collections.abc import Sequence

from saejax.base.records import MADE_ELSEWHERE, UNKNOWN
from saejax.config import Config
from saejax.sae.inference import SAEConfig

HOOKPOINT = ("where in it it reads", "hookpoint=NAME (as blocks.9.hook_resid_post)")
MODEL = ("which model it is for", "model=NAME")
TEXT = ("what text it is for", "text=SOURCES (presets, files, directories or hub ids, with commas between)")
INDEX = ("where its index lies", "index=DIR")
OUT = ("where results go", "out=DIR")


def of(files: SAEConfig, given, config: Config | None, *, text: bool) -> list[tuple[str, str]]:
    """(what is not known, how it is given) of model and hookpoint, and of the text where that is needed too.

    given: `subject.Given`. config: of the run, which says everything, but not the text of activations made elsewhere.
    """
    known = files.metadata.get("text", {}).get("source") if config is None or made_elsewhere(files) else config.text.source
    open_ = [(MODEL, given.model is None and UNKNOWN == (files.model if config is None else config.lm.model)),
             (HOOKPOINT, config is None and given.hookpoint is None and UNKNOWN in files.hookpoints),
             (TEXT, text and not (given.text or known))]
    return [what for what, missing in open_ if missing]


def made_elsewhere(files: SAEConfig) -> bool:
    """True of an SAE that was trained on activations of another pipeline."""
    return bool(files.metadata.get("training", {}).get(MADE_ELSEWHERE))


def said(source, missing: Sequence[tuple[str, str]]) -> str:
    """The line."""
    what, how = (_listed(list(column)) for column in zip(*missing, strict=True))
    return f"{source}: its files do not say {what}; give {how}"


def _listed(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
