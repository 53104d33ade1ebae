"""A captured step trains as an eager one, and a wrong recording is refused. Without CUDA by its eager twin, which shares all
but the graph."""

import copy
import signal
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import only_run, synthetic
from rounded import Rounded
from torch import nn

import main
from config import Config
from model import Net, separable
from tinycnn.errors import StopRequested
from tinycnn.runs.record import read_record
from tinycnn.training import capture, steps
from tinycnn.training.capture import CapturedStep
from tinycnn.training.distillation import CrossEntropy, Distillation
from tinycnn.training.optimizer import SGD
from tinycnn.training.self_check import BATCHES, Errors, put_back, snapshot, step_state, vary, with_sums
from tinycnn.training.steps import fastest_step


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    return torch.device(request.param)


def small_net(device: torch.device, dropout: float = 0.2) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), separable(8, 16), nn.AdaptiveAvgPool2d(1),
                        nn.Flatten(), nn.Dropout(dropout), nn.Linear(16, 4))
    return net.train().to(device, memory_format=torch.channels_last)


class Training:
    """A network with all that trains it, by eager or by captured steps."""

    def __init__(self, device, net=None, criterion=None, make_optimizer=None, **settings):
        self.net = net or small_net(device)
        make_optimizer = make_optimizer or partial(SGD, **{"lr": 0.5, "momentum": 0.9, "weight_decay": 1e-3} | settings)
        self.optimizer = make_optimizer(self.net.parameters())
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5)
        self.criterion, self.notes, self.replaying = criterion or CrossEntropy(0.1), [], False
        net = self.net if device.type == "cuda" else Rounded(self.net)
        self.eager = partial(main.train_step, net, self.optimizer, self.criterion)

    def captured(self, fused=None) -> CapturedStep:
        return CapturedStep(self.eager, self.net, self.optimizer, fused, self.notes.append)

    def run(self, step, batches, epochs=3) -> list:
        """The losses and accuracies of epochs with a falling learning rate."""
        results = []
        for epoch in range(epochs):
            torch.manual_seed(epoch)
            self.net.train()
            results.append(tuple(sum(step(*batch) for batch in batches).tolist()))
            self.scheduler.step()
        return results

    def everything(self) -> list[torch.Tensor]:
        return copy.deepcopy(list(step_state(self.net, self.optimizer).values()))


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, ours, theirs)) and len(ours) == len(theirs)


@pytest.fixture
def batches(device):
    generator = torch.Generator().manual_seed(1)
    made = [(torch.randn(size, 3, 8, 8, generator=generator), torch.randint(0, 4, (size,), generator=generator))
            for size in (16, 16, 16, 5)]
    return [(images.to(device), labels.to(device)) for images, labels in made]


def test_a_captured_step_trains_as_an_eager_one(device, batches):
    plain, ours = Training(device), Training(device)
    captured = ours.captured()
    expected, results = plain.run(plain.eager, batches), ours.run(captured, batches)
    assert captured.can_capture, ours.notes
    assert len(captured.recordings) == 2  # the short last batch has its own
    assert ours.notes[0].startswith("captured; a replay's error is at most 0.")
    assert [loss for loss, _ in results] == pytest.approx([loss for loss, _ in expected], rel=1e-2)
    if device.type == "cpu":
        assert expected == results
        assert equal(plain.everything(), ours.everything())


def test_recording_and_checking_change_nothing(device, batches):
    ours = Training(device)
    ours.run(ours.eager, batches, epochs=1)
    before, rate = ours.everything(), ours.optimizer.param_groups[0]["lr"]
    random_states = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if device.type == "cuda" else [])]
    captured = ours.captured()
    captured._prepare(*batches[0])
    assert captured.can_capture
    assert equal(before, ours.everything())
    now = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if device.type == "cuda" else [])]
    assert equal(random_states, now)
    assert ours.optimizer.param_groups[0]["lr"] == rate
    assert all(parameter.grad is None for parameter in ours.net.parameters())


def test_each_sum_is_a_tensor_of_its_own(device, batches):
    step = Training(device).captured()
    first = step(*batches[0])
    before = first.clone()
    step(*batches[1])
    assert torch.equal(first, before)


