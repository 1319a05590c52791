"""An index as the feature JSON that Neuronpedia imports: the `batch-N.json` of SAEDashboard's Neuronpedia runner (0.8.0).

What the index does not hold stays empty: histogram of logits, neuron alignment, correlated neurons and features (the index
correlates firing, not activations), weights by head, vectors.
"""

import json
import re
from pathlib import Path

import numpy as np

from saejax.base.errors import FeatureIndexError
from saejax.base.logs import Progress
from saejax.base.storage import disk_errors, write_bytes
from saejax.features.index.examples import INTERVALS
from saejax.features.index.reader import GROUP, FeatureIndex

_EMPTY = ("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices",
          "correlated_neurons_l1", "correlated_neurons_pearson", "correlated_features_indices", "correlated_features_l1",
          "correlated_features_pearson", "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist",
          "vector")
SKIPPED = "skipped_indexes.json"


def write(index: FeatureIndex, out: Path, *, name: str, dataset: str, progress: bool = True) -> int:
    """Writes `batch-N.json` of up to 256 features each, and the features that never fire to `skipped_indexes.json`, into `out`;
    returns how many features were written.

    name: of the set of SAEs. dataset: of the corpus, as Neuronpedia shows it. Raises `FeatureIndexError` for a hookpoint that
    lies in no block: Neuronpedia files SAEs by layer.
    """
    described = index.manifest["sae"]
    hookpoint = described["hookpoints"][-1]
    layer = re.fullmatch(r"blocks\.(\d+)\..+", hookpoint)
    if layer is None:
        raise FeatureIndexError(f"{index.path}: hookpoint {hookpoint} lies in no block, and Neuronpedia files SAEs by layer")
    batch = {"model_id": described["model"], "layer": int(layer[1]), "sae_set": name, "sae_id_suffix": None}
    contexts, length = index.tokens_NT.shape
    seen = {"n_prompts_total": contexts, "n_tokens_in_prompt": length, "dataset": dataset}
    silent, rows = np.flatnonzero(index.column("fired") == 0), index.manifest["totals"]["kept_rows"]
    with disk_errors(out), Progress("export", index.features, unit="feature", enabled=progress) as bar:
        for number, first in enumerate(range(0, index.features, GROUP)):
            last = min(first + GROUP, index.features)
            examples = {}
            for example in index.examples(first, last):
                examples.setdefault(example["feature"], []).append(example)
            features = [_feature(index, row, examples.get(row["feature"], []), rows) | seen
                        for row in index.rows(first, last) if row["fired"]]
            write_bytes(out / f"batch-{number}.json", _json(batch | {"features": features}))
            bar.advance(last - first)
        write_bytes(out / SKIPPED, _json({"model_id": batch["model_id"], "layer": layer[1], "sae_set": name, "log_sparsity": None,
                                          "skipped_indexes": silent.tolist()}))
    return index.features - len(silent)


def _json(value: dict) -> bytes:
    return json.dumps(value, allow_nan=False).encode()


def _rounded(values) -> list[float]:
    """Three decimals, as SAEDashboard rounds."""
    return [round(float(value), 3) for value in values]


def _feature(index: FeatureIndex, row: dict, examples: list[dict], rows: int) -> dict:
    ids, effects = row["logit_ids"] or [], row["logit_effects"] or []
    half = len(ids) // 2
    counts = row["linear_counts"][:int(row["max"] / row["linear_width"]) + 1]  # no bar lies beyond the maximum
    bounds = [(row["max"] * i / INTERVALS, row["max"] * (i + 1) / INTERVALS, count / rows)
              for i, count in enumerate(row["interval_counts"])]
    return dict.fromkeys(_EMPTY, []) | {
        "feature_index": row["feature"], "frac_nonzero": row["density"],
        "pos_str": [*map(index.token, ids[:half])], "pos_values": _rounded(effects[:half]),
        "neg_str": [*map(index.token, ids[half:])], "neg_values": _rounded(effects[half:]),
        "freq_hist_data_bar_heights": counts,
        "freq_hist_data_bar_values": [round((i + 0.5) * row["linear_width"], 5) for i in range(len(counts))],
        "activations": [_activation(index, example, row["max"], bounds) for example in examples]}


def _activation(index: FeatureIndex, example: dict, top: float, bounds: list[tuple]) -> dict:
    """interval 0: a top example, for which SAEDashboard writes -1, the maximum and -1."""
    interval, start = example["interval"], example["start"]
    low, high, share = bounds[interval - 1] if interval else (-1, top, -1)
    tokens, acts, shown_by = index.shown(example["context"], start, example["acts"])
    return {"bin_min": round(low, 3), "bin_max": round(high, 3), "bin_contains": round(share, 5),
            "tokens": tokens, "values": _rounded(acts),
            "qualifying_token_index": shown_by[example["position"] - start]}
