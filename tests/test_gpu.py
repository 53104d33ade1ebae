"""What only a GPU can show: pytest -m gpu."""

import pytest
import torch
from conftest import at_epoch, raising
from safetensors.torch import load_file
from test_program import only_run
from torch import nn
from torch.nn import functional

from config import Config
from model import Net
from training.augment import train_policy
from training.capture import make_step
from training.device_batches import DeviceBatches
from training.images import Split, synthetic
from training.loop import Figures, TrainStep, predict
from training.records import find_runs, read_run

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("how", [("device", "--capture"), ("device", "--no-capture"), ("workers", "--no-capture")])
def test_the_program_trains_on_a_gpu_and_resumes(run, tmp_path, monkeypatch, how):
    at_epoch(monkeypatch, 2, raising(KeyboardInterrupt()))
    first = run("--device", "cuda", "--epochs", "4", "--lr", "0.05", "--workers", "2", "--batches", *how)
    resumed = run("--resume")
    assert (first[0], resumed[0]) == (130, 0)
    assert "captured" not in "".join(first[1:] + resumed[1:])  # a line would say that and why steps are not
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
    figures.images = 4
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert figures.glance() is None
        figures.copied.synchronize()
        assert figures.glance() == (2.0, 100.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_loss_is_computed_in_float32():
    logits = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)).mul(8).bfloat16().cuda().requires_grad_()
    labels = torch.arange(64, device="cuda") % 3
    net = nn.Module()
    net.forward = lambda images: logits
    step = TrainStep(net, torch.optim.SGD([logits], lr=0.0), logits.device, 0.0)
    step(torch.zeros(64, 3, 32, 32, device="cuda"), labels)
    expected = functional.cross_entropy(logits.detach().cpu().double(), labels.cpu())
    assert step.figures.sums[0].item() / 64 == pytest.approx(expected.item(), rel=1e-5)  # bfloat16 is right to 1e-3


def test_device_batches_are_the_same_on_a_gpu():
    split = synthetic().train
    few = Split(split.images[:300], split.labels[:300])
    policy = train_policy(Config(), (0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
    batches = [DeviceBatches({"train": few}, {"train": policy}, 64, 0, torch.device(device)) for device in ("cpu", "cuda")]
    for (images, labels), (on_gpu, gpu_labels) in zip(*(each.shuffled("train", 5) for each in batches), strict=True):
        assert torch.equal(labels, gpu_labels.cpu())
        assert (images != on_gpu.cpu()).float().mean() < 1e-4  # a coordinate may round otherwise
        assert on_gpu.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("captured", [False, True])
def test_an_epoch_on_a_gpu_waits_for_nothing(captured):
    device, split = torch.device("cuda"), synthetic().train
    policy = train_policy(Config(), (0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
    batches = DeviceBatches({"train": split}, {"train": policy}, 128, 0, device)
    net = Net().to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, fused=True)
    step = make_step(net, optimizer, device, Config(capture=captured, batches="device"))
    net.train()
    torch.cuda.empty_cache()
    for images, labels in batches.shuffled("train", 0):  # kernels are chosen, and graphs recorded
        step(images, labels)
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for images, labels in batches.shuffled("train", 1):
            step(images, labels)
        predict(net, batches.in_order("train"), device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.figures.sums.isfinite().all()
    if captured:
        assert step.possible
        assert len(step.recorded) == 2
    assert torch.cuda.max_memory_reserved() < 2e9  # with what graphs keep for themselves


def test_a_captured_run_learns_as_an_eager_one(run, tmp_path):
    for flag in ("--capture", "--no-capture"):
        status, out, err = run("--device", "cuda", "--epochs", "6", "--lr", "0.05", flag)
        assert status == 0
        assert "captured" not in out + err
    eager, captured = (read_run(folder).rows[-1]["train_loss"] for folder in find_runs(tmp_path / "logs"))
    assert captured == pytest.approx(eager, abs=0.2)
