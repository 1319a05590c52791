"""The house: docs/explanation/architecture.md says what each room may import; no circle of files or rooms; short functions."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "saejax"
FILES = sorted(ROOT.rglob("*.py"))
TABLE = (Path(__file__).parents[1] / "docs" / "explanation" / "architecture.md").read_text().split("More that the test holds")[0]
ALLOWED = {room: set(re.findall(r"`(\w+)`", targets))
           for room, targets in re.findall(r"^\| `(\w+)` \|.*\| ?((?:`\w+` ?)*)\|$", TABLE, re.MULTILINE)}
# What spells flags of other programs, or runs Python as users do.
FOREIGN_FLAGS = ("base/assets", "bench/run", "train/profile", "config/reference", "__init__")


def module(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


def dotted(path: Path) -> str:
    return ".".join(("saejax", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {dotted(path): path for path in FILES}


def targets(path: Path) -> set[str]:
    """The modules of saejax that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if (node.module or "").split(".")[0] == "saejax":
                names = (f"{node.module}.{alias.name}" for alias in node.names)
                found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "saejax"}
    return found - {dotted(path)}


GRAPH = {name: targets(path) for name, path in MODULES.items()}


def room(name: str) -> str:
    """The first component below `saejax`; "" is the package itself."""
    return (*name.split("."), "")[1]


def folder(name: str) -> str:
    path = MODULES[name]
    return path.parent.relative_to(ROOT).as_posix()


def circle(graph: dict[str, set[str]]) -> set[str]:
    """The nodes that lie on a circle, or between two; empty where there is none."""
    graph = {node: targets & graph.keys() - {node} for node, targets in graph.items()}
    while leaves := {node for node, targets in graph.items() if not targets}:
        graph = {node: targets - leaves for node, targets in graph.items() if node not in leaves}
    return set(graph)


def test_the_circle_test_finds_circles():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == {"a", "b", "c"} and circle({"a": {"b"}, "b": set()}) == set()


def test_every_import_is_of_a_module():
    for name, found in GRAPH.items():
        assert found <= MODULES.keys(), f"{name} imports {found - MODULES.keys()}"


def test_files_have_no_circle():
    assert not circle(GRAPH)


def test_rooms_have_no_circle():
    """Rooms within rooms, too, as features/search."""
    graph = {}
    for name, found in GRAPH.items():
        graph.setdefault(folder(name), set()).update(folder(target) for target in found)
    assert not circle(graph)


def test_the_table_is_what_the_rooms_import():
    used = {}
    for name, found in GRAPH.items():
        used.setdefault(room(name), set()).update(room(target) for target in found)
    used.pop(""), used.pop("__main__")  # the package itself, which opens doors
    assert used.keys() == ALLOWED.keys(), "a room that the table does not have, or that is gone"
    for name, found in used.items():
        assert found - {name} == ALLOWED[name], f"{name}: imports {sorted(found - {name})}, the table: {sorted(ALLOWED[name])}"


def test_no_job_imports_a_job():
    for name, found in GRAPH.items():
        if name.startswith("saejax.cli.jobs."):
            assert not {t for t in found if t.startswith("saejax.cli.jobs")}, name


@pytest.mark.parametrize("path", FILES, ids=module)
def test_names_of_options_stand_in_cli_only(path):
    if module(path).startswith(("cli/", *FOREIGN_FLAGS)):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not (found := re.search(r"(?<![\w-])--[a-z][\w-]*", node.value)), f"{module(path)}: {found[0]}"


@pytest.mark.parametrize("path", [p for p in FILES if module(p).startswith(("features/", "judging/"))], ids=module)
def test_features_and_judging_take_values(path):
    names = {alias.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
             for alias in node.names}
    assert not names & {"Subject", "Config"}


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
