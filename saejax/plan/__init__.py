"""What an experiment needs: memory, collectives, step time and days of a config on a pod, before the pod is booked."""

from saejax.plan.plan import make_plan
from saejax.plan.show import as_json, as_table

__all__ = ["as_json", "as_table", "make_plan"]
