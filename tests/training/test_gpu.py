"""What only a GPU can show: pytest -m gpu."""

import pytest
import torch
from conftest import at_epoch, figures, only_run, raising, start_program, synthetic
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from augmentation import test_policy as normalization
from augmentation import train_policy
from config import Config
from model import Net
from tinycnn.data import device_batches as device_batches_module
from tinycnn.data.dataset import Split
from tinycnn.data.device_batches import DeviceBatches
from tinycnn.runs.finding import find_runs
from tinycnn.runs.record import read_run
from tinycnn.training import machine
from tinycnn.training.capture import FAILURES_END_CLEANLY, CapturedStep, make_step
from tinycnn.training.epoch import evaluate, train_epoch
from tinycnn.training.metrics import Metrics
from tinycnn.training.optimizer import SGD
from tinycnn.training.step import TrainStep

pytestmark = pytest.mark.gpu
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
CUDA = torch.device("cuda")


def device_batches(device: torch.device = CUDA, count: int = 5000, batch_size: int = 128) -> DeviceBatches:
    """The first drawn images, augmented as the baseline does."""
    train = synthetic().train
    split = Split(train.images[:count], train.labels[:count])
    policies = {"train": train_policy(Config(), MEAN, STD), "test": normalization(MEAN, STD)}
    return DeviceBatches({"train": split, "test": split}, policies, batch_size, 0, device)


def gpu_step(capture: str, kernels: str = "pytorch"):
    net = Net().to(CUDA, memory_format=torch.channels_last)
    optimizer = SGD(net.parameters(), lr=0.01, momentum=0.9, fused=True)
    return make_step(net, optimizer, CUDA, Config(capture=capture, kernels=kernels, batches="device"))


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

def test_looking_at_the_metrics_waits_for_nothing():
    metrics = Metrics(CUDA)
    metrics.add(torch.tensor(2.0, device=CUDA), torch.eye(4, device=CUDA), torch.arange(4, device=CUDA))
    metrics.images = 4
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert metrics.latest() is None
        metrics.copied.synchronize()
        assert metrics.latest() == (2.0, 100.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_loss_is_computed_in_float32():
    logits = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)).mul(8).bfloat16().cuda().requires_grad_()
    labels = torch.arange(64, device="cuda") % 3
    net = nn.Module()
    net.forward = lambda images: logits
    step = TrainStep(net, SGD([logits], lr=0.0), logits.device, 0.0)
    step(torch.zeros(64, 3, 32, 32, device="cuda"), labels)
    expected = F.cross_entropy(logits.detach().cpu().double(), labels.cpu())
    assert step.metrics.sums[0].item() / 64 == pytest.approx(expected.item(), rel=1e-5)  # bfloat16 is right to 1e-3


def test_device_batches_are_the_same_on_a_gpu():
    batches = [device_batches(torch.device(device), 300, 64) for device in ("cpu", "cuda")]
    for epoch in (5, 6):  # the second was drawn while the first ran
        for (images, labels), (on_gpu, gpu_labels) in zip(*(each.shuffled("train", epoch) for each in batches), strict=True):
            assert torch.equal(labels, gpu_labels.cpu())
            assert (images != on_gpu.cpu()).float().mean() < 1e-4  # a coordinate may round otherwise
            assert on_gpu.is_contiguous(memory_format=torch.channels_last)
    for _ in range(2):  # the second time from what is kept
        tests = [torch.cat([images.cpu() for images, _ in each.in_order("test")]) for each in batches]
        assert torch.equal(*tests)


@pytest.mark.parametrize("slow", ["steps", "augmentation"])
def test_batches_are_the_same_whichever_stream_is_slow(monkeypatch, slow):
    """A stream that didn't wait for the other would read what is not there yet, or write over what is not read yet."""
    monkeypatch.setattr(device_batches_module, "AUGMENTED_TOGETHER", 256)
    expected, batches = device_batches(torch.device("cpu"), 2000, 64), device_batches(count=2000, batch_size=64)
    policy = batches.policies["train"]
    augment = policy.apply

    def late(*drawn):
        if slow == "augmentation":
            torch.cuda._sleep(20_000_000)  # some 10 ms
        return augment(*drawn)

    monkeypatch.setattr(policy, "apply", late)
    for epoch in (0, 1):
        seen = []
        for images, labels in batches.shuffled("train", epoch):
            if slow == "steps":
                torch.cuda._sleep(2_000_000)
            seen.append((images.clone(), labels.clone()))
            del images, labels  # before the GPU has read them
        for (images, labels), (on_gpu, gpu_labels) in zip(expected.shuffled("train", epoch), seen, strict=True):
            assert torch.equal(labels, gpu_labels.cpu())
            assert (images != on_gpu.cpu()).float().mean() < 1e-4


