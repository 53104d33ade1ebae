"""What only a GPU can show: pytest -m gpu."""

import pytest
import torch
from conftest import at_epoch, figures, only_run, raising, start_program, synthetic
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ConstantLR

import main
from augmentation import test_policy as normalization
from augmentation import train_policy
from config import Config
from model import Net
from tinycnn.data import device_batches as device_batches_module
from tinycnn.data.batches import make_batches
from tinycnn.data.dataset import Dataset, Split
from tinycnn.data.device_batches import DeviceBatches
from tinycnn.device import memory_format
from tinycnn.runs.finding import find_runs
from tinycnn.runs.record import read_run
from tinycnn.training import steps
from tinycnn.training.capture import CapturedStep
from tinycnn.training.distillation import CrossEntropy
from tinycnn.training.optimizer import SGD
from tinycnn.training.steps import FAILURES_END_CLEANLY, fastest_step

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def device_batches(device: torch.device = CUDA, count: int = 5000, batch_size: int = 128) -> DeviceBatches:
    """The first drawn images, augmented as the baseline does."""
    split = Split(synthetic().train.images[:count], synthetic().train.labels[:count])
    images = Dataset("synthetic", synthetic().class_names, split, split, Split(split.images[:0], split.labels[:0]))
    return make_batches(Config(batches="device", batch_size=batch_size), images, train_policy, normalization, device)


class Training:
    """What a run trains with."""

    def __init__(self, capture: str, kernels: str = "pytorch", lr: float = 0.01) -> None:
        self.net = Net().to(CUDA, memory_format=memory_format(CUDA))
        self.optimizer = SGD(self.net.parameters(), lr=lr, momentum=0.9)
        self.scheduler = ConstantLR(self.optimizer, factor=1)
        self.notes: list[str] = []
        config = Config(capture=capture, kernels=kernels, batches="device")
        self.step = fastest_step(main.train_step, self.net, self.optimizer, CrossEntropy(0.0), config, self.notes.append)
        self.batches = device_batches()

    def first_step(self) -> "Training":
        self.step(*next(iter(self.batches.train(0))))
        return self

    def epoch(self, number: int) -> tuple[float, float]:
        return main.train_epoch(self.step, self.net, self.batches.train(number), self.scheduler)


# ---------------------------------------------------------------- the whole program

@pytest.mark.parametrize("how", [("device", "--capture", "on"), ("device", "--capture", "off"),
                                 ("workers", "--capture", "off")])
def test_the_program_trains_on_a_gpu_and_resumes(run, tmp_path, monkeypatch, how):
    at_epoch(monkeypatch, 2, raising(KeyboardInterrupt()))
    first = run("--device", "cuda", "--epochs", "4", "--lr", "0.05", "--workers", "2", "--batches", *how)
    resumed = run("--resume")
    assert (first[0], resumed[0]) == (130, 0)
    assert not torch.backends.cudnn.benchmark
    assert "not captured" not in "".join(first[1:] + resumed[1:])  # a line would say that and why
    found = read_run(only_run(tmp_path))
    assert len(found.rows) == 4
    assert found.record["machine"]["device"].startswith("cuda")
    assert found.rows[-1]["train_loss"] < found.rows[0]["train_loss"]


def test_weights_trained_on_a_gpu_load_on_the_cpu(run, tmp_path):
    run("--device", "cuda", "--epochs", "1")
    net = Net(num_classes=3)
    net.load_state_dict(load_file(only_run(tmp_path) / "final.safetensors"))
    assert net(torch.zeros(1, 3, 32, 32)).isfinite().all()


def test_a_captured_run_learns_as_an_eager_one(run, tmp_path):
    for capture in ("on", "off"):
        status, out, err = run("--device", "cuda", "--epochs", "6", "--lr", "0.05", "--capture", capture)
        assert status == 0
        assert "not captured" not in out + err
    eager, captured = (read_run(folder).rows[-1]["train_loss"] for folder in find_runs(tmp_path / "logs"))
    assert captured == pytest.approx(eager, abs=0.2)


@pytest.mark.parametrize("capture", ["on", "off"])
def test_a_deterministic_run_has_the_same_bits_when_killed_and_resumed(tmp_path, pictures, capture):
    """In processes of their own: cuBLAS reads its setting when CUDA starts."""
    def start(log_dir, *arguments, **options):
        process = start_program(*arguments, "--log-dir", str(log_dir), **options)
        out, err = process.communicate(timeout=300)
        return process.returncode, out + err

    settings = ["--dataset", "folder", "--data-dir", str(pictures), "--device", "cuda", "--batch-size", "16", "--epochs", "5",
                "--lr", "0.05", "--dropout", "0.1", "--no-pictures", "--deterministic", "--capture", capture]
    kill = "\n".join((
        "import os, signal", "train_epoch, calls = main.train_epoch, iter(range(100))",
        "def killing(*arguments):", "    next(calls) == 3 and os.kill(os.getpid(), signal.SIGKILL)",
        "    return train_epoch(*arguments)", "main.train_epoch = killing"))
    whole, killed = tmp_path / "whole" / "logs", tmp_path / "killed" / "logs"
    assert start(whole, *settings)[0] == 0
    assert start(killed, *settings, interval=0.0, before=kill)[0] == -9
    status, said = start(killed, "--resume")
    assert status == 0, said
    one, other = only_run(whole.parent), only_run(killed.parent)
    assert figures(one) == figures(other)
    weights, resumed_weights = (load_file(folder / "final.safetensors") for folder in (one, other))
    assert all(torch.equal(tensor, resumed_weights[name]) for name, tensor in weights.items())


# ---------------------------------------------------------------- parts of it

