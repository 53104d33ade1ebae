"""The fused kernels compute what PyTorch's do: in Triton's interpreter, and, where there is one, on a GPU."""

import copy
import gc
import json
import os
import subprocess
import sys
import weakref
from contextlib import contextmanager
from pathlib import Path
from statistics import geometric_mean

import pytest
import torch
from fake_cuda import CUDA, fake_cuda, second_streams, to_fake_cuda
from torch import nn
from torch.nn import functional as F

from model import Net, separable

triton = pytest.importorskip("triton")

from tinycnn.kernels import network  # noqa: E402
from tinycnn.kernels.network import fuse  # noqa: E402
from tinycnn.training.distillation import Distillation  # noqa: E402
from tinycnn.training.steps import fuse_criterion  # noqa: E402

ROOT = Path(__file__).parents[2]
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
POOL = nn.AdaptiveAvgPool2d(1)


@pytest.mark.skipif(VERSION < (3, 8), reason="the interpreter of Triton before 3.8 fails with NumPy 2.4")
def test_the_kernels_are_as_near_to_float64_as_pytorch_in_bfloat16():
    """In a process of its own: Triton decides at its import whether it interprets."""
    out = subprocess.run([sys.executable, "tests/kernels/kernels_interpreted.py"], cwd=ROOT, check=True, capture_output=True,
                         text=True, env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)})
    found = json.loads(out.stdout)
    assert len(found["gradients"]) == 3 + 3 * 4 + 2
    ratios = {name: fused / pytorch for name, (fused, pytorch) in found["gradients"].items()}
    assert geometric_mean(ratios.values()) < 1.15
    assert max(ratios.values()) < 2, ratios  # so few pixels that PyTorch's own rounding may be lucky in one of them
    assert all(error < 2e-3 for error in found["buffers"].values())
    assert found["not a number"] == [True, True]
    assert max(error for errors in found["losses"].values() for error in errors) < 1e-5


# ---------------------------------------------------------------- which networks they can compute

def changed(change) -> Net:
    net = Net()
    change(net)
    return net


@pytest.mark.parametrize("net", [
    Net(), Net(width=2), Net(num_classes=3, dropout=0.1),
    changed(lambda net: nn.utils.parametrizations.weight_norm(net.head[1]))], ids=["Net", "width 2", "dropout", "weight norm"])
def test_every_parameter_gets_a_gradient_in_its_own_memory_order(monkeypatch, net):
    """Seen before autograd copies a gradient of another order."""
    net, gradients = net.to("meta", memory_format=torch.channels_last), {}
    for name, parameter in net.named_parameters():
        parameter.register_hook(lambda gradient, name=name: gradients.update({name: gradient}))
    launches(monkeypatch, net, 2)
    parameters = dict(net.named_parameters())
    assert gradients.keys() == parameters.keys()
    assert all(gradients[name].stride() == parameter.stride() for name, parameter in parameters.items()
               if type(net.head[1]) is nn.Conv2d or not name.startswith("head."))  # those of another head are PyTorch's


class Doubled(Net):
    def forward(self, images):
        return super().forward(2 * images)


class Choosing(Net):
    def forward(self, images):
        return super().forward(images if images.sum() > 0 else -images)


class DropsOut(Net):
    def forward(self, images):
        return F.dropout(super().forward(images), 0.5, self.training)


def test_a_network_in_evaluation_mode_is_fused_as_it_trains(monkeypatch):
    net, seen = DropsOut().eval(), []
    dropout = F.dropout
    monkeypatch.setattr(F, "dropout", lambda values, p, training: seen.append(training) or dropout(values, p, training))
    fuse(net.to(memory_format=torch.channels_last))
    assert seen == [True]


@pytest.mark.parametrize("net", [Net(), Net(dropout=0.1)], ids=["Net", "dropout"])
def test_the_maps_of_a_step_are_freed_with_its_result(monkeypatch, net):
    """And not only when Python collects what refers to itself."""
    maps, new_maps = [], network.launches._new_maps

    def remembered(*given):
        made = new_maps(*given)
        maps.append(weakref.ref(made))
        return made

    monkeypatch.setattr(network.launches, "_new_maps", remembered)
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", lambda *_, **__: None)
    gc.collect()
    gc.disable()
    try:
        net = net.to("meta", memory_format=torch.channels_last)
        fuse(net)(torch.empty(2, 3, 32, 32, device="meta").to(memory_format=torch.channels_last))
    finally:
        gc.enable()
    assert len(maps) == 17
    assert not any(reference() is not None for reference in maps)


def test_the_sum_of_one_program_needs_no_launch(monkeypatch):
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", None)
    partial = torch.randn(1, 2, 32)
    assert torch.equal(network.launches._sum(partial), partial.sum(0))