def test_the_learning_rate_of_a_recording_can_change(device, batches):
    ours = Training(device)
    captured = ours.captured()
    captured(*batches[0])
    ours.optimizer.param_groups[0]["lr"] = 0.0
    before = [p.clone() for p in ours.net.parameters()]
    captured(*batches[1])
    assert equal(before, list(ours.net.parameters()))


def test_another_setting_of_the_optimizer_ends_the_capture(device, batches):
    """A recording has it as a number."""
    plain, ours = Training(device), Training(device)
    captured = ours.captured()
    for training, step in ((plain, plain.eager), (ours, captured)):
        torch.manual_seed(0)
        step(*batches[0])
        training.optimizer.param_groups[0]["momentum"] = 0.5
        step(*batches[1])
    assert not captured.can_capture
    assert ours.notes[-1] == "not captured: a setting of the optimizer has changed"
    assert device.type == "cuda" or equal(plain.everything(), ours.everything())


# ---------------------------------------------------------------- what the check sees
# Each fault returns a wrong replay of `run`, which is the right one

def gradients(edit, name: str = ""):
    """`edit` changes the gradient of that parameter, or of each, in place."""
    def fault(training: Training, captured: CapturedStep, run):
        def hook(*_):
            for each, parameter in training.net.named_parameters():
                if training.replaying and name in ("", each):
                    edit(parameter.grad)

        training.optimizer.register_step_pre_hook(hook)
        return run
    return fault


def state(edit, kind: str):
    """What a step has made of the tensors of this kind becomes `edit` of it, of what it was before, and of what the last replay
    made of it."""
    def fault(training: Training, captured: CapturedStep, run):
        last: dict[str, torch.Tensor] = {}

        def replay():
            before = snapshot(step_state(training.net, training.optimizer))
            sums = run()
            for name, tensor in step_state(training.net, training.optimizer).items():
                if kind in name:
                    made = tensor.clone()
                    tensor.copy_(edit(made, before[name], last.get(name, before[name])))
                    last[name] = made
            return sums
        return replay
    return fault


def inputs(edit, find):
    """A replay reads `edit` of what is now in the tensor that `find` finds, and of what was in it in the first replay."""
    def fault(training: Training, captured: CapturedStep, run):
        first: list[torch.Tensor] = []

        def replay():
            tensor = find(captured)
            now = tensor.clone()
            first.append(now)
            tensor.copy_(edit(now, first[0]))
            sums = run()
            tensor.copy_(now)
            return sums
        return replay
    return fault


def images_of(captured: CapturedStep) -> torch.Tensor:
    return list(captured.recordings.values())[-1].images


def labels_of(captured: CapturedStep) -> torch.Tensor:
    return list(captured.recordings.values())[-1].labels


def sums_of(edit):
    def fault(training: Training, captured: CapturedStep, run):
        def replay():
            edit(sums := run())
            return sums
        return replay
    return fault


def lose_momentum(training: Training, captured: CapturedStep, run):
    def replay():
        for values in training.optimizer.state.values():
            values["momentum_buffer"].zero_()
        return run()
    return replay


def pile_gradients(training: Training, captured: CapturedStep, run):
    def replay():
        training.optimizer.zero_grad = lambda: None
        sums = run()
        del training.optimizer.zero_grad
        return sums
    return replay


def without(name: str, value):
    """An attribute of the criterion, of the optimizer's settings, or of the dropout layer, has another value."""
    def fault(training: Training, captured: CapturedStep, run):
        def replay():
            group, dropout = training.optimizer.param_groups[0], training.net[6]
            place = group if name in group else vars(training.criterion if hasattr(training.criterion, name) else dropout)
            right, place[name] = place[name], value
            sums = run()
            place[name] = right
            return sums
        return replay
    return fault


def put(index, value: float = 0.0):
    def edit(gradient: torch.Tensor) -> None:
        gradient[index] *= value
    return edit


