"""The average of a network's weights over its training."""

import copy
from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

STATISTICS_BATCHES = 50  # batches of training images that BatchNorm's statistics come from


class WeightAverage:
    """An exponential moving average of a network's weights, in a network of its own, `net`.

    What was there n steps ago counts decay^n (Polyak and Juditsky 1992, "Acceleration of stochastic approximation by
    averaging"; Tarvainen and Valpola 2017, arXiv:1703.01780). The weights before the first step don't count: as in Adam
    (Kingma and Ba 2014, arXiv:1412.6980), the average is divided by the sum of what counts, 1 - decay^t after t steps.

    BatchNorm's statistics of averaged weights are not the average of statistics, so they are taken anew, from training
    images, before the average is used (Izmailov et al. 2018, arXiv:1803.05407).
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.net, self.decay = copy.deepcopy(net).eval().requires_grad_(False), decay
        self.share = torch.ones((), device=next(net.parameters()).device)  # of the next step's weights, on the device
        self.pairs = list(zip(self.net.parameters(), net.parameters(), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the network's weights as they are. Waits for nothing."""
        for average, now in self.pairs:
            average.lerp_(now, self.share)
        self.share.div_(self.share + self.decay)  # (1 - d) / (1 - d^t) for t steps becomes that for t + 1

    def take_statistics(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """BatchNorm's means and variances from the first of these batches of training images, float32 N x 3 x H x W."""
        update_bn(islice(batches, STATISTICS_BATCHES), self.net, self.share.device)

    def state_dict(self) -> dict[str, object]:
        """The averaged network's, and the share."""
        return {"net": self.net.state_dict(), "share": self.share}

    def load_state_dict(self, state: dict) -> None:
        """Raises RuntimeError where `state` is another network's."""
        self.net.load_state_dict(state["net"])
        self.share.copy_(state["share"])