@pytest.mark.parametrize("capture", ["on", "off"])
def test_epochs_on_a_gpu_wait_for_nothing_and_stay_within_2_gb(capture):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step, batches = gpu_step(capture), device_batches()
    with tqdm(disable=True) as bar:
        train_epoch(step, batches.shuffled("train", 0), lambda images: 0.01, bar)  # kernels are chosen, graphs recorded
        evaluate(step.net, batches.in_order("test"), CUDA)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for epoch in (1, 2):
            for images, labels in batches.shuffled("train", epoch):
                step(images, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    evaluate(step.net, batches.in_order("test"), CUDA)
    assert step.metrics.sums.isfinite().all()
    if capture == "on":
        assert step.possible, step.note
        assert len(step.recordings) == 2  # two pools of memory
        assert step.note.startswith("captured; ")
    assert torch.cuda.max_memory_reserved() < 2e9  # with the graphs' pools, cuDNN's workspaces and the kept test images


def test_a_captured_step_that_is_wrong_on_purpose_is_refused(monkeypatch, capsys):
    step, batches = gpu_step("on"), device_batches()
    weight = step.net.input_block[0].weight
    capture = step.capture

    def forgetful(run):
        replay = capture(run)

        def wrong():
            before = weight.detach().clone()
            replay()
            weight.data.copy_(before)
        return wrong

    step.capture = forgetful
    batch = next(iter(batches.shuffled("train", 0)))
    step(*batch)
    assert not step.possible
    assert "input_block.0.weight and an eager step's differ by" in step.note
    assert capsys.readouterr().out.count("Steps are not captured: a replay's") <= 1
    step(*batch)
    assert all(parameter.isfinite().all() for parameter in step.net.parameters())


def test_the_self_check_finds_captured_steps_equal_but_for_rounding():
    step, batches = gpu_step("on"), device_batches()
    step(*next(iter(batches.shuffled("train", 0))))
    assert step.possible, step.note
    assert step.difference < 0.1


def test_a_step_by_the_fused_kernels_agrees_with_an_eager_one():
    step = gpu_step("on", kernels="fused")
    step(*next(iter(device_batches().shuffled("train", 0))))
    assert step.possible, step.note
    assert "fused kernels (" in step.note
    assert "ms a step" in step.note  # both were right, so that they were timed


def test_auto_captures_where_training_could_go_on_after_a_failed_capture():
    step = gpu_step("auto")
    step(*next(iter(device_batches().shuffled("train", 0))))
    captured = torch.__version__ >= FAILURES_END_CLEANLY
    assert isinstance(step, CapturedStep) == captured
    assert step.note.startswith("captured; " if captured else "not captured: PyTorch"), step.note


def test_a_gpu_without_bfloat16_trains_in_contiguous_float32(monkeypatch):
    monkeypatch.setattr(machine, "has_bfloat16", lambda device: False)
    monkeypatch.setattr("tinycnn.training.step.has_bfloat16", lambda device: False)
    net = Net().to(CUDA, memory_format=machine.memory_format(CUDA))
    assert all(parameter.is_contiguous() for parameter in net.parameters())
    optimizer = SGD(net.parameters(), lr=0.05, momentum=0.9, fused=True)
    step, batches = make_step(net, optimizer, CUDA, Config(capture="on", batches="device")), device_batches()
    kinds = set()
    net.conv_block2.register_forward_hook(lambda layer, inputs, output: kinds.add((output.dtype, output.is_contiguous())))
    with tqdm(disable=True) as bar:
        results = [train_epoch(step, batches.shuffled("train", epoch), lambda images: 0.05, bar) for epoch in range(3)]
    assert kinds == {(torch.float32, True)}
    assert isinstance(step, CapturedStep)
    assert step.possible, step.note
    assert results[-1].loss < results[0].loss
