"""A depthwise-separable network with its training steps in a few large kernels."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from tinycnn.device import after_this, side_stream, wait_for
from tinycnn.kernels import launches


class Chain(nn.Module):
    """A first 3x3 convolution with BatchNorm and ReLU, separable blocks, a global average, and maybe a 1x1 convolution."""

    def __init__(self, layers: list[tuple[nn.Module, ...]], head: nn.Conv2d | None) -> None:
        """`layers`: first the convolution and its BatchNorm, then of each block the depthwise and the pointwise convolution and
        BatchNorm."""
        super().__init__()
        self.layers, self.heads = layers, [head] if head else []  # in lists, as the network has them already
        self.parameters_in_order = [parameter for each in [*layers, self.heads] for layer in each
                                    for parameter in layer.parameters()]

    def forward(self, images: Tensor) -> Tensor:
        """The pooled features or, from the last convolution, logits, float32 N x channels x 1 x 1, of images float32
        N x 3 x H x W in channels_last memory."""
        return _Outputs.apply(images, self.layers, self.heads, *self.parameters_in_order)[:, :, None, None]


class _Outputs(torch.autograd.Function):
    """What a Chain computes, and its gradients. Keeps of each block its input and what is between its convolutions."""

    @staticmethod
    def forward(ctx, images, layers, heads, *parameters):
        """The features or logits, N x channels. `parameters` are those of `layers` and `heads`, passed so that autograd returns
        their gradients."""
        images, ((first, first_norm), *blocks) = images.permute(0, 2, 3, 1), layers
        depthwises = [depthwise for depthwise, _, _ in blocks] + [None]
        maps, norm = launches.input_forward(images, first.weight, first_norm, depthwises[0])
        size, saved = images.shape[:3], []
        for (depthwise, pointwise, layer), following in zip(blocks, depthwises[1:], strict=True):
            between, *out = launches.separable_forward(maps, norm, size, depthwise, pointwise.weight, layer, following)
            saved.append((maps, norm, size, between))
            maps, norm, size = out  # type: ignore[assignment]
        features, logits = launches.pool_forward(maps, norm, len(images), heads[0] if heads else None)
        ctx.first, ctx.blocks, ctx.heads, ctx.images = first, blocks, heads, images
        ctx.saved, ctx.last = saved, (maps, norm, size)
        ctx.features = features if heads else None  # what is returned would refer to itself, and live until it is collected
        return logits if heads else features

    @staticmethod
    def backward(ctx, gradients):
        """None for images, layers and heads, and the gradients of the parameters in their order."""
        found = []  # from the last parameter to the first
        (maps, norm, out_size), gradients = ctx.last, gradients.contiguous()
        read_beside = [gradients]  # kept until this stream has waited for the other, so that nothing overwrites them
        beside = side_stream(maps.device)
        # Of weights' gradients in the other stream: only the optimizer needs them, so the other gradients don't wait
        for head in ctx.heads:
            with after_this(beside):
                found += [gradients.sum(0), (gradients.T @ ctx.features).as_strided(head.weight.shape, head.weight.stride())]
            gradients = launches.head_backward(gradients, head)
        gradients, sums = launches.pool_backward(gradients, maps, norm)
        for (depthwise, pointwise, _), (maps_in, norm_in, size, between) in zip(
                reversed(ctx.blocks), reversed(ctx.saved), strict=True):
            found += [sums[0], sums[1]]
            with after_this(beside):
                weights = launches.pointwise_weights(gradients, maps, norm, sums, between, pointwise.weight)
            read_beside.append(gradients)
            between_gradients = launches.pointwise_backward(gradients, maps, norm, sums, pointwise.weight)
            gradients, filters, sums = launches.depthwise_backward(between_gradients, maps_in, norm_in, size, out_size,
                                                                   depthwise)
            found += [weights, filters]
            maps, norm, out_size = maps_in, norm_in, size
        found += [sums[0], sums[1], launches.input_weights(gradients, maps, norm, sums, ctx.images, ctx.first.weight)]
        wait_for(beside)
        return None, None, None, *reversed(found)


class Fused(nn.Module):
    """Computes as `net` does in training; `graph` does so by the kernels, with the layers of `net`."""

    def __init__(self, net: nn.Module, graph: nn.Module) -> None:
        super().__init__()
        self.net, self.graph = net, [graph]  # in a list: its parameters are those of `net`

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast("cuda", enabled=False):  # what follows is small: float32 saves its casts
            return self.graph[0](images)


def fuse(net: nn.Module) -> Fused | None:
    """What computes as `net` does in training, by the kernels; it shares the layers of `net`. None where `net` doesn't begin
    with a Chain, or has hooks, which would not be called. Puts `net` into training mode."""
    if any(_has_hooks(module) for module in net.modules()):
        return None
    try:
        fused = fx.symbolic_trace(net.train())
    except Exception:  # a forward that depends on its input can't be traced
        return None
    graph = fused.graph
    start, *nodes = graph.nodes
    replaced: list[fx.Node] = []
    layers: list[nn.Module] = []  # that they call
    for previous, node in zip([start, *nodes], nodes, strict=False):
        called = _called(net, node, previous)
        pooled = bool(layers) and isinstance(layers[-1], nn.AdaptiveAvgPool2d)
        if called is None or (pooled and not _is_head(called)):
            break
        replaced.append(node)
        layers.append(called)
        if pooled:
            break
    chain = _as_chain(layers)
    if chain is None:
        return None
    with graph.inserting_after(start):
        replaced[-1].replace_all_uses_with(graph.create_node("call_module", "chain", (start,)))
    for node in reversed(replaced):
        graph.erase_node(node)
    fused.add_submodule("chain", chain)
    fused.recompile()

    return Fused(net, fused)


def _called(net: nn.Module, node: fx.Node, previous: fx.Node) -> nn.Module | None:
    """The module that the node calls, if it does so with what `previous` returns, which nothing else uses."""
    alone = node.op == "call_module" and node.args == (previous,) and not node.kwargs and len(previous.users) == 1
    return net.get_submodule(str(node.target)) if alone else None


def _as_chain(layers: list[Any]) -> Chain | None:
    """The layers as a Chain, if they are one that the kernels can compute."""
    head = layers.pop() if layers and _is_head(layers[-1]) else None
    kinds = [type(layer) for layer in layers]
    block = [nn.Conv2d, nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    number = (len(layers) - 4) // 4
    if kinds != [*block[1:], *number * block, nn.AdaptiveAvgPool2d]:
        return None
    first, first_norm, _, *middle, pool = layers
    blocks = [tuple(middle[start:start + 3]) for start in range(0, len(middle), 4)]
    possible = (_is_input(first) and pool.output_size in (1, (1, 1)) and _is_usual(first_norm)
                and all(_is_depthwise(one) and _is_pointwise(other) and _is_usual(norm) for one, other, norm in blocks))
    return Chain([(first, first_norm), *blocks], head) if possible else None


def _has_hooks(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def _is_conv(layer: nn.Conv2d, kernel: int, groups: int) -> bool:
    return (layer.kernel_size == (kernel, kernel) and layer.groups == groups and layer.bias is None
            and layer.padding_mode == "zeros" and layer.out_channels % 32 == 0)


def _is_input(layer: nn.Conv2d) -> bool:
    return (_is_conv(layer, 3, 1) and layer.in_channels == 3 and layer.stride == layer.padding == layer.dilation == (1, 1)
            and layer.weight.is_contiguous(memory_format=torch.channels_last))


def _is_depthwise(layer: nn.Conv2d) -> bool:
    return (_is_conv(layer, 3, layer.in_channels) and layer.out_channels == layer.in_channels
            and layer.stride[0] == layer.stride[1] and layer.dilation[0] == layer.dilation[1]
            and layer.padding == layer.dilation)


def _is_pointwise(layer: nn.Conv2d) -> bool:
    return _is_conv(layer, 1, 1) and layer.stride == (1, 1) and layer.padding == (0, 0)


def _is_head(layer: nn.Module) -> bool:
    """Whether it can follow the pooling in a Chain; a pointwise convolution of a block has no bias."""
    return (type(layer) is nn.Conv2d and layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0)
            and layer.groups == 1 and layer.bias is not None)


def _is_usual(layer: nn.BatchNorm2d) -> bool:
    return layer.affine and layer.track_running_stats and layer.momentum is not None
