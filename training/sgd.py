"""torch.optim.SGD without the import of torch._dynamo."""

import inspect

import torch
from torch import optim


class SGD(optim.SGD):
    """torch.optim.SGD, the same to the bit, for steps that are not compiled.

    PyTorch's own keeps its methods out of torch.compile by decorators that import torch._dynamo, which takes about as long as
    importing torch. These are the methods without those decorators, found in torch/optim/optimizer.py of PyTorch 2.14."""

    add_param_group = inspect.unwrap(optim.SGD.add_param_group)
    state_dict = inspect.unwrap(optim.SGD.state_dict)
    load_state_dict = inspect.unwrap(optim.SGD.load_state_dict)
    zero_grad = inspect.unwrap(optim.SGD.zero_grad)
    step = torch.no_grad()(inspect.unwrap(optim.SGD.step))
