"""The optimizer: SGD, as PyTorch has it, but without the import of torch._dynamo."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn, optim

from config import Config


def make_optimizer(net: nn.Module, config: Config, device: torch.device) -> optim.Optimizer:
    """The optimizer of the network's parameters. tinycnn/training/schedule.py sets the learning rate of each step."""
    return SGD(net.parameters(), lr=config.lr, momentum=config.momentum, nesterov=config.nesterov,
               weight_decay=config.weight_decay, fused=device.type == "cuda")


def _undecorated(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method within its decorator. Without one, the method: it may then import torch._dynamo."""
    return getattr(method, "__wrapped__", method)


class SGD(optim.SGD):
    """torch.optim.SGD, the same to the bit, for steps that are neither compiled nor `differentiable`.

    PyTorch's own keeps its methods out of torch.compile by decorators (torch/_compile.py, torch/optim/optimizer.py) that import
    torch._dynamo, which takes about as long as importing torch. These are the methods without them."""

    add_param_group = _undecorated(optim.SGD.add_param_group)
    state_dict = _undecorated(optim.SGD.state_dict)
    load_state_dict = _undecorated(optim.SGD.load_state_dict)
    zero_grad = _undecorated(optim.SGD.zero_grad)
    step = torch.no_grad()(_undecorated(optim.SGD.step))
