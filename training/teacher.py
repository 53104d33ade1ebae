"""Learning from a trained network too: knowledge distillation (Hinton, Vinyals and Dean 2015, arXiv:1503.02531)."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from config import Config, UserError
from training.images import Images
from training.weights import MakeNet, find, read


class Teacher:
    """A trained network, whose predictions for the very images of a batch, as they were augmented, are learned along with
    the labels. `name` is how logs call it."""

    def __init__(self, net: nn.Module, share: float, temperature: float, name: str) -> None:
        self.net, self.share, self.temperature, self.name = net.eval().requires_grad_(False), share, temperature, name

    def join(self, loss: Tensor, logits: Tensor, images: Tensor) -> Tensor:
        """The loss to train by, a scalar, in nats: `loss`, that of the labels, and the Kullback-Leibler divergence of the
        teacher's softened predictions from those of `logits`, N x classes, for `images`, N x 3 x H x W. The divergence is
        times the squared temperature, as its gradients shrink by that."""
        with torch.no_grad():
            taught = self.net(images)
        learned, wanted = (F.log_softmax(each.float() / self.temperature, 1) for each in (logits, taught))
        divergence = F.kl_div(learned, wanted, reduction="batchmean", log_target=True) * self.temperature ** 2
        return (1 - self.share) * loss + self.share * divergence


def find_teacher(config: Config, images: Images, device: torch.device, make_net: MakeNet) -> Teacher | None:
    """The teacher that the config names, if it names one. Raises UserError where it is none, or has learned from other
    images: it would know those that are held out."""
    if not config.teacher:
        return None
    found = read(find(Path(config.log_dir), config.teacher))
    if not found.trained_on(images):
        raise UserError(f"teacher {config.teacher} was trained on other images than this run's, or held others out: name "
                        "one of the same dataset and the same --validation")
    net = found.network(make_net).to(device).to(memory_format=torch.channels_last)
    return Teacher(net, config.teacher_share, config.temperature, found.name)
