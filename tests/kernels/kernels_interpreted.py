"""Compare the fused kernels with PyTorch's, without a GPU. Run with TRITON_INTERPRET=1, which counts from Triton's import on.

Prints, as JSON, how far the gradients are from those in float64: of the kernels, and of PyTorch in bfloat16; and how far
BatchNorm's running statistics are from those in float64.
"""

import copy
import json

import torch
from torch import nn
from torch.nn import functional as F

from model import separable
from tinycnn.kernels import launches
from tinycnn.kernels.network import fuse
from tinycnn.training.distillation import CrossEntropy, Distillation
from tinycnn.training.steps import fuse_criterion

launches.PROGRAMS = 3  # so that each takes rows several times, and some once more than others
launches.ENOUGH = 1  # so that each takes as many rows at once as a launch can


def small_net() -> nn.Sequential:
    """All that the kernels tell apart: strides, a dilation, parts of 32, 64 and 128 channels, one part and several; and more
    classes than the head's kernels take at once, of channels that are no power of two."""
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
                        separable(32, 64), separable(64, 128, stride=2), separable(128, 96, dilation=2),
                        nn.AdaptiveAvgPool2d(1), nn.Conv2d(96, 50, 1), nn.Flatten())
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):  # not the same in each channel, and not those of one batch
            for tensor in (layer.weight, layer.bias, layer.running_mean):
                nn.init.normal_(tensor, mean=float(tensor is layer.weight), std=0.3)
    return net.to(memory_format=torch.channels_last)


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one.double() - other).norm() / other.norm()).item()


torch.manual_seed(0)
net = small_net()
images, labels = torch.randn(2, 3, 8, 10).to(memory_format=torch.channels_last), torch.arange(2)
gradients, buffers = {}, {}
for name, dtype in (("float64", torch.float64), ("bfloat16", torch.float32), ("fused", torch.float32)):
    copied = copy.deepcopy(net).to(dtype)
    forward = fuse(copied) if name == "fused" else copied
    with torch.autocast("cpu", torch.bfloat16, enabled=name == "bfloat16", cache_enabled=False):
        logits = forward(images.to(dtype))
    F.cross_entropy(logits.to(dtype), labels).backward()
    gradients[name] = {key: parameter.grad for key, parameter in copied.named_parameters()}
    buffers[name] = {key: buffer for key, buffer in copied.named_buffers() if "num" not in key}

# The loss and its gradients: of more rows than the kernel takes at once, with teachers and without
losses = {}
for classes, smoothing, teachers in ((5, 0.0, 0), (10, 0.1, 0), (600, 0.0, 1), (10, 0.1, 2)):
    logits = (4 * torch.randn(300, classes)).requires_grad_()
    labels, taught = torch.arange(300) % classes, [3 * torch.randn(300, classes) for _ in range(teachers)]
    criterion = Distillation([], 0.7, 3.0, smoothing) if teachers else CrossEntropy(smoothing)
    criterion.teacher_logits = lambda images, taught=taught: taught
    found = []
    for compute in (fuse_criterion(criterion), criterion):
        loss = compute(logits, logits, labels)  # the first ones stand for the images
        found.append([loss.detach(), *torch.autograd.grad(2 * loss, logits)])
    losses[f"{classes} classes, {smoothing}, {teachers} teachers"] = [relative(*each) for each in zip(*found, strict=True)]

# Of four pixels the unbiased variance is a third more than the mean square
few, first = images[:1, :, :2, :2], net[0]
maps = first[0](few).double()
launches.input_forward(few.permute(0, 2, 3, 1).contiguous(), first[0].weight, first[1], None)
variance = 0.9 + 0.1 * maps.var((0, 2, 3))

# What is not a number must reach the loss
broken = copy.deepcopy(net)
nn.init.constant_(broken[1][0].weight, torch.nan)
logits = fuse(broken)(images)

print(json.dumps({
    "not a number": [logits.isnan().all().item(), fuse_criterion(CrossEntropy(0.0))(images, logits, labels[:2]).isnan().item()],
    "losses": losses,
    "gradients": {key: [relative(gradients[name][key], exact) for name in ("fused", "bfloat16")]
                  for key, exact in gradients["float64"].items()},
    "buffers": {key: relative(buffers["fused"][key], exact) for key, exact in buffers["float64"].items()}
    | {"variance of four pixels": relative(first[1].running_var, variance)}}))
