"""Compare a captured step with an eager one: what each changes, from the same state."""

import math
from collections import defaultdict

import torch
from torch import Tensor

from tinycnn.training.step import TrainStep

State = dict[str, Tensor]  # whatever a step changes, by name
LOSS, CORRECT = "loss", "correct predictions"

# Two correct bfloat16 steps that round differently lie up to 0.35 apart: measured with this network at its initialization, in
# its first layers. A step that leaves something out, or reads something old, is at 1 or more.
TOLERANCE = 0.5
# A gradient that is nothing but rounding, such as a bias's before BatchNorm, has this share of a typical one
ROUNDING = 0.02


def step_state(step: TrainStep) -> State:
    """The tensors that a step changes: parameters, buffers, the optimizer's state, the metrics."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in step.net.named_parameters()}
    state = {f"parameter {name}": parameter.detach() for parameter, name in names.items()}
    state |= {f"buffer {name}": buffer for name, buffer in step.net.named_buffers()}
    for parameter, values in step.optimizer.state.items():
        state |= {f"{key} of {names[parameter]}": value for key, value in values.items() if isinstance(value, Tensor)}
    return state | {LOSS: step.metrics.sums[0], CORRECT: step.metrics.sums[1]}


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


def largest_difference(start: State, one: State, other: State, images: int) -> tuple[float, str]:
    """Compare the states `one` and `other` after a step from `start` on a batch of `images` images. Returns the largest
    difference of a tensor, as a share of its change in `other`, and that tensor's name. Waits for the device once."""
    differences, changes = _norms(one, other), _norms(other, start)
    figures = torch.stack([differences, changes], dim=1).tolist()
    kinds: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for (name, tensor), (_, change) in zip(start.items(), figures, strict=True):
        kinds[_kind(name, tensor)].append((change, tensor.numel()))
    typical = {kind: (sum(change**2 for change, _ in each) / sum(numbers for _, numbers in each)) ** 0.5
               for kind, each in kinds.items()}
    worst, worst_name = 0.0, ""
    for (name, tensor), (difference, change) in zip(start.items(), figures, strict=True):
        kind = _kind(name, tensor)
        slack = {"count": 0.0, "correct": 2 + images / 50}.get(kind, ROUNDING * typical[kind] * tensor.numel() ** 0.5)
        share = difference / (change + slack) if difference else 0.0
        share = math.inf if math.isnan(share) else share  # a step whose results are not numbers
        if share > worst:
            worst, worst_name = share, name
    return worst, worst_name


def _norms(one: State, other: State) -> Tensor:
    """The norm of each tensor's difference, float64, on the device that trains; an optimizer may keep counters on the CPU."""
    device = one[LOSS].device
    return torch.stack([torch.linalg.vector_norm((one[name].double() - other[name].double()).flatten()).to(device)
                        for name in other])


def _kind(name: str, tensor: Tensor) -> str:
    """Tensors of one kind change by similar amounts."""
    return "correct" if name == CORRECT else name.split()[0] if tensor.is_floating_point() else "count"
