"""What an index is made from, and what of it differs where a file belongs to another one."""

import json
from pathlib import Path

from saejax.base.errors import FeatureIndexError

_NAMED = {"checkpoint": ("sae", "fingerprint"), "model": ("corpus", "model_digest"), "tokenizer": ("corpus", "tokenizer_digest"),
          "corpus": ("corpus", "digest")}


def differences(recorded: dict, given: dict) -> list[str]:
    """What of `given` is another one than was recorded, both by the names of a manifest; what is not given is not compared."""
    out = []
    for what, (group, name) in _NAMED.items():
        now, was = given.get(group, {}).get(name), recorded.get(group, {}).get(name, "unknown")
        if now not in (None, was):
            out.append(f"another {what} ({name.rpartition('_')[2]} {was[:12]}, given {now[:12]})")
    return out


def check_part(file: Path, recorded: dict, source: dict) -> None:
    """Raises `FeatureIndexError` unless a file of an unfinished index was made from `source`: its name, and what differs."""
    source = json.loads(json.dumps(source))
    if recorded == source:
        return
    known = recorded.keys() == source.keys()
    what = differences(recorded, source) if known else ["another version of saejax"]
    raise FeatureIndexError(f"{file}: part of an unfinished index of {' and '.join(what or ['other settings'])}; delete it, or "
                            "choose another directory")
