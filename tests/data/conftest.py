import pytest


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path, monkeypatch):
    """What `datasets` caches of a test's files goes away with them."""
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_datasets")
