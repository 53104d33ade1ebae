"""Check a captured step: how far is it from a float32 step, and how far is PyTorch's own eager step?

Each of BATCHES batches is trained on from one state three times: captured, eager, and eager in float32, which is taken for
right. Every tensor that a step changes (parameters, momentum, running statistics, counters, the sums that it returns) must pass
twice:
- the length of its error, over all batches, is at most LIMIT times that of the eager step's;
- along the right change, the two differ by at most SLACK of it, and DEVIATIONS standard deviations of the eager step's error.
  So must each of its slices: a channel, a row, a tap. This sees what is small beside rounding, such as a factor of 1.1.

Measured on a CPU, with rounding to bfloat16 in float32 arithmetic, on 20 times 8 batches of 16 or 32 CIFAR-10 images, half of
them at this network's initialization: an eager step's gradients are off by 30 % in the first layers, by 1 % in the last; after
training by 14 % and 1 %. Another right step, which rounds every figure otherwise, has gradients with 0.83 to 1.29 times these
errors, and is at 0.51 to 0.83 of what is allowed.
"""

import math

import torch
from torch import Tensor, nn

State = dict[str, Tensor]  # whatever a step changes, by name
CORRECT = "correct predictions"

BATCHES = 8
LIMIT = 1.5
SLACK = 0.05
SLACK_OF_SLICES = 0.15  # whose errors are less independent
SLACK_OF_COUNTS = 0.3  # predictions may be nearly ties
DEVIATIONS = 8
TINY = torch.finfo(torch.float64).tiny


def step_state(net: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """The tensors that a step changes: parameters, buffers, the optimizer's state."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in net.named_parameters()}
    state = {f"parameter {name}": parameter.detach() for parameter, name in names.items()}
    state |= {f"buffer {name}": buffer for name, buffer in net.named_buffers()}
    for parameter, values in optimizer.state.items():
        state |= {f"{key} of {names[parameter]}": value for key, value in values.items() if isinstance(value, Tensor)}
    return state


def with_sums(state: State, sums: Tensor) -> State:
    """The state, and the sums that a step has returned."""
    return state | {"loss": sums[0], CORRECT: sums[1]}


def snapshot(state: State) -> State:
    """A copy of the state."""
    return {name: tensor.clone() for name, tensor in state.items()}


def put_back(state: State, saved: State) -> None:
    """Copy `saved` into `state`. A tensor that `saved` lacks, such as the first step's momentum, is set to zero, which is
    equivalent."""
    for name, tensor in state.items():
        tensor.copy_(saved[name]) if name in saved else tensor.zero_()


def addresses(state: State) -> dict[str, int]:
    """Return the memory address of each tensor."""
    return {name: tensor.data_ptr() for name, tensor in state.items()}


def vary(images: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Another batch of the same shapes, with other statistics: sums of two images each, every other time negative, and labels
    of other images."""
    return (-1) ** number * (images + images.roll(number + 1, 0).flip(-1)), labels.roll(number + 1)


class Errors:
    """Of captured and of eager steps, against float32 ones."""

    def __init__(self) -> None:
        self.products: dict[str, Tensor] = {}  # by tensor, for each of its entries: sums over batches, see `add`
        self.batches = 0

    def add(self, start: State, right: State, eager: State, captured: State) -> None:
        """Add a batch: three ends of a step from `start`. Doesn't wait for the device."""
        for name, tensor in right.items():
            exact = tensor.double()
            change = exact - start[name].double() if name in start else exact
            ours, theirs = captured[name].double() - exact, eager[name].double() - exact
            products = torch.stack([ours.square(), theirs.square(), change.square(), (ours - theirs) * change])
            self.products[name] = self.products[name] + products if name in self.products else products
        self.batches += 1

    def worst(self) -> tuple[float, str]:
        """The largest error as a share of what is allowed, and whose it is. Waits for the device once."""
        device = self.products[CORRECT].device  # an optimizer may keep counters on the CPU
        shares = torch.stack([self._share(name).to(device) for name in self.products]).tolist()
        return max((math.inf if math.isnan(share) else share, name) for share, name in zip(shares, self.products, strict=True))

    def _share(self, name: str) -> Tensor:
        """A tensor's error as a share of what is allowed: the largest of its length, and of all slices along the change."""
        products, of_whole, of_slices = self.products[name], SLACK, SLACK_OF_SLICES
        if name == CORRECT:
            of_whole = of_slices = SLACK_OF_COUNTS
        figures = self.batches * products[0].numel()
        whole = products.reshape(4, -1).sum(1, keepdim=True)  # 4 x 1
        typical = (whole[1] / figures).sqrt()  # error of a figure of the eager step
        ours, theirs, change = whole[:3].sqrt()
        shares = [ours / (LIMIT * (theirs + 3 * typical) + of_whole * change + TINY)]  # of few figures, lengths vary more

        def add(slices: Tensor, slack: float) -> None:
            _, squares, change, along = slices  # 4 x slices
            deviation = (squares * len(squares) / figures).sqrt().maximum(typical)
            shares.append(along.abs() / (slack * change + DEVIATIONS * deviation * change.sqrt() + TINY))

        add(whole, of_whole)
        for dim, size in enumerate(products.shape[1:], start=1):
            add(products.movedim(dim, 1).reshape(4, size, -1).sum(2), of_slices)
        return torch.cat(shares).max()
