"""What a run keeps of its activation store: the statistics of the hookpoints, and of which store, model and tokenizer they are.
An SAE can then be evaluated as it was when the store is long gone.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from saejax.base.errors import StoreError
from saejax.base.records import ActivationStats
from saejax.base.storage import read_json, write_json
from saejax.data.store import Store

KIND, SCHEMA_VERSION = "saejax-activation-statistics", 1


@dataclass(frozen=True)
class Kept:
    """Digests of what was harvested, and its statistics by hookpoint."""

    store: str
    model: str
    tokenizer: str
    stats: dict[str, ActivationStats]


def of_store(store: Store, hookpoints: Iterable[str]) -> Kept:
    """What a run on these hookpoints of a store keeps of it."""
    return Kept(store.digest, store.spec.model_digest, store.spec.tokenizer_digest,
                {name: store.stats(name) for name in dict.fromkeys(hookpoints)})


def keep(file: Path, kept: Kept) -> None:
    """Writes it, as JSON. Raises `DiskError`."""
    stats = {name: asdict(s) | {"mean_D": s.mean_D.tolist()} for name, s in kept.stats.items()}
    write_json(file, {"kind": KIND, "schema_version": SCHEMA_VERSION, "store": kept.store, "model": kept.model,
                      "tokenizer": kept.tokenizer, "stats": stats})


def read(file: Path) -> Kept | None:
    """What is in the file; None where there is none. Raises `StoreError` for anything else."""
    if not Path(file).is_file():
        return None
    values = read_json(file, StoreError)
    try:
        if values["kind"] != KIND or values["schema_version"] != SCHEMA_VERSION:
            raise StoreError(f"{file}: {values['kind']} schema version {values['schema_version']}, this saejax reads "
                             f"{SCHEMA_VERSION}; use the saejax that wrote it")
        stats = {name: ActivationStats(**s | {"mean_D": np.array(s["mean_D"], np.float64)})
                 for name, s in values["stats"].items()}
        return Kept(values["store"], values["model"], values["tokenizer"], stats)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise StoreError(f"{file}: not readable as statistics ({type(error).__name__}: {error}); delete it, and give the "
                         "store") from error
