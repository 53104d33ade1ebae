"""A range test of the learning rate: the loss while the rate grows from step to step (Smith 2015, arXiv:1506.01186, section
3.3)."""

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tinycnn.errors import Diverged

if TYPE_CHECKING:  # loaded by `drawing`
    from matplotlib.figure import Figure

LOWEST, HIGHEST = 1e-4, 10.0  # learning rates
FEWEST = 30  # steps that a test needs
MEMORY = 0.95  # share that the mean of the losses so far has in the next mean
BLOWN_UP = 3.0  # times the lowest mean: there the test ends
FALLEN = 0.95  # share of the mean's fall at which it slows
LEAST_FALL = 0.02  # of the first mean; a smaller one is noise
READ_EVERY = 10  # steps: reading the losses waits for a GPU


def range_test(step: Callable[[Tensor, Tensor], Tensor], optimizer: torch.optim.Optimizer,
               batches: Iterable[tuple[Tensor, Tensor]], steps: int) -> tuple[list[float], list[float]]:
    """Train on at most `steps` batches, at rates that grow exponentially from LOWEST to HIGHEST, until the loss blows up.
    `step` returns the sums of a batch, as main.train_step does. Returns the rates, and the mean loss of each batch in nats.

    Raises Diverged where the first loss is not finite."""
    rates: list[float] = []
    losses: list[float] = []
    sums, counts = [], []
    for number, (images, labels) in zip(range(steps), batches, strict=False):
        rates.append(LOWEST * (HIGHEST / LOWEST) ** (number / (steps - 1)))
        for group in optimizer.param_groups:
            group["lr"] = rates[-1]
        sums.append(step(images, labels))
        counts.append(len(labels))
        if len(sums) == READ_EVERY or number == steps - 1:
            losses += [loss / count for loss, count in zip(torch.stack(sums)[:, 0].tolist(), counts, strict=True)]
            sums, counts = [], []
            means = smooth(losses)
            if not math.isfinite(means[-1]) or means[-1] > BLOWN_UP * min(means):
                break
    if not math.isfinite(losses[0]):
        raise Diverged(f"the loss of the first batch is {losses[0]}, at a learning rate of {LOWEST:g}: look at the edits of "
                       "main.py and model.py, or at the weights of --init")
    return rates, losses


def smooth(losses: list[float]) -> list[float]:
    """The exponential moving mean of the losses, each divided by the weights so far (Kingma and Ba 2014, arXiv:1412.6980,
    section 3)."""
    means, mean = [], 0.0
    for number, loss in enumerate(losses, 1):
        mean = MEMORY * mean + (1 - MEMORY) * loss
        means.append(mean / (1 - MEMORY ** number))
    return means


def suggest(rates: list[float], losses: list[float]) -> float | None:
    """The rate to try, to one digit: where the loss stops falling, the upper bound of Smith's section 3.3. None where it
    doesn't fall by LEAST_FALL. His "slows" is read as 95 % of the moving mean's fall: the lowest point itself lies anywhere on
    a flat part. Calibrated on `fast` and the baseline only; LEARNINGS.md tells how well that agrees. A schedule's `lr` is its
    highest rate."""
    means = [mean for mean in smooth(losses) if math.isfinite(mean)]
    if min(means) > (1 - LEAST_FALL) * means[0]:
        return None
    slow = means[0] - FALLEN * (means[0] - min(means))
    return float(f"{next(rate for rate, mean in zip(rates, means, strict=False) if mean <= slow):.0e}")


def draw(rates: list[float], losses: list[float]) -> "Figure":
    """The loss by the rate, on a logarithmic axis, with its moving mean and the suggestion."""
    from matplotlib.figure import Figure

    from tinycnn.runs.drawing import BLUE, LIGHT_GREY, ORANGE

    means, suggestion = smooth(losses), suggest(rates, losses)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses, color=LIGHT_GREY, label="a batch")
    axes.plot(rates, means, color=BLUE, linewidth=2, label="moving mean")
    if suggestion:
        axes.axvline(suggestion, color=ORANGE, linestyle="--", label=f"suggestion: {suggestion:g}")
    finite = [mean for mean in means if math.isfinite(mean)]
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss, nats per image",
             ylim=(0.9 * min(finite), 1.1 * min(max(finite), BLOWN_UP * min(finite))))
    axes.xaxis.set_major_formatter("{x:g}")  # powers would be drawn as formulas, which `drawing` turns off
    axes.set_title("Loss while the learning rate grows from batch to batch", fontsize=13)
    axes.legend(frameon=False)
    axes.grid()
    return figure
