"""The notebook of the documentation: what is stored of it, and that it runs from top to bottom."""

import json
import re
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[2] / "docs").rglob("*.ipynb"))
PLACES = re.compile(r"/(?:home|root|work|tmp|usr|opt|Users)/|site-packages")  # of one machine


def test_there_is_a_notebook():
    assert FILES


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_is_stored_is_whole_and_of_no_machine(file):
    text = file.read_text()
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "python -m tests.docs.executing FILE"
    assert len(text) < 900_000 and not any(cell["metadata"] for cell in cells)
    shown = [output for cell in cells for output in cell["outputs"]]
    for output in shown:
        output.get("data", {}).pop("image/png", None)
    assert not (found := PLACES.search(json.dumps([shown, [cell["source"] for cell in cells]]))), found
    assert not [output for output in shown if output["output_type"] == "error" or output.get("name") == "stderr"]


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_it_runs_from_top_to_bottom(file, tmp_path):
    from tests.docs.executing import executed
    found = [cell for cell in executed(file, tmp_path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in found] == list(range(1, len(found) + 1))
    outputs = [output for cell in found for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    printed = "\n".join(output.get("text", "") or output["data"].get("text/plain", "") for output in outputs)
    assert float(re.search(r"explained variance\s+([\d.]+)", printed)[1]) > 0.65
    assert float(re.search(r"CE recovered\s+([\d.]+)", printed)[1]) > 0.9
    assert "100.0 % and 100.0 % shared" in printed  # with itself, through the files of another library
