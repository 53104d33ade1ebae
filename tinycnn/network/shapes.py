"""Say where in a network the shapes don't fit."""

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def explain_shape_error(net: nn.Module, images: Tensor) -> str:
    """Name the layer at which `net` fails on `images` (N x 3 x H x W), the shapes of its input and its weight, and PyTorch's
    reason; "" where it doesn't fail."""
    running: list[tuple[str, nn.Module, tuple[Any, ...]]] = []  # layers that have begun and not ended, the innermost last
    handles = []
    for name, layer in net.named_modules(prefix="net"):
        handles += [layer.register_forward_pre_hook(lambda layer, inputs, name=name: running.append((name, layer, inputs))),
                    layer.register_forward_hook(lambda *_: running.pop() and None)]
    try:
        net(images)
        return ""
    except (RuntimeError, ValueError, IndexError) as error:
        name, layer, inputs = running[-1]
        shapes = ", ".join(_shape(value) for value in inputs)
        weight = getattr(layer, "weight", None)
        parameters = f" with a weight of {_shape(weight)}" if isinstance(weight, Tensor) else ""
        return f"{name.removeprefix('net.')} ({type(layer).__name__}{parameters}) can't take {shapes}: {error}"
    finally:
        for handle in handles:
            handle.remove()


def _shape(value: Any) -> str:
    return " x ".join(map(str, value.shape)) if isinstance(value, Tensor) else type(value).__name__
