"""A captured step trains as an eager one, and a wrong recording is refused. Without CUDA by its eager twin, which shares all
but the graph."""

import copy
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from tqdm import tqdm

from config import Config
from model import Net
from tinycnn.runs.record import read_record
from tinycnn.training import capture
from tinycnn.training.capture import CapturedStep, make_step
from tinycnn.training.epoch import train_epoch
from tinycnn.training.errors import StopRequested
from tinycnn.training.optimizer import SGD
from tinycnn.training.step import TrainStep


def make_inner_step(device: torch.device, bias: bool = False) -> TrainStep:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Dropout(0.2), nn.Linear(8, 4)).to(device).to(memory_format=torch.channels_last)
    optimizer = SGD(net.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-3, fused=device.type == "cuda")
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


def train(step: TrainStep | CapturedStep, batches: list, epochs: range = range(3)) -> list:
    """The results of epochs with a falling learning rate."""
    results = []
    for epoch in epochs:
        torch.manual_seed(epoch)
        with tqdm(disable=True) as bar:
            results.append(train_epoch(step, batches, lambda images, epoch=epoch: 0.5 / (epoch + 1), bar))
    return results


def everything(step: TrainStep) -> list[torch.Tensor]:
    momentum = [step.optimizer.state[p]["momentum_buffer"] for p in step.net.parameters()]
    return [*step.net.state_dict().values(), *momentum]


def test_a_captured_step_trains_as_an_eager_one(device, batches):
    plain, inner = make_inner_step(device), make_inner_step(device)
    captured = CapturedStep(inner)
    expected, results = train(plain, batches), train(captured, batches)
    assert captured.possible
    assert len(captured.recordings) == 2  # the short last batch has its own
    assert captured.note.startswith("captured; a replay and an eager step differ by at most")
    tolerance = 1e-2 if device.type == "cuda" else 1e-5  # bfloat16, and sums in another order
    assert [loss for loss, _ in results] == pytest.approx([loss for loss, _ in expected], rel=tolerance)
    for one, other in zip(everything(plain), everything(inner), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_recording_and_checking_change_nothing(device, batches):
    step = make_inner_step(device)
    train(step, batches, range(1))
    before, sums = copy.deepcopy(everything(step)), step.metrics.sums.clone()
    random_states = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if device.type == "cuda" else [])]
    captured = CapturedStep(step)
    captured._prepare(*batches[0])
    assert captured.possible
    assert all(torch.equal(one, other) for one, other in zip(before, everything(step), strict=True))
    assert torch.equal(sums, step.metrics.sums)
    now = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if device.type == "cuda" else [])]
    assert all(torch.equal(one, other) for one, other in zip(random_states, now, strict=True))
    assert step.optimizer.param_groups[0]["lr"] == 0.5


def test_the_learning_rate_of_a_recording_can_change(device, batches):
    step = make_inner_step(device)
    captured = CapturedStep(step)
    train(captured, batches, range(1))
    for group in step.optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.clone() for p in step.net.parameters()]
    captured(*batches[0])
    assert all(torch.equal(one, other) for one, other in zip(before, step.net.parameters(), strict=True))


# ---------------------------------------------------------------- the self-check

# Each makes a wrong recording of `run`, which is the right one.

def frozen_parameter(captured: CapturedStep, run):
    """One parameter stays as it is."""
    return keeping(run, captured.net[0].weight.data)


def frozen_statistics(captured: CapturedStep, run):
    """BatchNorm's running mean stays as it is."""
    return keeping(run, captured.net[1].running_mean)


def uncounted_predictions(captured: CapturedStep, run):
    """Correct predictions are not counted."""
    return keeping(run, captured.metrics.sums[1])


def keeping(run, tensor: torch.Tensor):
    def replay():
        before = tensor.clone()
        run()
        tensor.copy_(before)
    return replay


def old_learning_rate(captured: CapturedStep, run):
    """The learning rate stays that of the recording."""
    recorded = captured.rates[0].clone()

    def replay():
        now = captured.rates[0].clone()
        captured.rates[0].copy_(recorded)
        run()
        captured.rates[0].copy_(now)
    return replay


def old_batch(captured: CapturedStep, run):
    """The images and labels stay those of the recording."""
    cells = dict(zip(run.__code__.co_freevars, run.__closure__, strict=True))
    images, labels = (cells[name].cell_contents.clone() for name in ("images", "labels"))
    return lambda: captured._step(images, labels, captured.own)


def lost_momentum(captured: CapturedStep, run):
    """Each step begins without momentum."""
    def replay():
        for state in captured.optimizer.state.values():
            state["momentum_buffer"].zero_()
        run()
    return replay


