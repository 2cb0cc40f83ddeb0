"""Execute notebooks in place, and make them fit to be committed.

    python notebooks/execute.py                     # all of them
    python notebooks/execute.py notebooks/01_*.ipynb

Run this after changing any code cell: it stores in the notebook a hash of the code cells that its outputs come from,
which tests/test_notebooks.py checks. What changes from run to run is left out: times, progress bars, the
versions of this machine. The picture of the cell tagged `picture` is written beside the notebook too, for the README.
"""
import base64
import hashlib
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).resolve().parent


def code_hash(notebook):
    """SHA-256 of the code cells, in their order."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def smaller(png):
    """A PNG picture, base64, in 32 colours of its own: a fraction of the size, and nobody sees it."""
    picture, out = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), io.BytesIO()
    picture.quantize(32, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def execute(notebook, cwd=FOLDER, timeout=600):
    """A copy of the notebook with new outputs. CellExecutionError when a cell raises.

    The kernel is this very Python, whatever kernels the machine has installed; it starts in `cwd` and keeps its own
    files in a temporary folder. Progress bars are dropped, other words on stderr (warnings) are kept."""
    notebook = nbformat.from_dict(notebook)
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    client = NotebookClient(notebook, km=manager, timeout=timeout, record_timing=False, coalesce_streams=True,
                            extra_arguments=["--log-level=ERROR"], resources={"metadata": {"path": str(cwd)}})
    with tempfile.TemporaryDirectory() as folder:
        client.execute(cleanup_kc=True, env=os.environ | {"IPYTHONDIR": folder, "PYDEVD_DISABLE_FILE_VALIDATION": "1"})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs
                            if not (output.get("name") == "stderr" and re.search(r"\d+%\||^\s*$", output.text))]
            for data in (output.data for output in cell.outputs if "image/png" in output.get("data", {})):
                data["image/png"] = smaller(data["image/png"])
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
                         "language_info": {"name": "python"}, "code_sha256": code_hash(notebook)}
    return notebook


def picture(notebook):
    """The PNG file that the one cell tagged `picture` has drawn: bytes."""
    [cell] = [cell for cell in notebook.cells if "picture" in cell.metadata.get("tags", [])]
    [png] = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
    return base64.b64decode(png)


def main(paths):
    for path in map(Path, paths or sorted(FOLDER.glob("*.ipynb"))):
        notebook = execute(nbformat.read(path, as_version=4))
        nbformat.write(notebook, path)
        path.with_suffix(".png").write_bytes(picture(notebook))
        print(f"{path}: {path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main(sys.argv[1:])