EVERY, FIRST, DEPTHWISE, POINTWISE, NORM = (slice(None), "0.weight", "3.0.weight", "3.1.weight", "1.")
FAULTS = {
    # the five that a limit of half a tensor's change didn't see
    "all gradients times 0.6": gradients(put(EVERY, 0.6)),
    "all gradients times 1.45": gradients(put(EVERY, 1.45)),
    "a tap of a depthwise gradient": gradients(put((EVERY, 0, 0, 1)), DEPTHWISE),
    "an eighth of a pointwise gradient": gradients(put(slice(2)), POINTWISE),
    "the running variance moves 0.6 as far": state(lambda made, before, last: before + 0.6 * (made - before), "running_var"),
    "all gradients times 1.1": gradients(put(EVERY, 1.1)),
    "one gradient times 1.1": gradients(put(EVERY, 1.1), POINTWISE),
    "one channel of the first gradient": gradients(put(3), FIRST),
    "one channel of a depthwise gradient": gradients(put(3), DEPTHWISE),
    "one input of a pointwise gradient": gradients(put((EVERY, 5)), POINTWISE),
    "a row of taps": gradients(put((EVERY, EVERY, 2)), FIRST),
    "a column of taps, times 1.5": gradients(put((..., 0), 1.5), FIRST),
    "the sign of a gradient": gradients(put(EVERY, -1), NORM + "bias"),
    "the sign of one channel": gradients(put(3, -1), POINTWISE),
    "taps upside down": gradients(lambda gradient: gradient.copy_(gradient.flip(2)), DEPTHWISE),
    "channels out of order": gradients(lambda gradient: gradient.copy_(gradient.roll(1, 0)), POINTWISE),
    "no gradient of a norm": gradients(put(EVERY), NORM + "weight"),
    "noise": gradients(lambda gradient: gradient.add_(gradient.std() * torch.randn_like(gradient)), POINTWISE),
    "a little noise": gradients(lambda gradient: gradient.add_(0.1 * gradient.std() * torch.randn_like(gradient)), "7.weight"),
    "not a number": gradients(put((0, 0), float("nan")), "7.weight"),
    "a frozen parameter": state(lambda made, before, last: before, f"parameter {FIRST}"),
    "half of a parameter frozen": state(lambda made, before, last: torch.cat((made[:8], before[8:])), f"parameter {POINTWISE}"),
    "a parameter late by a step": state(lambda made, before, last: last, "parameter 7.weight"),
    "momentum late by a step": state(lambda made, before, last: last, f"momentum_buffer of {POINTWISE}"),
    "statistics late by a step": state(lambda made, before, last: last, "running_mean"),
    "frozen statistics": state(lambda made, before, last: before, "running_mean"),
    "statistics without one channel": state(lambda made, before, last: torch.cat((made[:-1], before[-1:])), "1.running_mean"),
    "batches not counted": state(lambda made, before, last: before, "num_batches"),
    "a stale batch": inputs(lambda now, first: first, images_of),
    "stale labels": inputs(lambda now, first: first, labels_of),
    "an image twice": inputs(lambda now, first: torch.cat((now[:-1], now[:1])), images_of),
    "a stale learning rate": inputs(lambda now, first: first, lambda captured: captured.rates[0]),
    "lost momentum": lose_momentum,
    "less momentum": without("momentum", 0.8),
    "Nesterov momentum": without("nesterov", True),
    "gradients piled up": pile_gradients,
    "no label smoothing": without("label_smoothing", 0.0),
    "no dropout": without("p", 0.0),
    "half of the loss": sums_of(put(0, 0.5)),
    "predictions not counted": sums_of(put(1)),
}


def plant(fault, training: Training) -> CapturedStep:
    """A captured step, with this fault in its recordings."""
    captured = training.captured()

    def record(run):
        sums, wrong = run(), fault(training, captured, run)

        def replay():
            training.replaying = True
            sums.copy_(wrong())
            training.replaying = False
        return sums, replay

    captured.record = record
    return captured


@pytest.mark.parametrize("fault", [lambda training, captured, run: run, gradients(put(EVERY, 1.0)),
                                   state(lambda made, before, last: made, ""), inputs(lambda now, first: now, images_of)])
def test_what_plants_faults_does_nothing_else(device, batches, fault):
    training = Training(device)
    captured = plant(fault, training)
    training.run(captured, batches, epochs=1)
    assert captured.can_capture, training.notes


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_recording_is_refused(device, batches, capsys, fault):
    plain, ours = Training(device), Training(device)
    captured = plant(FAULTS[fault], ours)
    plain.run(plain.eager, batches, epochs=1)
    ours.run(captured, batches, epochs=1)
    assert capsys.readouterr().out.count("Steps are not captured: a replay's ") == 1
    assert not captured.can_capture
    assert not captured.recordings
    assert ours.notes[0].startswith("not captured: a replay's ")
    assert device.type == "cuda" or equal(plain.everything(), ours.everything())  # as if nothing had been recorded


