"""What an experiment needs: memory, collectives, step time and days of a config on a pod, before the pod is booked; and what to
train for a budget, by a fitted law.
"""

from saejax.plan.budget import read, recommend
from saejax.plan.plan import make_plan
from saejax.plan.show import as_json, as_table
from saejax.plan.show_budget import budget_table

__all__ = ["as_json", "as_table", "budget_table", "make_plan", "read", "recommend"]
