"""The optimizer: SGD, as PyTorch has it, but without the import of torch._dynamo."""

from collections.abc import Callable
from typing import Any

import torch
from torch import optim


def _undecorated(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method within its decorator. Without one, the method: it may then import torch._dynamo."""
    return getattr(method, "__wrapped__", method)


class SGD(optim.SGD):
    """torch.optim.SGD, the same to the bit, for steps that are neither compiled nor `differentiable`; on CUDA the fused one.

    PyTorch's own keeps its methods out of torch.compile by decorators (torch/_compile.py, torch/optim/optimizer.py) that import
    torch._dynamo, which takes about as long as importing torch. These are the methods without them."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        on_cuda = all(parameter.is_cuda for group in self.param_groups for parameter in group["params"])
        for group in self.param_groups if on_cuda else ():
            group["fused"] = True

    add_param_group = _undecorated(optim.SGD.add_param_group)
    state_dict = _undecorated(optim.SGD.state_dict)
    load_state_dict = _undecorated(optim.SGD.load_state_dict)
    zero_grad = _undecorated(optim.SGD.zero_grad)
    step = torch.no_grad()(_undecorated(optim.SGD.step))