def kinds_of_training(device, dropout: float, smoothing: float, teacher: bool) -> Training:
    criterion = Distillation([small_net(device)], 0.9, 4.0, smoothing) if teacher else CrossEntropy(smoothing)
    return Training(device, small_net(device, dropout), criterion)


@pytest.mark.parametrize(("dropout", "smoothing", "teacher"), [(0.0, 0.0, False), (0.2, 0.1, False), (0.2, 0.1, True)])
def test_right_steps_by_other_kernels_pass_before_and_after_training(device, batches, monkeypatch, dropout, smoothing, teacher):
    monkeypatch.setattr(capture, "milliseconds", lambda *_: 0.0)
    training = kinds_of_training(device, dropout, smoothing, teacher)
    for seed in range(3):
        other = Rounded(training.net, seed)
        captured = training.captured(partial(main.train_step, other, training.optimizer, training.criterion))
        captured(*batches[0])
        assert training.notes[-1].startswith("captured without fused kernels (0.00 ms a step"), training.notes
        training.run(training.eager, batches, epochs=3)


# ---------------------------------------------------------------- the same for the real network

def make_steps_of_net(seed: int, steps: int):
    """A state of the network after some steps, and for each of BATCHES batches the ends of a step from there: in float32, as in
    bfloat16, and by other kernels that are as right as those."""
    torch.manual_seed(seed)
    net = Net(dropout=0.1 * (seed % 2)).to(memory_format=torch.channels_last).train()
    dataset, criterion = synthetic(), CrossEntropy(0.1 * (seed % 3))
    if seed % 4 == 3:
        criterion = Distillation([Net()], 0.9, 4.0)
    chosen = torch.randperm(len(dataset.train))[:16]
    images = torch.from_numpy(dataset.train.images)[chosen].permute(0, 3, 1, 2).float() / 128 - 1
    given = images, torch.from_numpy(dataset.train.labels)[chosen]
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for number in range(steps):
        main.train_step(net, optimizer, criterion, *vary(*given, number))
    state = step_state(net, optimizer)
    start, ends = snapshot(state), []
    for number in range(BATCHES):
        ends.append([])
        for forward in (net, Rounded(net), Rounded(net, seed)):
            torch.manual_seed(number)
            sums = main.train_step(forward, optimizer, criterion, *vary(*given, number))
            ends[-1].append(snapshot(with_sums(state, sums)))
            put_back(state, start)
    return start, ends


def worst_error(steps, edit=None) -> tuple[float, str]:
    """What the check finds for the other right steps. `edit` changes a gradient in each, in place."""
    start, ends = steps
    errors = Errors()
    for right, eager, other in ends:
        ours = {name: tensor.clone() for name, tensor in other.items()}
        for name, momentum in ours.items():
            if edit and name.startswith("momentum_buffer of "):
                parameter = name.removeprefix("momentum_buffer of ")
                gradient = momentum - 0.9 * start[name]  # and the decay of weights
                wrong = gradient.clone()
                edit(parameter, wrong)
                momentum += wrong - gradient
                ours[f"parameter {parameter}"] -= 0.1 * (wrong - gradient)
        errors.add(start, right, eager, ours)
    return errors.worst()


@pytest.fixture(scope="module")
def steps_of_net():
    return make_steps_of_net(seed=0, steps=2)


def of(end: str, edit):
    return lambda name, gradient: edit(gradient) if name.endswith(end) else None


def of_depthwise(edit):
    return lambda name, gradient: edit(gradient) if gradient.shape[1:] == (1, 3, 3) else None


@pytest.mark.parametrize("fault", [
    of("", put(EVERY, 0.6)), of("", put(EVERY, 1.45)), of("", put(EVERY, 1.1)), of_depthwise(put((EVERY, 0, 1, 1))),
    of("conv_block1.0.1.weight", put(slice(4))), of("conv_block4.1.1.weight", put(slice(32))),
    of("conv_block1.0.0.weight", put(5)), of("conv_block3.0.0.weight", put((EVERY, 0, 2, 0))),
    of("conv_block1.1.1.weight", put((EVERY, 3))), of("conv_block1.1.1.weight", put(7, -1)),
    of("input_block.0.weight", put((EVERY, 1))), of("conv_block4.0.2.bias", put(EVERY, -1)), of("head.1.weight", put(9)),
    of("head.1.bias", put(EVERY, 1.3))])
