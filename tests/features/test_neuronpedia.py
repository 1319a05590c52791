"""The export for Neuronpedia against the index; SAEDashboard's own classes read it in benchmarks/ecosystem.py."""

import json

import numpy as np
import pytest

from saejax.base.errors import FeatureIndexError
from saejax.features.index import neuronpedia
from saejax.features.index.reader import FeatureIndex
from tests.features.conftest import DEAD, FEATURES

LISTS = {f"{name}_{part}" for name, part in (
    *((f"correlated_{of}", p) for of in ("neurons", "features") for p in ("indices", "l1", "pearson")),
    *(("neuron_alignment", p) for p in ("indices", "values", "l1")),
    *((of, p) for of in ("neg", "pos") for p in ("str", "values")),
    *((f"{of}_hist_data_bar", p) for of in ("freq", "logits") for p in ("heights", "values")))}
FIELDS = LISTS | {"feature_index", "frac_nonzero", "n_prompts_total", "n_tokens_in_prompt", "dataset", "decoder_weights_dist",
                  "activations", "vector"}  # NeuronpediaDashboardFeature of SAEDashboard 0.8.0


@pytest.fixture
def batch(index, tmp_path):
    assert neuronpedia.write(index, tmp_path, name="my set", dataset="a corpus") == FEATURES - len(DEAD)
    assert {file.name for file in tmp_path.iterdir()} == {"batch-0.json", "skipped_indexes.json"}
    assert json.loads((tmp_path / "skipped_indexes.json").read_text())["skipped_indexes"] == list(DEAD)
    return json.loads((tmp_path / "batch-0.json").read_text())


def test_every_feature_that_fires_with_every_field(index, batch):
    features = batch.pop("features")
    assert batch == {"model_id": "tiny", "layer": 1, "sae_set": "my set", "sae_id_suffix": None}
    assert [f["feature_index"] for f in features] == [i for i in range(FEATURES) if i not in DEAD]
    assert all(set(f) == FIELDS and all(isinstance(f[name], list) for name in LISTS) for f in features)
    assert [f["frac_nonzero"] for f in features] == [d for d in index.column("density") if d]
    assert {(f["n_prompts_total"], f["n_tokens_in_prompt"], f["dataset"]) for f in features} == {
        (*index.tokens_NT.shape, "a corpus")}


def test_what_is_said_of_a_feature(index, batch):
    feature, row, examples = batch["features"][3], index.rows(3, 4)[0], index.examples(3)
    assert sum(feature["freq_hist_data_bar_heights"]) == row["fired"]
    assert feature["freq_hist_data_bar_values"][-1] <= row["max"] + row["linear_width"] / 2
    known = len(index.vocabulary)  # the model has rows beyond it
    texts = [index.vocabulary[i] if i < known else f"token {i}" for i in row["logit_ids"]]
    assert feature["pos_str"] + feature["neg_str"] == texts
    assert feature["pos_values"][0] > 0 > feature["neg_values"][0]
    assert len(feature["activations"]) == len(examples)
    for activation, example in zip(feature["activations"], examples, strict=True):
        at, context = activation["qualifying_token_index"], index.tokens_NT[example["context"]]
        assert activation["tokens"][at] == index.vocabulary[context[example["position"]]]
        assert activation["values"][at] == pytest.approx(example["value"], abs=0.02 * row["max"])
        if example["interval"]:
            assert activation["bin_min"] - 1e-3 < example["value"] <= activation["bin_max"] + 1e-3
        else:
            assert (activation["bin_min"], activation["bin_max"], activation["bin_contains"]) == (-1, round(row["max"], 3), -1)
    shares = {a["bin_min"]: a["bin_contains"] for a in feature["activations"] if a["bin_min"] >= 0}
    np.testing.assert_allclose(sum(shares.values()), row["density"], rtol=0.2)


def test_a_place_without_a_layer_is_refused(index, tmp_path):
    manifest = index.manifest | {"sae": index.manifest["sae"] | {"hookpoints": ["embed"]}}
    with pytest.raises(FeatureIndexError, match="hookpoint embed lies in no block"):
        neuronpedia.write(FeatureIndex(index.path, manifest), tmp_path, name="a", dataset="b")
