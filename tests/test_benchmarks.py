"""The benchmarks, as far as they go without a GPU."""

import subprocess
import sys
import time
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT

from benchmarks import gpu_session, robustness
from tinycnn.data.dataset import Split


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run for minutes")
def test_without_cuda_it_says_so_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_session.py"])
    with pytest.raises(SystemExit, match=r"^benchmarks/gpu_session\.py measures on a CUDA GPU, and this PyTorch finds none$"):
        gpu_session.main()


def test_a_part_runs_on_the_cpu(capsys, monkeypatch):
    monkeypatch.setattr(gpu_session, "TABLE", sys.stdout)
    monkeypatch.setattr(gpu_session, "SIDES", {24: gpu_session.SIDES[24]})
    monkeypatch.setattr(gpu_session, "milliseconds", lambda run, device: run()[0].item())
    gpu_session.steps(Namespace(tiny=True, data_dir=""), "pytorch")
    rows = capsys.readouterr().out.splitlines()
    assert [row.count("|") for row in rows[-17:]] == [5] * 17  # the step, and the 15 kernels that take most of it
    assert "pytorch, 24 x 24" in rows[2]
    assert any("convolution_backward" in row for row in rows[3:])


def test_a_part_that_is_stopped_keeps_its_rows(tmp_path):
    child = f"import time; time.sleep(3); open({str(tmp_path / 'late')!r}, 'w')"
    code = f"import subprocess, sys\nprint('| a row |', flush=True)\nsubprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu_session.run_part([sys.executable, "-c", code], 2) == "| a row |\n\nstopped after 2 s\n"
    time.sleep(2)
    assert not (tmp_path / "late").exists()


def test_a_part_that_fails_keeps_its_rows():
    assert gpu_session.run_part([sys.executable, "-c", "print('| a row |'); 1 / 0"], 60) == (
        "| a row |\n\nfailed: ZeroDivisionError: division by zero\n")


@pytest.mark.slow
def test_all_parts_run_on_the_cpu(tmp_path):
    file = tmp_path / "session.md"
    subprocess.run([sys.executable, "benchmarks/gpu_session.py", "--tiny", "--output", file], cwd=ROOT, check=True)
    text = file.read_text()
    assert text.count("\n### ") + 1 == len(gpu_session.PARTS)
    assert "failed" not in text
    assert "stopped" not in text


def test_disturbed_images_keep_their_colours():
    """OpenCV's order of channels is another one."""
    images = np.full((2, 32, 32, 3), (200, 100, 50), np.uint8)
    for name, disturb in robustness.DISTURBANCES.items():
        found = robustness.disturbed(Split(images, np.arange(2)), disturb)
        assert found.images.dtype == np.uint8
        assert np.abs(found.images.mean((0, 1, 2)) - images[0, 0, 0]).max() < 1, name
        assert (found.images != images).any() == (name == "noise 10")