def piled_gradients(captured: CapturedStep, run):
    """Gradients are added to those of the step before."""
    def replay():
        captured.optimizer.zero_grad = lambda: None
        run()
        del captured.optimizer.zero_grad
    return replay


def not_a_number(captured: CapturedStep, run):
    """One weight becomes NaN."""
    def replay():
        run()
        captured.net[0].weight.data[0] = float("nan")
    return replay


WRONG = [frozen_parameter, frozen_statistics, uncounted_predictions, old_learning_rate, old_batch, lost_momentum,
         piled_gradients, not_a_number]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_recording_is_refused(batches, device, capsys, wrong):
    plain, inner = make_inner_step(device), make_inner_step(device)
    captured = CapturedStep(inner)
    captured.capture = lambda run: wrong(captured, run)
    expected, results = train(plain, batches), train(captured, batches)
    out = capsys.readouterr()
    assert (out.out + out.err).count("Steps are not captured: a replay's") == 1
    assert not captured.possible
    assert not captured.recordings
    assert captured.note.startswith("not captured: a replay's")
    if device.type == "cpu":  # as if nothing had been recorded
        assert expected == results
        assert all(torch.equal(one, other) for one, other in zip(everything(plain), everything(inner), strict=True))


def test_a_step_that_replaces_tensors_is_refused(batches, device):
    step = make_inner_step(device)

    def replace_momentum(optimizer, *_):
        for state in optimizer.state.values():
            state["momentum_buffer"] = state["momentum_buffer"].clone()

    step.optimizer.register_step_post_hook(replace_momentum)
    captured = CapturedStep(step)
    captured(*batches[0])
    assert not captured.possible
    assert "replaces momentum_buffer of 0.weight" in captured.note


@pytest.mark.parametrize("kind", [  # CUDA can't capture an SGD that is not fused, nor an AdamW that is not capturable
    lambda parameters, cuda: SGD(parameters, lr=0.1, fused=cuda),
    lambda parameters, cuda: SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, fused=cuda),
    lambda parameters, cuda: torch.optim.AdamW(parameters, lr=0.01, fused=True, capturable=cuda)],
    ids=["SGD", "SGD with momentum", "AdamW"])
def test_a_right_recording_passes_whatever_the_optimizer(device, batches, kind):
    step = make_inner_step(device, bias=True)  # whose gradient is nothing but rounding, before a BatchNorm
    step = TrainStep(step.net, kind(step.net.parameters(), device.type == "cuda"), device, 0.0)
    captured = CapturedStep(step)
    train(captured, batches, range(1))
    assert captured.possible, captured.note


@pytest.mark.parametrize("frozen", [None, "input_block.0.weight", "conv_block2.1.2.bias", "head.1.bias"])
def test_the_check_bears_rounding_and_sees_one_frozen_parameter(frozen):
    torch.manual_seed(0)
    net = Net().to(memory_format=torch.channels_last)
    step = TrainStep(net, SGD(net.parameters(), lr=0.01, momentum=0.9), torch.device("cpu"), 0.0)

    def rounded(run):
        def replay():
            exact, step.autocast = step.autocast, torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
            run()
            step.autocast = exact
        return keeping(replay, net.get_parameter(frozen).data) if frozen else replay

    captured = CapturedStep(step)
    captured.capture = rounded
    captured._prepare(torch.randn(16, 3, 32, 32).to(memory_format=torch.channels_last), torch.arange(16) % 10)
    assert captured.possible == (frozen is None), captured.note
    assert 0.02 < captured.difference < 0.4 or frozen


# ---------------------------------------------------------------- where recording fails

def test_where_recording_fails_eager_steps_run(device, batches, monkeypatch, capsys):
    def failing(run):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(capture, "_graph", failing)
    monkeypatch.setattr(capture, "_eager_twin", failing)
    plain, inner = make_inner_step(device), make_inner_step(device)
    captured = CapturedStep(inner)
    expected, results = train(plain, batches), train(captured, batches)
    out = capsys.readouterr()
    assert (out.out + out.err).count("Steps are not captured: the capture failed (operation not permitted") == 1
    assert not captured.possible
    assert captured.note.startswith("not captured: the capture failed")
    if device.type == "cpu":
        assert expected == results
        assert all(torch.equal(one, other) for one, other in zip(everything(plain), everything(inner), strict=True))