def test_the_check_sees_a_wrong_gradient_of_the_network(steps_of_net, fault):
    assert worst_error(steps_of_net, fault)[0] > 1


def test_the_check_bears_the_rounding_of_the_network(steps_of_net):
    error, name = worst_error(steps_of_net)
    assert 0.3 < error < 1, name


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 26))
def test_two_hundred_right_steps_pass(seed):
    error, name = worst_error(make_steps_of_net(seed, 2 if seed % 2 else 40))
    assert error < 1, name


# ---------------------------------------------------------------- which steps can be recorded

def test_a_step_that_replaces_tensors_is_refused(batches, device):
    training = Training(device)

    def replace_momentum(optimizer, *_):
        for values in optimizer.state.values():
            values["momentum_buffer"] = values["momentum_buffer"].clone()

    training.optimizer.register_step_post_hook(replace_momentum)
    captured = training.captured()
    captured(*batches[0])
    assert not captured.can_capture
    assert "replaces momentum_buffer of" in training.notes[0]


@pytest.mark.parametrize("kind", [  # CUDA can't capture an SGD that is not fused, nor an AdamW that is not capturable
    lambda parameters: SGD(parameters, lr=0.1), lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    lambda parameters: torch.optim.AdamW(parameters := [*parameters], lr=0.01, fused=True, capturable=parameters[0].is_cuda)],
    ids=["SGD", "SGD with momentum", "AdamW"])
def test_a_right_recording_passes_whatever_the_optimizer(device, batches, kind):
    net = small_net(device)
    net[0] = nn.Conv2d(3, 8, 3).to(device)  # whose bias has a gradient that is nothing but rounding, before a BatchNorm
    training = Training(device, net, make_optimizer=kind)
    captured = training.captured()
    training.run(captured, batches, epochs=1)
    assert captured.can_capture, training.notes


def failing(run):
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


def starving(run):
    raise torch.OutOfMemoryError("CUDA out of memory")


def interrupted(run):
    """CUDA raises an error of its own then, because what was begun beside was not ended."""
    try:
        raise StopRequested(signal.SIGTERM)
    except StopRequested:
        try:
            raise RuntimeError("capture of unjoined work")
        except RuntimeError:
            raise RuntimeError("capture invalidated")  # noqa: B904


def test_where_recording_fails_eager_steps_run(device, batches, capsys):
    plain, ours = Training(device), Training(device)
    captured = ours.captured()
    captured.record = failing
    expected, results = plain.run(plain.eager, batches), ours.run(captured, batches)
    assert capsys.readouterr().out.count("Steps are not captured: the capture failed (operation not permitted") == 1
    assert ours.notes == ["not captured: the capture failed (operation not permitted when stream is capturing)"]
    if device.type == "cpu":
        assert expected == results
        assert equal(plain.everything(), ours.everything())


@pytest.mark.parametrize(("record", "error"), [(starving, torch.OutOfMemoryError), (interrupted, StopRequested)])
def test_memory_that_runs_out_and_signals_end_a_recording_as_what_they_are(device, batches, capsys, record, error):
    captured = Training(device).captured()
    captured.record = record
    with pytest.raises(error):
        captured(*batches[0])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("failure", [ZeroDivisionError("bug"), RuntimeError("bug")])
def test_a_warm_up_that_fails_raises_its_own_error_and_changes_nothing(device, batches, failure):
    training = Training(device)
    training.run(training.eager, batches, epochs=1)
    before, calls = training.everything(), iter(range(100))

    def fail(*_):
        if next(calls) == 1:
            raise failure

    training.net[0].register_forward_hook(fail)
    with pytest.raises(type(failure), match="bug"):
        training.captured()(*batches[0])
    assert equal(before, training.everything())


def read_from_the_gpu(training: Training) -> None:
    """The network waits for a figure from the GPU."""
    training.net[0].register_forward_hook(lambda layer, inputs, output: output * output.sum().item())