def test_maps_too_large_for_32_bits_are_refused():
    with pytest.raises(ValueError, match="too large for the fused kernels"):
        fuse(Net().to("meta", memory_format=torch.channels_last))(torch.empty(2**16, 3, 32, 32, device="meta"))


@pytest.mark.parametrize("net", [
    nn.Flatten(),
    nn.Sequential(separable(32, 32), POOL),  # no first convolution
    nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), separable(32, 48), POOL),
    nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), separable(32, 32), POOL),  # with a bias
    changed(lambda net: net.register_forward_hook(lambda *_: None)),
    changed(lambda net: net.conv_block1.register_forward_hook(lambda *_: None)),
    changed(lambda net: net.conv_block1[0][1].register_forward_hook(lambda *_: None)),
    changed(lambda net: setattr(net.conv_block1[0][2], "momentum", None)),
    changed(lambda net: setattr(net.conv_block2[0][0], "padding", (0, 0))),
    changed(lambda net: net.conv_block3.insert(1, nn.Dropout(0.1))),
    Doubled(), Choosing(),
], ids=["other", "no input", "48 channels", "bias", "hook on the network", "hook on a block", "hook on a layer", "no momentum",
        "padding", "dropout", "another input", "an if"])
def test_what_the_kernels_do_not_compute_is_refused(net):
    assert fuse(net.to(memory_format=torch.channels_last)) is None


class Scaled(Net):
    """A parameter, a buffer and a constant behind the classifier."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))
        self.register_buffer("scale", torch.full((), 3.0))

    def forward(self, images):
        return super().forward(images) * self.temperature * self.scale + torch.tensor([1.0])


def test_tensors_behind_the_pooling_are_used(monkeypatch):
    monkeypatch.setattr(network.Chain, "forward", lambda *_: torch.full((2, 10, 1, 1), 2.0))
    net = Scaled().to(memory_format=torch.channels_last)
    logits = fuse(net)(torch.empty(2, 3, 32, 32).to(memory_format=torch.channels_last))
    assert logits.tolist() == [10 * [7.0]] * 2
    logits.sum().backward()
    assert net.temperature.grad == 2 * 10 * 6


def test_contiguous_weights_are_refused():
    assert fuse(Net()) is None


# ---------------------------------------------------------------- launches, and what a compiler says of them

def launches(monkeypatch, net: nn.Module, batch_size: int) -> list:
    """The kernels of a step with a teacher but for the optimizer, on tensors without data: kernel, arguments, constants and
    options."""
    found = []
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run",
                        lambda self, *args, grid, warmup, **options: found.append((self, args, options)))
    forward = fuse(net.to("meta", memory_format=torch.channels_last))
    images = torch.empty(batch_size, 3, 32, 32, device="meta").to(memory_format=torch.channels_last)
    labels, taught = (torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in (
        (batch_size, torch.long), ((batch_size, 10), torch.bfloat16)))
    criterion = Distillation([], 0.9, 4.0, 0.1)
    criterion.teacher_logits = lambda images: [taught]
    fuse_criterion(criterion)(images, forward(images), labels).backward()
    return found


def test_a_step_takes_few_launches(monkeypatch):
    assert len(launches(monkeypatch, Net(), 128)) <= 65  # PyTorch's eager step has 537 on an H200, with the optimizer


class FakeStream:
    """Stands for a CUDA stream. Notes whether what it has read was still there when another stream waited for it."""

    device, current, reads = CUDA, None, ()

    def wait_stream(self, other: "FakeStream") -> None:
        FakeStream.waits.append((self, other, all(reference() is not None for reference in other.reads)))


def backward_node(logits: torch.Tensor):
    """The kernels' backward pass."""
    node = logits.grad_fn
    while type(node).__name__ != "_OutputsBackward":
        node = node.next_functions[0][0]
    return node


@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch is built without CUDA")
@pytest.mark.filterwarnings("ignore")  # of autocast, which misses its driver
def test_weights_gradients_are_computed_beside_from_memory_that_is_kept(monkeypatch):
    """What is freed before the streams meet would be written over while the other stream reads it."""
    main, beside = FakeStream(), FakeStream()
    launched, beside.reads, FakeStream.waits, FakeStream.current = [], [], [], main

    @contextmanager
    def stream(chosen):
        before, FakeStream.current = FakeStream.current, chosen or FakeStream.current
        yield
        FakeStream.current = before

    def run(kernel, *arguments, **options):
        launched.append((kernel.__name__, FakeStream.current))
        if kernel.__name__ == "pointwise_weights":
            beside.reads += [weakref.ref(tensor) for tensor in arguments[:5]]

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream.current)
    monkeypatch.setattr(network, "side_stream", lambda device: beside)
    with fake_cuda():
        images = torch.empty(128, 3, 32, 32, device=CUDA).to(memory_format=torch.channels_last)
        backward_node(fuse(to_fake_cuda(Net()))(images)).apply(torch.empty(128, 10, device=CUDA))
    assert launched.count(("pointwise_weights", beside)) == launched.count(("sum_programs", beside)) == 8
    assert [stream for name, stream in launched if name not in ("pointwise_weights", "sum_programs")].count(beside) == 0
    assert FakeStream.waits == [(beside, main, True)] * 9 + [(main, beside, True)]  # of the head, too