@pytest.mark.parametrize("failure", [ZeroDivisionError("bug"), RuntimeError("bug")])
def test_a_warm_up_that_fails_raises_its_own_error_and_changes_nothing(device, batches, failure):
    step = make_inner_step(device)
    train(step, batches, range(1))
    before, calls = copy.deepcopy(everything(step)), iter(range(100))

    def fail(*_):
        if next(calls) == 1:
            raise failure

    step.net[0].register_forward_hook(fail)
    captured = CapturedStep(step)
    with pytest.raises(type(failure), match="bug"):
        captured(*batches[0])
    assert all(torch.equal(one, other) for one, other in zip(before, everything(step), strict=True))
    assert step.optimizer.param_groups[0]["lr"] == 0.5 / 1


def test_memory_that_runs_out_in_a_recording_is_not_taken_for_something_else(device, batches, monkeypatch):
    def starving(run):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(capture, "_graph", starving)
    monkeypatch.setattr(capture, "_eager_twin", starving)
    with pytest.raises(torch.OutOfMemoryError):
        CapturedStep(make_inner_step(device))(*batches[0])


def read_from_the_gpu(step: TrainStep) -> None:
    """The network waits for a figure from the GPU."""
    step.net[0].register_forward_hook(lambda layer, inputs, output: output * output.sum().item())


def use_an_optimizer_that_is_not_fused(step: TrainStep) -> None:
    """The optimizer reads the learning rate from the GPU."""
    step.optimizer = SGD(step.net.parameters(), lr=0.1)


def test_a_signal_in_a_recording_ends_the_run(batches, device, capsys):
    """CUDA then raises an error of its own, because what was begun beside was not ended."""
    def interrupted(run):
        try:
            raise StopRequested(signal.SIGTERM)
        except StopRequested:
            try:
                raise RuntimeError("capture of unjoined work")
            except RuntimeError:
                raise RuntimeError("capture invalidated")  # noqa: B904

    captured = CapturedStep(make_inner_step(device))
    captured.capture = interrupted
    with pytest.raises(StopRequested):
        captured(*batches[0])
    assert capsys.readouterr().out == ""


@pytest.mark.gpu
@pytest.mark.parametrize("spoil", [read_from_the_gpu, use_an_optimizer_that_is_not_fused])
def test_a_step_that_cuda_cannot_capture_runs_eager(capsys, spoil):
    device = torch.device("cuda")
    step = make_inner_step(device)
    spoil(step)
    captured = CapturedStep(step)
    batch = torch.randn(16, 3, 8, 8, device=device), torch.zeros(16, dtype=torch.long, device=device)
    captured(*batch)
    before = step.net[0].weight.clone()
    captured(*batch)
    assert not captured.possible
    assert not torch.equal(before, step.net[0].weight)  # it trains
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.rand(4, device=device).isfinite().all()
    out = capsys.readouterr()
    assert (out.out + out.err).count("Steps are not captured: the capture failed") == 1


# ---------------------------------------------------------------- the fused kernels

def fused_step(monkeypatch, device: torch.device, forward, times: tuple[float, float]) -> CapturedStep:
    """A step with other kernels, made up as `forward` of the network; it takes the first of `times`, PyTorch's the second."""
    step = make_inner_step(device)
    measured = iter(times)
    monkeypatch.setattr(capture, "milliseconds", lambda *_: next(measured))
    return CapturedStep(step, (lambda images: forward(step.net, images), step.own_loss))


def test_fused_kernels_that_are_right_and_faster_train_full_batches(device, batches, monkeypatch):
    sizes = []
    captured = fused_step(monkeypatch, device, lambda net, images: sizes.append(len(images)) or net(images), (1.0, 2.0))
    expected, results = train(make_inner_step(device), batches), train(captured, batches)
    assert set(sizes) == {16}
    assert captured.note.startswith("captured with fused kernels (1.00 ms a step, 2.00 with PyTorch's); a replay")
    assert [loss for loss, _ in results] == pytest.approx([loss for loss, _ in expected], rel=1e-2)
    if device.type == "cpu":
        assert len(sizes) == 3 * 3 + 2  # each full batch, the warm-up and the check
    assert (captured.step.forward, captured.step.loss) == captured.own  # an eager step has PyTorch's


def fail(net, images):
    raise ValueError("no kernel\n  for this GPU")


def fail_to_capture(net, images):
    raise RuntimeError("not in a capture\n  please")


def test_after_a_fused_capture_has_failed_pytorchs_step_is_recorded_again(device, batches, monkeypatch):
    captured, own = fused_step(monkeypatch, device, fail_to_capture, (1.0, 2.0)), []
    capture = captured._capture
    monkeypatch.setattr(captured, "_capture", lambda *inputs: own.append(inputs[2] is captured.own) or capture(*inputs))
    train(captured, batches)
    assert own == [True, False, True, True]  # the last one is of the short batch


