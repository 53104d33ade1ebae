"""benchmarks/cuda_speed.py, as far as it goes without a GPU."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT

BENCHMARK = [sys.executable, str(ROOT / "benchmarks" / "cuda_speed.py")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run for minutes")
def test_without_cuda_it_says_so_in_one_line():
    done = subprocess.run(BENCHMARK, capture_output=True, text=True)
    assert done.returncode == 1
    assert (done.stdout, done.stderr) == ("", "benchmarks/cuda_speed.py measures on a CUDA GPU, and this PyTorch finds none\n")


def test_a_part_runs_on_the_cpu():
    done = subprocess.run([*BENCHMARK, "--tiny", "--part", "compiled"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith('result: ["a step on images that are there')
