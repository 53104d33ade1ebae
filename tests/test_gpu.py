"""What only a GPU can show: pytest -m gpu."""

import pytest
import torch
from safetensors.torch import load_file
from test_program import only_run

from model import Net
from training.loop import Figures
from training.records import read_run

pytestmark = pytest.mark.gpu


def test_the_program_trains_on_a_gpu_and_resumes(run, tmp_path, monkeypatch):
    from training import loop

    train_epoch, calls = loop.train_epoch, iter(range(10))

    def interrupted(*arguments):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return train_epoch(*arguments)

    monkeypatch.setattr(loop, "train_epoch", interrupted)
    assert run("--device", "cuda", "--epochs", "4", "--lr", "0.05", "--workers", "2")[0] == 130
    assert run("--resume")[0] == 0
    found = read_run(only_run(tmp_path))
    assert len(found.rows) == 4
    assert found.record["machine"]["device"].startswith("cuda")
    assert found.rows[-1]["train_loss"] < found.rows[0]["train_loss"]


def test_weights_trained_on_a_gpu_load_on_the_cpu(run, tmp_path):
    run("--device", "cuda", "--epochs", "1")
    net = Net(num_classes=3)
    net.load_state_dict(load_file(only_run(tmp_path) / "final.safetensors"))
    assert net(torch.zeros(1, 3, 32, 32)).isfinite().all()


def test_looking_at_the_figures_waits_for_nothing():
    device = torch.device("cuda")
    figures = Figures(device)
    figures.add(torch.tensor(2.0, device=device), torch.eye(4, device=device), torch.arange(4, device=device))
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert figures.glance() is None
        figures.copied.synchronize()
        assert figures.glance() == (2.0, 100.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")

