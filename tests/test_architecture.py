"""The house table: which room may import which, and how long files and functions may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "saejax"
GROUND = ("config", "config_reference", "config_values", "recipes", "contradictions", "records", "sharding", "storage", "logs",
          "errors", "assets", "hardware", "distributed")

# Room -> rooms it may import besides itself. Ground modules are importable from everywhere.
ALLOWED = {
    "ground": set(),
    "lm": set(),
    "sae": set(),
    "data": {"lm"},
    "train": {"data", "sae"},
    "formats": {"train", "sae"},
    "evals": {"data", "lm", "sae"},
    "features": {"data", "lm", "sae"},
    "judging": {"features", "lm", "sae", "report"},
    "scaling": {"data", "sae", "train"},
    "plan": {"data", "lm", "sae", "train"},
    "bench": {"data", "lm", "sae", "train"},
    "report": set(),
    "top": {"lm", "sae", "data", "train", "formats", "evals", "features", "judging", "scaling", "plan", "bench", "report"},
}
TOP = ("__init__", "main", "command_line", "jobs", "feature_jobs", "effect_jobs", "judge_job", "inspect")
# All other modules know at most one of the two.
BOTH_LM_AND_SAE = ("evals/", "features/", "plan", "jobs", "feature_jobs", "effect_jobs", "judge_job")
FILES = sorted(ROOT.rglob("*.py"))


def module(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


def room(name: str) -> str:
    first = name.split("/")[0]
    return "ground" if first in GROUND else "top" if first in TOP else first


def imports(path: Path) -> set[str]:
    """First component below `saejax` of everything a file imports, wherever in the file; "" is the package itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            parts = (node.module or "").split(".")
            if parts[0] == "saejax":
                found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "saejax":
                    found.add(parts[1] if len(parts) > 1 else "")
    return found


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_point_down(path):
    mine = room(module(path))
    assert mine in ALLOWED, f"{path}: a room that the house table does not have"
    for target in imports(path) - {"", "__version__"}:
        other = room(target)
        allowed = other in ("ground", mine) or other in ALLOWED[mine]
        assert allowed, f"{module(path)} ({mine}) imports {target} ({other})"


@pytest.mark.parametrize("path", FILES, ids=module)
def test_only_the_rooms_between_know_language_model_and_sae(path):
    if {"lm", "sae"} <= imports(path):
        assert module(path).startswith(BOTH_LM_AND_SAE), f"{module(path)} imports both lm and sae"


def test_ground_has_no_circles():
    edges = {name: imports(ROOT / f"{name}.py") & set(GROUND) for name in GROUND}
    while edges:
        leaves = [name for name, targets in edges.items() if not targets & edges.keys()]
        assert leaves, f"circle among {sorted(edges)}"
        edges = {name: targets for name, targets in edges.items() if name not in leaves}


def test_only_the_checkpoint_module_knows_orbax():
    users = [module(p) for p in FILES if "orbax" in p.read_text() and any(
        "orbax" in (getattr(n, "module", None) or "") + " ".join(a.name for a in n.names)
        for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, (ast.Import, ast.ImportFrom)))]
    assert users == ["train/checkpoint"]


@pytest.mark.parametrize("path", FILES, ids=module)
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    lines = len(text.splitlines())
    assert lines <= 420, f"{module(path)}: {lines} lines; split it by what its parts know"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{module(path)}: {node.name} has {length} lines"


def test_there_is_no_utils_module():
    assert not [p for p in FILES if p.stem in ("utils", "util", "helpers", "common", "misc")]