def test_the_loss_is_computed_in_float32():
    logits = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)).mul(8).bfloat16().cuda().requires_grad_()
    labels = torch.arange(64, device="cuda") % 3
    net = nn.Module()
    net.forward = lambda images: logits
    sums = main.train_step(net, SGD([logits], lr=0.0), CrossEntropy(0.0), torch.zeros(64, 3, 32, 32, device="cuda"), labels)
    expected = F.cross_entropy(logits.detach().cpu().double(), labels.cpu())
    assert sums[0].item() / 64 == pytest.approx(expected.item(), rel=1e-5)  # bfloat16 is right to 1e-3


def test_device_batches_are_the_same_on_a_gpu():
    batches = [device_batches(torch.device(device), 300, 64) for device in ("cpu", "cuda")]
    for (images, labels), (on_gpu, gpu_labels) in zip(*(each.train(5) for each in batches), strict=True):
        assert torch.equal(labels, gpu_labels.cpu())
        assert (images != on_gpu.cpu()).float().mean() < 1e-4  # a coordinate may round otherwise
        assert on_gpu.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(*(torch.cat([images.cpu() for images, _ in each.test()]) for each in batches))


@pytest.mark.parametrize("slow", ["steps", "augmentation"])
def test_batches_are_the_same_whichever_stream_is_slow(monkeypatch, slow):
    """A stream that didn't wait for the other would read what is not there yet, or write over what is not read yet."""
    monkeypatch.setattr(device_batches_module, "AUGMENTED_TOGETHER", 256)
    expected, batches = device_batches(torch.device("cpu"), 2000, 64), device_batches(count=2000, batch_size=64)
    batches.train(0)  # which makes the policy
    policy = batches.policies[-1][1]
    augment = policy.apply

    def late(*drawn):
        if slow == "augmentation":
            torch.cuda._sleep(20_000_000)  # some 10 ms
        return augment(*drawn)

    monkeypatch.setattr(policy, "apply", late)
    for epoch in (0, 1):
        seen = []
        for images, labels in batches.train(epoch):
            if slow == "steps":
                torch.cuda._sleep(2_000_000)
            seen.append((images.clone(), labels.clone()))
            del images, labels  # before the GPU has read them
        for (images, labels), (on_gpu, gpu_labels) in zip(expected.train(epoch), seen, strict=True):
            assert torch.equal(labels, gpu_labels.cpu())
            assert (images != on_gpu.cpu()).float().mean() < 1e-4


@pytest.mark.parametrize("capture", ["on", "off"])
def test_epochs_on_a_gpu_wait_for_nothing_and_stay_within_2_gb(capture):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    training = Training(capture)
    training.epoch(0)  # kernels are chosen, graphs recorded
    main.test_epoch(training.net, training.batches.test())
    training.net.train()
    sums = torch.zeros(2, device=CUDA)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for epoch in (1, 2):
            for images, labels in training.batches.train(epoch):
                sums += training.step(images, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sums.isfinite().all()
    if capture == "on":
        assert training.step.can_capture, training.notes
        assert len(training.step.recordings) == 2  # two pools of memory
        assert training.notes[-1].startswith("captured; ")
    assert torch.cuda.max_memory_reserved() < 2e9  # with the graphs' pools and cuDNN's workspaces


def test_a_captured_step_that_is_wrong_on_purpose_is_refused(capsys):
    training = Training("on")
    weight, record = training.net.input_block[0].weight, training.step.record

    def forgetful(run):
        sums, replay = record(run)

        def wrong():
            before = weight.detach().clone()
            replay()
            weight.data.copy_(before)
        return sums, wrong

    training.step.record = forgetful
    training.first_step()
    assert not training.step.can_capture
    assert "not captured: a replay's parameter input_block.0.weight is wrong, by" in training.notes[-1]
    assert capsys.readouterr().out.count("Steps are not captured: a replay's") <= 1
    training.first_step()
    assert all(parameter.isfinite().all() for parameter in training.net.parameters())


def test_the_self_check_finds_captured_steps_right():
    training = Training("on").first_step()
    assert training.step.can_capture, training.notes
    assert training.step.error < 1


def test_a_step_by_the_fused_kernels_agrees_with_an_eager_one():
    training = Training("on", kernels="fused").first_step()
    assert training.step.can_capture, training.notes
    assert "fused kernels (" in training.notes[-1]
    assert "ms a step" in training.notes[-1]  # both were right, so that they were timed


@pytest.mark.parametrize("edited", [{}, {"main.py": "0123"}])
def test_auto_captures_code_as_shipped_and_edits_where_training_could_go_on_after_a_failed_capture(monkeypatch, edited):
    monkeypatch.setattr(steps, "present_sources", lambda: {"edited": edited})
    training = Training("auto").first_step()
    captured = not edited or torch.__version__ >= FAILURES_END_CLEANLY
    assert isinstance(training.step, CapturedStep) == captured
    assert training.notes[-1].startswith("captured; " if captured else "not captured: PyTorch"), training.notes


def test_a_gpu_without_bfloat16_trains_in_contiguous_float32(monkeypatch):
    for module in ("tinycnn.device", "tinycnn.training.machine", "tinycnn.training.steps", "tinycnn.training.distillation"):
        monkeypatch.setattr(f"{module}.has_bfloat16", lambda device: False)
    training, kinds = Training("on", lr=0.05), set()
    assert all(parameter.is_contiguous() for parameter in training.net.parameters())
    training.net.conv_block2.register_forward_hook(
        lambda layer, inputs, output: kinds.add((output.dtype, output.is_contiguous())))
    losses = [training.epoch(epoch)[0] for epoch in range(3)]
    assert kinds == {(torch.float32, True)}
    assert training.step.can_capture, training.notes
    assert losses[-1] < losses[0]
