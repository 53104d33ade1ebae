"""The optimizer is PyTorch's, the same to the bit."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tinycnn.training.optimizer import SGD


def trained(kind: type, settings: dict) -> tuple[list[torch.Tensor], dict]:
    """Weights and the optimizer's state after five steps, of which the last two are another optimizer's with the same state."""
    torch.manual_seed(0)
    net = nn.Linear(5, 3)
    optimizer = kind([{"params": net.weight}], **{"lr": 0.1} | settings)
    optimizer.add_param_group({"params": net.bias, "lr": 0.2})
    for number in range(5):
        if number == 3:
            state = optimizer.state_dict()
            optimizer = kind([{"params": net.weight}, {"params": net.bias}], lr=1.0)
            optimizer.load_state_dict(state)
        optimizer.zero_grad()
        assert net.weight.grad is None
        F.cross_entropy(net(torch.randn(4, 5)), torch.arange(4) % 3).backward()
        optimizer.step()
    return list(net.parameters()), optimizer.state_dict()


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
                                      {"momentum": 0.9, "fused": True}, {"momentum": 0.9, "foreach": True},
                                      {"momentum": 0.9, "fused": True, "lr": torch.tensor(0.1)}])
def test_it_trains_and_resumes_as_pytorchs_does(settings):
    (ours, state), (theirs, their_state) = trained(SGD, settings), trained(torch.optim.SGD, settings)
    assert all(map(torch.equal, ours, theirs))
    assert state["param_groups"] == their_state["param_groups"]
    assert all(torch.equal(state["state"][number]["momentum_buffer"], theirs["momentum_buffer"])
               for number, theirs in their_state["state"].items() if theirs.get("momentum_buffer") is not None)


def test_hooks_are_called():
    weight, called = nn.Parameter(torch.ones(())), []
    optimizer = SGD([weight], lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    assert optimizer.step(lambda: weight.square().backward() or weight.square().detach()) == 1  # a closure, with gradients
    assert called == ["before", "after"]
    assert weight.item() == pytest.approx(0.8)
