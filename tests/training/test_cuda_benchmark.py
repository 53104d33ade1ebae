"""benchmarks/cuda_speed.py, as far as it goes without a GPU."""

import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from benchmarks import cuda_speed

BENCHMARKS = ROOT / "benchmarks"


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run for minutes")
@pytest.mark.parametrize("name", ["cuda_speed", "fused_launches"])
def test_without_cuda_it_says_so_in_one_line(name):
    done = subprocess.run([sys.executable, BENCHMARKS / f"{name}.py"], capture_output=True, text=True)
    assert done.returncode == 1
    assert (done.stdout, done.stderr) == ("", f"benchmarks/{name}.py measures on a CUDA GPU, and this PyTorch finds none\n")


@pytest.mark.parametrize(("part", "count"), [("formats", 10), ("profile_eager", 21)])
def test_a_part_runs_on_the_cpu(part, count):
    lines = cuda_speed.run_part(part, cuda_speed.Options("data", tiny=True), 600)
    assert len(lines) == count  # a header, and a row for each way, or kernel
    assert not any("left out" in line or "failed" in line for line in lines)


def test_a_part_that_takes_too_long_is_stopped_and_keeps_its_lines(monkeypatch, tmp_path):
    child = f"import time; time.sleep(4); open({str(tmp_path / 'late')!r}, 'w')"
    (tmp_path / "part.py").write_text("import subprocess, sys\nprint('result: a line', flush=True)\n"
                                      f"subprocess.run([sys.executable, '-c', {child!r}])\n")
    monkeypatch.setattr(cuda_speed, "__file__", str(tmp_path / "part.py"))
    assert cuda_speed.run_part("formats", cuda_speed.Options("", tiny=True), 2) == [
        "a line", "formats: stopped, it took more than 2 s"]
    time.sleep(3)
    assert not (tmp_path / "late").exists()
