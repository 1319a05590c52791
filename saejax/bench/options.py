"""What is measured and how often; figures and their spread."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

BENCHMARKS = {
    "selection": "choosing the active features of a batch, per row (topk) and over the whole batch (batchtopk)",
    "step": "whole training steps on the dense and on the sparse path: gradients, Adam, constraints, the same rows in each",
    "devices": "whole training steps with the dictionary split over more and more devices",
    "tokens": "documents to token store against the tokenizer alone on the same documents",
    "writer": "shards of one, four and sixteen hookpoints against tensorstore writing the same arrays",
    "reader": "shuffled batches of a store against sequential reading of it through tensorstore",
    "harvest": "text to activation store: tokens, language model, copies and disk",
}


@dataclass(frozen=True)
class BenchOptions:
    """kind: recipes of `saejax.config`, with commas between; devices: how many, several numbers with commas between.

    steps: in a repeat, dispatched one after the other. compute_dtype: `train.compute_dtype`. tokens: of a repeat of `harvest`.
    megabytes: of activations, of a repeat of `reader` and `writer`.
    """

    only: str = ",".join(BENCHMARKS)
    kind: str = "topk,batchtopk,relu"
    d_in: int = 768
    d_sae: int = 16_384
    batch: int = 1024
    k: int = 32
    steps: int = 5
    repeats: int = 5
    devices: str = "1,2,4,8"
    compute_dtype: str = "auto"
    megabytes: int = 1000
    tokens: int = 32_768
    model: str = "smollm2-135m"
    source: str = "shakespeare"
    hookpoint: str = "blocks.9.hook_resid_post"

    @property
    def kinds(self) -> list[str]:
        return self.kind.split(",")

    @property
    def device_counts(self) -> list[int]:
        return [int(n) for n in self.devices.split(",")]

    def to_json(self) -> dict:
        return asdict(self)


def figure(what: str, unit: str, values: Sequence[float], **more) -> dict:
    """One row: median, first and third quartile of the repeats; `more` are further plain values."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return {"what": what, "unit": unit, "median": statistics.median(values), "low": low, "high": high, "repeats": len(values),
            **more}
