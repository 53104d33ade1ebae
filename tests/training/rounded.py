"""Steps as bfloat16 kernels compute them, fast on any CPU: float32 arithmetic, each layer's output and gradient rounded."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tinycnn.training import machine


class Round(torch.autograd.Function):
    """Round a tensor, and its gradient, to bfloat16."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.bfloat16().float()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.bfloat16().float()


class Rounded(nn.Module):
    """`net` with rounding, except in steps that run in float32. With a `seed`, other kernels, as right as those: convolutions
    before a BatchNorm, or before another convolution, are scaled by random factors that cancel out, so that all figures round
    otherwise."""

    def __init__(self, net: nn.Module, seed: int | None = None) -> None:
        super().__init__()
        self.net, self.factors, self.rounding = net, {}, False
        for layer in net.modules():
            if not list(layer.children()):
                layer.register_forward_hook(lambda layer, inputs, output: Round.apply(output) if self.rounding else None)
        if seed is not None:
            self._draw_factors(torch.Generator().manual_seed(seed))

    def _draw_factors(self, generator: torch.Generator) -> None:
        layers = [(name, layer) for name, layer in self.net.named_modules() if isinstance(layer, nn.Conv2d | nn.BatchNorm2d)]
        for (name, layer), (following, other) in pairwise(layers):
            if isinstance(layer, nn.Conv2d):
                factor = 0.6 + 0.8 * torch.rand(layer.out_channels, 1, 1, 1, generator=generator)
                self.factors[name] = self.factors.get(name, 1.0) * factor
                normed = isinstance(other, nn.BatchNorm2d)
                self.factors[following] = factor.flatten() if normed else 1 / factor.reshape(1, -1, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        if machine._in_float32:
            return self.net(images)
        tensors: dict[str, Tensor] = {}
        scaled: list[tuple[Tensor, str, Tensor]] = []
        for name, parameter in self.net.named_parameters():
            factor = self.factors.get(name.rpartition(".")[0], 1.0) if parameter.dim() == 4 else 1.0
            tensors[name] = Round.apply(parameter * factor) if parameter.dim() > 1 else parameter
        for name, buffer in self.net.named_buffers():
            layer, _, kind = name.rpartition(".")
            if layer in self.factors and kind != "num_batches_tracked":
                factor = self.factors[layer] if kind == "running_mean" else self.factors[layer].square()
                tensors[name] = buffer * factor
                scaled.append((buffer, name, factor))
        self.rounding = True
        try:
            logits = functional_call(self.net, tensors, (Round.apply(images),))
        finally:
            self.rounding = False
        for buffer, name, factor in scaled:
            buffer.copy_(tensors[name].detach() / factor)
        return logits
