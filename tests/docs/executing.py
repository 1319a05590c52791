"""Runs a notebook as somebody does who has this package: one device, this interpreter, this checkout.

    python -m tests.docs.executing docs/tutorials/notebook.ipynb      # again, with what it prints and draws
"""

import json
import sys
import tempfile
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from tests.processes import as_user

ROOT = Path(__file__).parents[2]


def executed(file: Path, folder: Path, timeout: int = 1200) -> nbformat.NotebookNode:
    """The notebook after all its cells ran in `folder`; timeout: seconds a cell. Raises `CellExecutionError`."""
    notebook = nbformat.read(file, as_version=4)
    with tempfile.TemporaryDirectory() as kernels:
        spec = Path(kernels) / "this" / "kernel.json"
        spec.parent.mkdir()
        spec.write_text(json.dumps({"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                                    "display_name": "this interpreter", "language": "python"}))
        manager = AsyncKernelManager(kernel_name="this", kernel_spec_manager=KernelSpecManager(kernel_dirs=[kernels]))
        client = NotebookClient(notebook, km=manager, timeout=timeout, startup_timeout=300, record_timing=False,
                                resources={"metadata": {"path": str(folder)}})
        client.execute(env=as_user(ROOT))
    return notebook


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what differs from machine to machine: metadata, versions, what was only said on the way (stderr)."""
    notebook.metadata = nbformat.from_dict({"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                                            "language_info": {"name": "python"}})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    for name in map(Path, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as place:
            nbformat.write(cleaned(executed(name, Path(place))), name)