@pytest.mark.parametrize(("forward", "times", "note"), [
    (lambda net, images: net(images), (2.0, 1.0), "2.00 ms a step, 1.00 with PyTorch's"),
    (lambda net, images: net(images.flip(0)), (1.0, 2.0), "a replay's "),
    (lambda net, images: net(images).detach() + 0 * net(images), (1.0, 2.0), "a replay's "),
    (fail, (1.0, 2.0), "ValueError: no kernel for this GPU"),
    (fail_to_capture, (1.0, 2.0), "the capture failed (not in a capture)")],
    ids=["slower", "wrong", "no gradients", "failing", "failing to capture"])
def test_fused_kernels_that_are_wrong_or_slower_are_left_out(device, batches, monkeypatch, forward, times, note):
    captured = fused_step(monkeypatch, device, forward, times)
    plain = CapturedStep(make_inner_step(device))
    expected, results = train(plain, batches), train(captured, batches)
    assert captured.possible
    assert captured.note.startswith(f"captured without fused kernels ({note}")
    assert captured.difference == plain.difference or device.type == "cuda"
    if device.type == "cpu":
        assert expected == results
        steps = zip(everything(plain.step), everything(captured.step), strict=True)
        assert all(torch.equal(one, other) for one, other in steps)


@pytest.mark.parametrize(("settings", "device", "printed"), [
    ({"capture": "off", "batches": "device"}, "cuda", "need captured steps, and --capture is off"),
    ({"batches": "device"}, "cpu", "need captured steps, and that needs CUDA"),
    ({"capture": "on", "batches": "device"}, "cuda", "not the fused ones: this GPU has no bfloat16")])
def test_a_line_says_why_there_are_no_fused_kernels(monkeypatch, capsys, settings, device, printed):
    monkeypatch.setattr(capture, "TrainStep", lambda net, optimizer, device, *_: SimpleNamespace(note="", device=device))
    monkeypatch.setattr(capture, "CapturedStep", lambda step, fused: step)
    monkeypatch.setattr(capture, "has_bfloat16", lambda device: False)
    make_step(None, None, torch.device(device), Config(kernels="fused", **settings))
    assert "Steps use PyTorch's kernels" in (out := capsys.readouterr().out)
    assert printed in out


def test_a_network_of_another_kind_has_no_fused_kernels(monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setattr(capture, "has_bfloat16", lambda device: True)
    assert capture.fused_kernels(SimpleNamespace(net=nn.Flatten(), device=torch.device("cuda"))) is None
    assert "they can't compute what model.py does" in capsys.readouterr().out


# ---------------------------------------------------------------- whether to capture

@pytest.mark.parametrize(("wanted", "device", "batches_on", "version", "captured", "printed"), [
    ("auto", "cuda", "device", "2.14.1+cu130", True, False),
    ("auto", "cuda", "device", "2.12.0", False, False),  # can't go on after a failed capture
    ("on", "cuda", "device", "2.12.0", True, False),
    ("off", "cuda", "device", "2.14.1", False, False),
    ("auto", "cuda", "workers", "2.14.1", False, False),
    ("on", "cuda", "workers", "2.14.1", False, True),
    ("auto", "cpu", "device", "2.14.1", False, False),
    ("on", "cpu", "device", "2.14.1", False, True)])
def test_steps_are_captured_where_that_is_wanted_and_possible(monkeypatch, capsys, wanted, device, batches_on, version,
                                                              captured, printed):
    monkeypatch.setattr(capture, "TrainStep", lambda *_: SimpleNamespace(note=""))  # whose own would want a GPU
    monkeypatch.setattr(capture, "CapturedStep", lambda step, fused: "captured")
    monkeypatch.setattr(torch, "__version__", version)
    step = make_step(None, None, torch.device(device), Config(capture=wanted, batches=batches_on))
    assert (step == "captured") == captured
    assert ("Steps are not captured: that needs CUDA" in capsys.readouterr().out) == printed
    if not captured:
        assert step.note.startswith("not captured") == (device == "cuda" and wanted != "off")


def test_the_log_notes_what_a_later_capture_changes(run, tmp_path, monkeypatch):
    import main

    monkeypatch.setattr(main, "make_step", lambda net, optimizer, device, config, *_: CapturedStep(
        TrainStep(net, optimizer, device, config.label_smoothing)))
    monkeypatch.setattr(capture, "largest_difference", lambda *_: (next(found), "a weight"))
    found = iter((0.01, 0.02))
    assert run("--epochs", "3", "--crop-size", "24", "--uncropped-share", "0.34")[0] == 0
    notes = read_record(tmp_path / "logs" / "runs" / os.listdir(tmp_path / "logs" / "runs")[0])["notes"]
    assert [note.split("by at most ")[1][:4] for note in notes] == ["1 % ", "2 % "]