def use_an_optimizer_that_is_not_fused(training: Training) -> None:
    """The optimizer reads the learning rate from the GPU."""
    training.optimizer.param_groups[0]["fused"] = False


@pytest.mark.gpu
@pytest.mark.parametrize("spoil", [read_from_the_gpu, use_an_optimizer_that_is_not_fused])
def test_a_step_that_cuda_cannot_capture_runs_eager(capsys, spoil):
    device = torch.device("cuda")
    training = Training(device)
    spoil(training)
    captured = training.captured()
    batch = torch.randn(16, 3, 8, 8, device=device), torch.zeros(16, dtype=torch.long, device=device)
    captured(*batch)
    before = training.net[0].weight.clone()
    captured(*batch)
    assert not captured.can_capture
    assert not torch.equal(before, training.net[0].weight)  # it trains
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.rand(4, device=device).isfinite().all()
    assert capsys.readouterr().out.count("Steps are not captured: the capture failed") == 1


# ---------------------------------------------------------------- the fused kernels

def fused_step(monkeypatch, device: torch.device, forward, times: tuple[float, float]) -> tuple[Training, CapturedStep]:
    """A step with other kernels, made up as `forward` of the network; it takes the first of `times`, PyTorch's the second."""
    training, measured = Training(device), iter(times)
    monkeypatch.setattr(capture, "milliseconds", lambda *_: next(measured))
    net = partial(forward, training.net)
    return training, training.captured(partial(main.train_step, net, training.optimizer, training.criterion))


def test_fused_kernels_that_are_right_and_faster_train_full_batches(device, batches, monkeypatch):
    sizes = []
    ours, captured = fused_step(monkeypatch, device, lambda net, images: sizes.append(len(images)) or net(images), (1.0, 2.0))
    plain = Training(device)
    expected, results = plain.run(plain.eager, batches), ours.run(captured, batches)
    assert set(sizes) == {16}
    assert ours.notes[0].startswith("captured with fused kernels (1.00 ms a step, 2.00 with PyTorch's); a replay's error")
    assert [loss for loss, _ in results] == pytest.approx([loss for loss, _ in expected], rel=1e-2)
    if device.type == "cpu":
        assert len(sizes) == 3 * 3 + 2 + BATCHES  # each full batch, the warm-up, the recording and the check


def fail(net, images):
    raise ValueError("no kernel\n  for this GPU")


def fail_to_capture(net, images):
    raise RuntimeError("not in a capture\n  please")


def test_after_a_fused_capture_has_failed_pytorchs_step_is_recorded_again(device, batches, monkeypatch):
    training, captured = fused_step(monkeypatch, device, fail_to_capture, (1.0, 2.0))
    steps, capture_step = [], captured._capture
    monkeypatch.setattr(captured, "_capture",
                        lambda *inputs: steps.append(inputs[2] is training.eager) or capture_step(*inputs))
    training.run(captured, batches)
    assert steps == [True, False, True, True]  # the last one is of the short batch


@pytest.mark.parametrize(("forward", "times", "note"), [
    (lambda net, images: net(images), (2.0, 1.0), "2.00 ms a step, 1.00 with PyTorch's"),
    (lambda net, images: net(images.flip(0)), (1.0, 2.0), "a replay's "),
    (lambda net, images: net(images).detach() + 0 * net(images), (1.0, 2.0), "a replay's "),
    (fail, (1.0, 2.0), "ValueError: no kernel for this GPU"),
    (fail_to_capture, (1.0, 2.0), "the capture failed (not in a capture)")],
    ids=["slower", "wrong", "no gradients", "failing", "failing to capture"])
def test_fused_kernels_that_are_wrong_or_slower_are_left_out(device, batches, monkeypatch, forward, times, note):
    ours, captured = fused_step(monkeypatch, device, forward, times)
    plain = Training(device)
    expected, results = plain.run(plain.captured(), batches, epochs=2), ours.run(captured, batches, epochs=2)
    assert captured.can_capture
    assert ours.notes[0].startswith(f"captured without fused kernels ({note}")
    if device.type == "cpu":
        assert captured.error < 1
        assert expected == results
        assert equal(plain.everything(), ours.everything())


# ---------------------------------------------------------------- whether to capture

