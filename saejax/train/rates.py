"""How fast a run is: tokens and FLOPs per second, utilisation of the chips, and the most memory that they needed."""

import time
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from saejax.base import hardware
from saejax.train.member import Member
from saejax.train.step_cost import Work, flops

SHOWN = {"mfu": "mfu", "peak_device_bytes": "peak_GB"}  # metrics that appear behind the progress bar, and under which name


def flops_of_step(member: Member, mesh: Mesh) -> float:
    """Of a step of one SAE, on one device (`step_cost.flops`)."""
    chip = hardware.chip_of(mesh.devices.flat[0])
    return flops(Work.of(member.config, member.spec, mesh.shape["data"], mesh.shape["dict"], chip))


def peak_bytes() -> int | None:
    """The most memory that any device of this process had in use since it started; None where the backend does not count."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    found = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    return max(found, default=None)


class Rates:
    """Rates between two readings. Nothing here waits for a device."""

    def __init__(self, batch: int, flops: Callable[[], float], waited: Callable[[], float], device):
        """flops: of a step of all that train now, on one device; waited: seconds that rows did not come, so far. device: one of
        them.
        """
        self.batch, self.flops, self.waited, self.peak = batch, flops, waited, hardware.peak(device)
        self.before: tuple[int, float, float] | None = None  # step, time, seconds waited

    def at(self, step: int) -> dict[str, float]:
        """Metrics of the steps since the last reading; none at the first."""
        before, self.before = self.before, (step, time.monotonic(), self.waited())
        if before is None or before[0] == step:
            return {}
        steps, seconds, waited = (now - then for now, then in zip(self.before, before, strict=True))
        flops, bytes_ = steps * self.flops() / seconds, peak_bytes()
        return ({"tokens_per_second": steps * self.batch / seconds, "data_wait_share": min(1.0, waited / seconds),
                 "flops_per_second": flops}
                | ({"mfu": flops / self.peak} if self.peak else {})
                | ({"peak_device_bytes": bytes_} if bytes_ is not None else {}))


def on_bar(metrics: dict[str, float]) -> dict[str, float]:
    """What of a metric line the progress bar shows: MFU, or TFLOP/s of a device where its peak is not known; memory."""
    found = {name: metrics[key] / (1e9 if key == "peak_device_bytes" else 1) for key, name in SHOWN.items() if key in metrics}
    if "mfu" not in metrics and "flops_per_second" in metrics:
        found = {"TFLOPs": metrics["flops_per_second"] / 1e12} | found
    return found
