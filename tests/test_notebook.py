"""CIFAR10.ipynb, run from its first cell to its last on a few drawn images."""

import shutil

import pytest
from conftest import NO_NETWORK, ROOT

nbclient = pytest.importorskip("nbclient", reason="requirements-test.txt is not installed")
nbformat = pytest.importorskip("nbformat", reason="requirements-test.txt is not installed")


def test_the_notebook_runs_and_shows_the_pictures(tmp_path, pictures, monkeypatch):
    for name in ("config.py", "augmentation.py", "model.py", "main.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in (*(path.parent.name for path in ROOT.glob("*/__init__.py")), "logs/reference"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, value in NO_NETWORK.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(ROOT / "CIFAR10.ipynb", as_version=4)
    (settings,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    flags = ["--epochs", "1", "--dataset", "folder", "--data-dir", str(pictures), "--threads", "1", "--device", "cpu"]
    settings.source = f"SETTINGS = {flags}"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 8  # the curve, six of the run, the picture
    text = "".join(output.get("text", "") for output in outputs)
    for words in ("Final accuracy: test", "# run: ", "expected calibration error", "with each image also mirrored",
                  "settings", "picture.png: "):
        assert words in text
    assert not any(output.get("name") == "stderr" for output in outputs), outputs


def test_the_notebook_is_committed_without_outputs():
    notebook = nbformat.read(ROOT / "CIFAR10.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
