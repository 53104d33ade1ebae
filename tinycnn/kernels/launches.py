"""Launch the fused kernels: allocate their results, and choose how many programs share the work."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from torch.nn import BatchNorm2d, Conv2d

from tinycnn.kernels import kernels

NORM_ROWS = kernels.TAP.value + kernels.TAPS.value
AT_ONCE = 8  # sums of each program that one program adds up at least: 32 bytes, the least that memory delivers
PROGRAMS = 528  # that add up rows, at most: four for each multiprocessor of an H100
ENOUGH = 96  # programs that a launch has at least, if there are enough rows
# Rows that a program takes at once, at most, and how Triton compiles it: of some 15 ways for each launch on an H100, each
# timed by itself, those with the least sum (docs/speed.md)
INPUT = (64, {"num_warps": 4, "num_stages": 1})
SEPARABLE = (32, {"num_stages": 1})
POINTWISE = (64, {"num_warps": 4, "num_stages": 1})
FILTER = (16, {"num_warps": 2})
SUM = (64, {"num_warps": 4, "num_stages": 2})
INPUT_SUM = (64, {"num_warps": 4, "num_stages": 1})


def _rows_each(rows: int, others: int, most: int) -> int:
    """Rows that a program takes at once, where `others` programs share them: at most `most`, and so few that there are enough
    programs."""
    return next((size for size in (64, 32) if size <= most and rows // size * others >= ENOUGH), 16)


def _programs(rows: int, each: int, others: int) -> int:
    """Programs that share the rows, `each` of them at once, and as many times as the others."""
    times = -(-rows // (each * max(1, PROGRAMS // others)))
    return -(-rows // (each * times))


def _part(channels: int) -> int:
    return 64 if channels % 64 == 0 else 32


def _shares(partial: Tensor) -> dict[str, int]:
    """How the sums of `partial` are added up: those of all programs at once, some 4096 at a time."""
    programs = triton.next_power_of_2(len(partial))
    return {"PROGRAMS": programs, "EACH": min(32, max(AT_ONCE, 4096 // programs))}


def _new_maps(like: Tensor, rows: int, channels: int) -> Tensor:
    """Memory for maps. Raises ValueError where their offsets don't fit the kernels' 32 bits."""
    if rows * channels >= 2**31:
        raise ValueError(f"maps of {rows * channels:,} values are too large for the fused kernels")
    return like.new_empty(rows, channels, dtype=torch.bfloat16)


def _sum(partial: Tensor) -> Tensor:
    """The sum over the first dimension, the programs."""
    if len(partial) == 1:
        return partial[0]
    shares, total = _shares(partial), partial.new_empty(partial.shape[1:])
    kernels.sum_programs[(total.numel() // shares["EACH"],)](partial, total, len(partial), VALUES=total.numel(), **shares)
    return total


def _norm(partial: Tensor, rows: int, layer: BatchNorm2d, following: Conv2d | None) -> Tensor:
    """The norm of the layer, whose running statistics are updated, from the programs' sums."""
    shares, channels = _shares(partial), partial.shape[-1]
    norm = partial.new_empty(NORM_ROWS, channels)
    kernels.finish_norm[(channels // shares["EACH"],)](
        partial, layer.weight, layer.bias, layer.running_mean, layer.running_var, following.weight if following else norm, norm,
        len(partial), rows, layer.momentum, layer.eps, CHANNELS=channels, FILTERED=following is not None, **shares)
    return norm


def input_forward(images: Tensor, weight: Tensor, layer: BatchNorm2d, following: Conv2d | None) -> tuple[Tensor, Tensor]:
    """The first convolution of images float32 N x H x W x 3: its maps and their norm, for the depthwise convolution
    `following`."""
    (number, height, width, _), out, (most, options) = images.shape, len(weight), INPUT
    rows, outs = number * height * width, _part(out)
    each = _rows_each(rows, out // outs, most)
    maps = _new_maps(images, rows, out)
    partial = images.new_empty(_programs(rows, each, out // outs), 2, out)
    kernels.input_forward[(len(partial), out // outs)](
        images, weight, maps, layer.running_mean, partial, rows, HEIGHT=height, WIDTH=width, OUT=out, ROWS=each, OUTS=outs,
        **options)
    return maps, _norm(partial, rows, layer, following)


def separable_forward(maps_in: Tensor, norm: Tensor, size: tuple[int, int, int], depthwise: Conv2d, pointwise: Tensor,
                      layer: BatchNorm2d, following: Conv2d | None) -> tuple[Tensor, Tensor, Tensor, tuple[int, int, int]]:
    """A block on maps of the size N, H, W. Returns what is between its convolutions, its maps, their norm for the depthwise
    convolution `following`, and their size."""
    (number, height, width), (most, options) = size, SEPARABLE
    stride, dilation, (out, channels) = depthwise.stride[0], depthwise.dilation[0], pointwise.shape[:2]
    out_height, out_width = (height - 1) // stride + 1, (width - 1) // stride + 1
    rows, outs, ins, warps = number * out_height * out_width, _part(out), _part(channels), 4
    if out % 128 == 0 and rows // most * out // 128 >= ENOUGH:  # a part more computes the depthwise convolution once more
        outs, warps = 128, 8
    each = _rows_each(rows, out // outs, most)
    between, maps = _new_maps(maps_in, rows, channels), _new_maps(maps_in, rows, out)
    partial = norm.new_empty(_programs(rows, each, out // outs), 2, out)
    kernels.separable_forward[(len(partial), out // outs)](
        maps_in, norm, pointwise, between, maps, layer.running_mean, partial, rows,
        HEIGHT=height, WIDTH=width, OUT_HEIGHT=out_height, OUT_WIDTH=out_width, IN=channels, OUT=out, STRIDE=stride,
        DILATION=dilation, ROWS=each, INS=ins, OUTS=outs, num_warps=warps, **options)
    return between, maps, _norm(partial, rows, layer, following), (number, out_height, out_width)


def _image_at_once(channels: int) -> dict[str, int]:
    """How many channels a program takes that has a whole image, and for how many pixels, or classes, at once."""
    padded = triton.next_power_of_2(channels)
    return {"CHANNELS": channels, "PADDED": padded, "EACH": max(1, 4096 // padded)}


def pool_forward(maps: Tensor, norm: Tensor, number: int, head: Conv2d | None) -> tuple[Tensor, Tensor]:
    """The pooled features, float32 N x channels; and the logits of the head, float32 N x classes, or none, N x 0."""
    sizes, classes = _image_at_once(maps.shape[1]), head.out_channels if head else 0
    features, logits = norm.new_empty(number, maps.shape[1]), norm.new_empty(number, classes)
    weights, bias = (head.weight, head.bias) if head else (norm, norm)
    kernels.pool_forward[(number,)](maps, norm, weights, bias, features, logits, PIXELS=len(maps) // number, CLASSES=classes,
                                    BLOCK=min(16, sizes["EACH"]), **sizes)
    return features, logits


def head_backward(gradients: Tensor, head: Conv2d) -> Tensor:
    """The gradients of the pooled features, from those of the logits, N x classes."""
    found = gradients.new_empty(len(gradients), head.in_channels)
    kernels.head_backward[(len(gradients),)](gradients, head.weight, found, CLASSES=head.out_channels,
                                             **_image_at_once(head.in_channels))
    return found


def softmax_loss(logits: Tensor, labels: Tensor, teachers: Sequence[Tensor], smoothing: float, share: float,
                 temperature: float) -> tuple[Tensor, Tensor]:
    """The mean loss on logits float32 N x classes, with labels int64 N and the logits of each teacher, N x classes, and its
    gradients, N x classes."""
    (rows, classes), padded = logits.shape, triton.next_power_of_2(logits.shape[1])
    loss, gradients = logits.new_empty(()), torch.empty_like(logits)
    teacher_logits = torch.stack(list(teachers)) if len(teachers) > 1 else teachers[0].contiguous() if teachers else logits
    kernels.softmax_loss[(1,)](
        logits, labels, teacher_logits, loss, gradients, rows, smoothing, share, temperature, CLASSES=classes,
        PADDED=padded, TEACHERS=len(teachers), ROWS=max(1, min(128, 4096 // padded)))
    return loss, gradients


def pool_backward(feature_gradients: Tensor, maps: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the maps after BatchNorm and ReLU, and their sums for BatchNorm, 2 x channels."""
    (rows, channels), (most, options) = maps.shape, FILTER
    each = _rows_each(rows, channels // 32, most)
    gradients = torch.empty_like(maps)
    partial = norm.new_empty(_programs(rows, each, channels // 32), 2, channels)
    kernels.pool_backward[(len(partial), channels // 32)](
        feature_gradients, maps, norm, gradients, partial, rows, PIXELS=rows // len(feature_gradients), CHANNELS=channels,
        ROWS=each, **options)
    return gradients, _sum(partial)


def pointwise_backward(gradients: Tensor, maps: Tensor, norm: Tensor, sums: Tensor, pointwise: Tensor) -> Tensor:
    """The gradients of what is between a block's convolutions."""
    rows, (out, channels), (most, options) = len(maps), pointwise.shape[:2], POINTWISE
    outs, ins = _part(out), _part(channels)
    between_gradients, each = maps.new_empty(rows, channels), _rows_each(rows, channels // ins, most)
    kernels.pointwise_backward[(-(-rows // each), channels // ins)](
        gradients, maps, norm, sums, pointwise, between_gradients, rows, IN=channels, OUT=out, ROWS=each, INS=ins, OUTS=outs,
        **options)
    return between_gradients


def pointwise_weights(gradients: Tensor, maps: Tensor, norm: Tensor, sums: Tensor, between: Tensor,
                      pointwise: Tensor) -> Tensor:
    """The gradients of the pointwise weights."""
    rows, (out, channels), (each, options) = len(maps), pointwise.shape[:2], SUM
    outs, ins = 32, _part(channels)
    parts = (out // outs, channels // ins)
    partial = norm.new_empty(_programs(rows, each, parts[0] * parts[1]), out, channels, 1, 1)
    kernels.pointwise_weights[(len(partial), *parts)](
        gradients, maps, norm, sums, between, partial, rows, IN=channels, OUT=out, ROWS=each, INS=ins, OUTS=outs, **options)
    return _sum(partial).as_strided(pointwise.shape, pointwise.stride())


def depthwise_backward(between_gradients: Tensor, maps_in: Tensor, norm: Tensor, size: tuple[int, int, int],
                       out_size: tuple[int, int, int], depthwise: Conv2d) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the input maps after BatchNorm and ReLU, of the depthwise weights, and the sums for BatchNorm."""
    (rows, channels), (most, options) = maps_in.shape, FILTER
    gradients, each = torch.empty_like(maps_in), _rows_each(rows, channels // 32, most)
    partial = norm.new_empty(_programs(rows, each, channels // 32), kernels.DEPTHWISE_SUMS.value * channels)
    kernels.depthwise_backward[(len(partial), channels // 32)](
        between_gradients, maps_in, norm, gradients, partial, rows, HEIGHT=size[1], WIDTH=size[2],
        OUT_HEIGHT=out_size[1], OUT_WIDTH=out_size[2], CHANNELS=channels, STRIDE=depthwise.stride[0],
        DILATION=depthwise.dilation[0], ROWS=each, **options)
    weights, sums = _sum(partial).split([kernels.TAPS.value * channels, 2 * channels])
    return gradients, weights.as_strided(depthwise.weight.shape, depthwise.weight.stride()), sums.view(2, channels)


def input_weights(gradients: Tensor, maps: Tensor, norm: Tensor, sums: Tensor, images: Tensor, weight: Tensor) -> Tensor:
    """The gradients of the first convolution's weights, out x 3 x 3 x 3."""
    (rows, out), (each, options) = maps.shape, INPUT_SUM
    partial = norm.new_empty(_programs(rows, each, out // 32), out, kernels.IMAGE_TAPS.value)
    kernels.input_weights[(len(partial), out // 32)](
        gradients, maps, norm, sums, images, partial, rows, HEIGHT=images.shape[1], WIDTH=images.shape[2], OUT=out, ROWS=each,
        OUTS=32, **options)
    return _sum(partial).as_strided(weight.shape, weight.stride())
