"""Prints the plan that tests/plan/golden.json keeps."""

from saejax.plan import as_json, make_plan
from tests.plan.configs import wide

if __name__ == "__main__":
    print(as_json(make_plan(wide(), "v5p:2x4x4")))