class OnCuda(nn.Linear):
    """A network that says that it lies on CUDA."""

    def parameters(self, recurse: bool = True):
        return iter([SimpleNamespace(device=torch.device("cuda"))])


def choose_step(monkeypatch, device: str, **settings):
    """fastest_step's choice, "captured" or another step, and the notes."""
    notes = []
    monkeypatch.setattr(steps, "CapturedStep", lambda *_: "captured")
    net = (OnCuda if device == "cuda" else nn.Linear)(1, 1)
    return fastest_step(main.train_step, net, None, None, Config(**settings), notes.append), notes


@pytest.mark.parametrize(("wanted", "device", "batches_on", "version", "captured", "printed"), [
    ("auto", "cuda", "device", "2.14.1+cu130", True, False),
    ("auto", "cuda", "device", "2.12.0", False, False),  # can't go on after a failed capture, which edits might cause
    ("on", "cuda", "device", "2.12.0", True, False),
    ("off", "cuda", "device", "2.14.1", False, False),
    ("auto", "cuda", "workers", "2.14.1", False, False),
    ("on", "cuda", "workers", "2.14.1", False, True),
    ("auto", "cpu", "device", "2.14.1", False, False),
    ("on", "cpu", "device", "2.14.1", False, True)])
def test_steps_are_captured_where_that_is_wanted_and_possible(monkeypatch, capsys, wanted, device, batches_on, version,
                                                              captured, printed):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    monkeypatch.setattr(steps, "present_sources", lambda: {"edited": {"model.py": "0123"}})
    step, notes = choose_step(monkeypatch, device, capture=wanted, batches=batches_on)
    assert (step == "captured") == captured
    assert ("Steps are not captured: that needs CUDA" in capsys.readouterr().out) == printed
    if not captured:
        assert bool(notes) == (device == "cuda" and wanted != "off")


def test_code_as_shipped_is_captured_by_every_version(monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.11.0"))
    for edited, captured in (({}, True), ({"main.py": "0123"}, False)):
        monkeypatch.setattr(steps, "present_sources", lambda edited=edited: {"edited": edited})
        step, notes = choose_step(monkeypatch, "cuda", batches="device")
        assert (step == "captured") == captured
        assert notes == ([] if captured else [
            "not captured: PyTorch 2.11.0 can't go on after a failed capture, as an edit of main.py might cause"])


@pytest.mark.parametrize(("settings", "device", "printed"), [
    ({"capture": "off", "batches": "device"}, "cuda", "need captured steps, and --capture is off"),
    ({"batches": "device"}, "cpu", "need captured steps, and that needs CUDA"),
    ({"capture": "on", "batches": "device"}, "cuda", "not the fused ones: this GPU has no bfloat16")])
def test_a_line_says_why_there_are_no_fused_kernels(monkeypatch, capsys, settings, device, printed):
    monkeypatch.setattr(steps, "has_bfloat16", lambda device: False)
    choose_step(monkeypatch, device, kernels="fused", **settings)
    assert "Steps use PyTorch's kernels" in (out := capsys.readouterr().out)
    assert printed in out


def test_a_network_of_another_kind_has_no_fused_kernels(monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setattr(steps, "has_bfloat16", lambda device: True)
    choose_step(monkeypatch, "cuda", kernels="fused", capture="on", batches="device")
    assert "they can't compute what model.py does" in capsys.readouterr().out


def test_the_log_notes_each_capture_with_a_larger_error(run, tmp_path, monkeypatch):
    """Crops and whole images are recorded each."""
    monkeypatch.setattr(main, "fastest_step", lambda train_step, net, optimizer, criterion, config, note: CapturedStep(
        partial(train_step, net, optimizer, criterion), net, optimizer, None, note))
    monkeypatch.setattr(Errors, "worst", lambda self: (next(found), "a weight"))
    monkeypatch.setattr(capture, "BATCHES", 1)
    found = iter((0.25, 0.5))
    assert run("--epochs", "2", "--crop-size", "24", "--whole-images-share", "0.5")[0] == 0
    notes = read_record(only_run(tmp_path))["notes"]
    assert [note[-len("0.25 of what is allowed"):][:4] for note in notes if note.startswith("captured")] == ["0.25", "0.50"]