@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch is built without CUDA")
@pytest.mark.filterwarnings("ignore")
def test_the_heads_gradients_are_computed_beside_from_memory_that_is_kept(monkeypatch):
    """PyTorch computes them; a gradient that is not contiguous is copied first."""
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", lambda *_, **__: None)
    with fake_cuda(), second_streams() as streams:
        images = torch.empty(2, 3, 32, 32, device=CUDA).to(memory_format=torch.channels_last)
        backward_node(fuse(to_fake_cuda(Net()))(images)).apply(torch.ones((), device=CUDA).expand(2, 10))
        assert streams.steps.launched > 0
        torch.ones(20, device=CUDA)  # which takes what is free
    assert streams.races == []


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_kernels_compile(monkeypatch, capability):
    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.long: "*i64", int: "i32", float: "fp32"}
    compiled = set()
    for kernel, args, options in launches(monkeypatch, Net(), 128):
        names = [parameter.name for parameter in kernel.params]
        signature = {name: types[getattr(value, "dtype", type(value))] for name, value in zip(names, args, strict=False)}
        constants = {name: options.pop(name) for name in names if name in options}
        # as a launch does: memory begins at a multiple of 16 bytes
        aligned = {(place,): [["tt.divisibility", 16]] for place, value in enumerate(args)
                   if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)}
        source = triton.compiler.ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, aligned)
        if (key := (kernel.__name__, str(constants))) not in compiled:
            binary = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", capability, 32), options=options)
            assert binary.metadata.shared <= 96 * 1024
            compiled.add(key)
    assert len({name for name, _ in compiled}) == 12


# ---------------------------------------------------------------- on a GPU

@pytest.mark.gpu
@pytest.mark.parametrize(("width", "size", "count"), [(1, 32, 128), (1, 32, 80), (1, 24, 128), (2, 32, 128)])
def test_the_kernels_are_right_on_a_gpu(width, size, count):
    torch.manual_seed(0)
    net = Net(width=width).cuda().to(memory_format=torch.channels_last)
    images = torch.randn(count, 3, size, size, device="cuda").to(memory_format=torch.channels_last)
    labels, gradients = torch.arange(count, device="cuda") % 10, {}
    exact = Net(width=width).cuda().double()
    exact.load_state_dict(net.state_dict())
    for name, forward, dtype in (("float64", exact, torch.float64), ("bfloat16", net, torch.float32),
                                 ("fused", fuse(net), torch.float32)):
        parameters = list((exact if name == "float64" else net).parameters())
        with torch.autocast("cuda", torch.bfloat16, enabled=name != "float64", cache_enabled=False):
            loss = F.cross_entropy(forward(images.to(dtype)).to(dtype), labels)
        gradients[name] = torch.autograd.grad(loss, parameters)
    for (name, _), true, pytorch, fused in zip(net.named_parameters(), *gradients.values(), strict=True):
        errors = [(gradient.double() - true).norm() for gradient in (pytorch, fused)]
        assert errors[1] < 1.5 * errors[0] + 1e-6 * true.norm(), name


@pytest.mark.gpu
def test_gradients_computed_beside_are_the_same_however_late_they_are(monkeypatch):
    net = Net().cuda().to(memory_format=torch.channels_last)
    images = torch.randn(128, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
    compute, forward, gradients = network.launches.pointwise_weights, fuse(net), []
    state = copy.deepcopy(net.state_dict())
    for cycles in (0, 2_000_000):

        def late(*tensors, cycles=cycles):
            torch.cuda._sleep(cycles)
            return compute(*tensors)

        monkeypatch.setattr(network.launches, "pointwise_weights", late)
        net.load_state_dict(state)  # the sums for BatchNorm are taken around its running mean
        parameters = [parameter for name, parameter in net.named_parameters() if not name.startswith("head.")]  # PyTorch's
        gradients.append(torch.autograd.grad(forward(images).square().sum(), parameters))
    assert all(map(torch.equal, *gradients))
