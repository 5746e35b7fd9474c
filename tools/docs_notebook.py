"""Runs the notebooks of the documentation and stores what they print.

python tools/docs_notebook.py            # run each and write its outputs into it
python tools/docs_notebook.py --check    # exit 1 where a cell marked `same` prints something else than is stored

Cells with `same` in their metadata print what does not depend on the machine: bytes, bits, shapes. Losses and scores
may differ in their last places from one processor to another, so those of other cells are shown but not compared.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def executed(path: Path) -> Any:
    """The notebook with new outputs; run in an empty folder, with nothing in it that tells the machine or the time."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), inherited)))  # the kernel's own
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, timeout=600, resources={"metadata": {"path": folder}}, record_timing=False, kernel_name="python3"
        )
        client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":  # warnings name paths of the machine
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def printed(cell: Any) -> str:
    """A cell's text, without its pictures."""
    return "".join(one.get("text", "") or one.get("data", {}).get("text/plain", "") for one in cell.outputs)


def differences(stored: Any, new: Any) -> list[str]:
    """What cells with `same` in their metadata printed, where it is not what they had printed."""
    found = []
    for one, other in zip(stored.cells, new.cells, strict=True):
        if one.metadata.get("same") and printed(one) != printed(other):
            found.append(f"{one.source}\nstored:\n{printed(one)}\nnow:\n{printed(other)}")
    return found


def main() -> int:
    wrong = []
    for path in NOTEBOOKS:
        new = executed(path)
        if "--check" in sys.argv[1:]:
            wrong += [f"{path.name}: {one}" for one in differences(nbformat.read(path, as_version=4), new)]
        else:
            nbformat.write(new, path)
    print("\n".join(wrong), end="")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
