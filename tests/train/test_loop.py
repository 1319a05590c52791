"""The loop never waits for the step it has just dispatched, and logs what the docs promise."""

from saejax.base.logs import read_metrics
from saejax.train import loop

from .synthetic import make_config, make_store


def test_metrics_are_read_one_step_late(tmp_path, monkeypatch):
    dispatched, read = [], []
    shared_step, read_metrics_of = loop.shared_step, loop._Log._read

    def counted(*args):
        step = shared_step(*args)

        def run(*given):
            dispatched.append(len(dispatched) + 1)
            return step(*given)

        return run

    def late(self, step, metrics):
        read.append((step, dispatched[-1]))
        read_metrics_of(self, step, metrics)

    monkeypatch.setattr(loop, "shared_step", counted)
    monkeypatch.setattr(loop._Log, "_read", late)
    config = make_config("topk", tmp_path / "run", checkpoint__every_tokens=10**6)
    loop.train(config, make_store(tmp_path / "store"))
    assert [step for step, _ in read] == list(range(1, 51))
    assert all(newest == step + 1 for step, newest in read[:-1]), "step n is read when n + 1 is already on its way"


def test_metric_lines_hold_what_is_documented(tmp_path):
    store = make_store(tmp_path / "store")
    common = {"step", "tokens_seen", "loss", "mse", "l0", "fvu", "explained_variance", "dead_fraction", "grad_norm", "lr",
              "tokens_per_second", "flops_per_second", "data_wait_share", "skipped", "skipped_in_row", "epochs_least",
              "epochs_most"}
    for kind, own in (("relu", {"l1", "l1_coefficient"}), ("topk", {"aux"})):
        loop.train(make_config(kind, tmp_path / kind), store)
        lines = read_metrics(tmp_path / kind / "metrics.jsonl")
        assert [line["step"] for line in lines] == list(range(5, 51, 5))
        assert all(line["tokens_seen"] == 32 * line["step"] for line in lines)
        assert set(lines[-2]) == common | own
        epochs = [(line["epochs_least"], line["epochs_most"]) for line in lines]  # 1,600 of 336 rows that are kept
        assert all(least <= most <= least + 1 for least, most in epochs) and epochs == sorted(epochs)
        assert 32 * 50 / store.kept_rows - 2 < epochs[-1][0] <= 32 * 50 / store.kept_rows < epochs[-1][1] + 2
        assert all(0 <= line["data_wait_share"] <= 1 and line["tokens_per_second"] > 0 for line in lines)
