"""The notebooks run as they are, from a kernel of their own."""

import os
import pathlib

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the kernel's client, not of jft
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, 4)
    assert all(cell.outputs is not None and cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    resources = {"metadata": {"path": str(tmp_path)}}
    # They train for a thousand steps, longer than XLA takes to optimise; and some train by the same program.
    cache = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).with_name("optimized")
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    client = nbclient.NotebookClient(notebook, timeout=400, kernel_name="python3", resources=resources)
    client.execute(env=environment)
