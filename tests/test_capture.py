"""A captured step trains as the plain one; without CUDA by its eager twin, which shares all but the graph."""

import copy

import pytest
import torch
from torch import nn
from tqdm import tqdm

from training import capture
from training.capture import CapturedStep
from training.loop import TrainStep, train_epoch


def parts(device: torch.device) -> TrainStep:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Dropout(0.2), nn.Linear(8, 4)).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-3, fused=device.type == "cuda")
    return TrainStep(net, optimizer, device, 0.1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def batches(device):
    generator = torch.Generator().manual_seed(1)
    made = [(torch.randn(size, 3, 8, 8, generator=generator), torch.randint(0, 4, (size,), generator=generator))
            for size in (16, 16, 16, 5)]
    return [(images.to(device), labels.to(device)) for images, labels in made]


def trained(step: TrainStep | CapturedStep, plain: TrainStep, batches: list, epochs: range = range(3)) -> list:
    """The results of epochs with a falling learning rate."""
    results = []
    for epoch in epochs:
        plain.optimizer.param_groups[0]["lr"] = 0.5 / (epoch + 1)
        torch.manual_seed(epoch)
        with tqdm(disable=True) as bar:
            results.append(train_epoch(step, batches, bar))
    return results


def everything(step: TrainStep) -> list[torch.Tensor]:
    momentum = [step.optimizer.state[p]["momentum_buffer"] for p in step.net.parameters()]
    return [*step.net.state_dict().values(), *momentum]


def test_a_captured_step_trains_as_the_plain_one(device, batches):
    plain, inner = parts(device), parts(device)
    captured = CapturedStep(inner)
    expected, results = trained(plain, plain, batches), trained(captured, inner, batches)
    assert captured.possible
    assert len(captured.recorded) == 2  # the short last batch has its own
    tolerance = 1e-2 if device.type == "cuda" else 1e-5  # bfloat16, and sums in another order
    assert [loss for loss, _ in results] == pytest.approx([loss for loss, _ in expected], rel=tolerance)
    for one, other in zip(everything(plain), everything(inner), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_recording_changes_nothing(device, batches):
    step = parts(device)
    trained(step, step, batches, range(1))
    before, sums = copy.deepcopy(everything(step)), step.figures.sums.clone()
    random_states = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if device.type == "cuda" else [])]
    captured = CapturedStep(step)
    captured._record(*batches[0])
    assert all(torch.equal(one, other) for one, other in zip(before, everything(step), strict=True))
    assert torch.equal(sums, step.figures.sums)
    now = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if device.type == "cuda" else [])]
    assert all(torch.equal(one, other) for one, other in zip(random_states, now, strict=True))
    assert step.optimizer.param_groups[0]["lr"] == 0.5


def test_the_learning_rate_of_a_recording_can_change(device, batches):
    step = parts(device)
    captured = CapturedStep(step)
    trained(captured, step, batches, range(1))
    for group in step.optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.clone() for p in step.net.parameters()]
    captured(*batches[0])
    assert all(torch.equal(one, other) for one, other in zip(before, step.net.parameters(), strict=True))


def test_where_recording_fails_the_plain_step_runs(device, batches, monkeypatch, capsys):
    def failing(run):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(capture, "_graph", failing)
    monkeypatch.setattr(capture, "_eager_twin", failing)
    plain, inner = parts(device), parts(device)
    captured = CapturedStep(inner)
    expected, results = trained(plain, plain, batches), trained(captured, inner, batches)
    out = capsys.readouterr()
    assert (out.out + out.err).count("can't be captured, so it runs uncaptured (operation not permitted") == 1
    assert not captured.possible
    if device.type == "cpu":
        assert expected == results
        assert all(torch.equal(one, other) for one, other in zip(everything(plain), everything(inner), strict=True))


def test_a_warm_up_that_fails_changes_nothing(device, batches):
    step = parts(device)
    trained(step, step, batches, range(1))
    before, calls = copy.deepcopy(everything(step)), iter(range(100))
    step.net[0].register_forward_hook(lambda *_: 1 / 0 if next(calls) == 1 else None)
    captured = CapturedStep(step)
    with pytest.raises(ZeroDivisionError):
        captured(*batches[0])
    assert all(torch.equal(one, other) for one, other in zip(before, everything(step), strict=True))
    assert step.optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.gpu
def test_a_network_that_reads_from_the_gpu_runs_uncaptured(capsys):
    device = torch.device("cuda")
    step = parts(device)
    step.net[0].register_forward_hook(lambda layer, inputs, output: output * output.sum().item())
    captured = CapturedStep(step)
    batch = torch.randn(16, 3, 8, 8, device=device), torch.zeros(16, dtype=torch.long, device=device)
    for _ in range(3):
        captured(*batch)
    assert not captured.possible
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.rand(4, device=device).isfinite().all()
    out = capsys.readouterr()
    assert (out.out + out.err).count("can't be captured") == 1


def test_memory_that_runs_out_in_a_recording_is_not_taken_for_something_else(device, batches, monkeypatch):
    def starving(run):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(capture, "_graph", starving)
    monkeypatch.setattr(capture, "_eager_twin", starving)
    with pytest.raises(torch.OutOfMemoryError):
        CapturedStep(parts(device))(*batches[0])


def test_capture_without_cuda_says_so(run):
    status, out, _ = run("--epochs", "1", "--capture")
    assert status == 0
    assert out.count("Steps are not captured") == 1
