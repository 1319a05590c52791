"""Runs a notebook as somebody does who has this package: one device, this interpreter, this checkout.

    python -m tests.docs.executing docs/tutorials/notebook.ipynb      # again, with what it prints and draws
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
# Of the test suite, which has eight devices and compiles for speed of compilation.
DROPPED = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "MPLBACKEND")


def environment() -> dict[str, str]:
    """As a user has it, this checkout first on the path."""
    kept = {name: value for name, value in os.environ.items() if name not in DROPPED}
    return kept | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def executed(file: Path, folder: Path, timeout: int = 1200) -> nbformat.NotebookNode:
    """The notebook after all its cells ran in `folder`; timeout: seconds a cell. Raises `CellExecutionError`."""
    notebook = nbformat.read(file, as_version=4)
    with tempfile.TemporaryDirectory() as kernels:
        spec = Path(kernels) / "this" / "kernel.json"
        spec.parent.mkdir()
        spec.write_text(json.dumps({"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                                    "display_name": "this interpreter", "language": "python"}))
        manager = AsyncKernelManager(kernel_name="this", kernel_spec_manager=KernelSpecManager(kernel_dirs=[kernels]))
        client = NotebookClient(notebook, km=manager, timeout=timeout, resources={"metadata": {"path": str(folder)}},
                                record_timing=False)
        client.execute(env=environment())
    return notebook


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what differs from machine to machine: metadata of cells, versions, what was only said on the way."""
    notebook.metadata = nbformat.from_dict({"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                                            "language_info": {"name": "python"}})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
    return notebook


if __name__ == "__main__":
    for name in map(Path, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as place:
            nbformat.write(cleaned(executed(name, Path(place))), name)
