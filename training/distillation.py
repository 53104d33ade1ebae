"""Knowledge distillation: train on a teacher's predictions too (Hinton, Vinyals and Dean 2015, arXiv:1503.02531)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Distillation:
    """Adds the predictions of trained networks to the loss. They see the same augmented images as the network that learns."""

    def __init__(self, teachers: Sequence[nn.Module], weight: float, temperature: float) -> None:
        """`weight` is the teachers' share of the loss, 0 to 1; the labels have the rest."""
        self.teachers = [teacher.eval().requires_grad_(False) for teacher in teachers]
        self.weight, self.temperature = weight, temperature

    def loss(self, label_loss: Tensor, logits: Tensor, images: Tensor) -> Tensor:
        """The loss to train by, a scalar in nats: the weighted mean of `label_loss` and the Kullback-Leibler divergence of the
        mean of the teachers' softened predictions from those of `logits`, N x classes, for `images`, N x 3 x H x W. The
        divergence is multiplied by the squared temperature, because its gradients shrink by that."""
        with torch.no_grad():
            predictions = [self._log_softened(teacher(images)) for teacher in self.teachers]
            log_mean = predictions[0] if len(predictions) == 1 else (
                torch.logsumexp(torch.stack(predictions), 0) - math.log(len(predictions)))
        log_student = self._log_softened(logits)
        divergence = F.kl_div(log_student, log_mean, reduction="batchmean", log_target=True) * self.temperature ** 2
        return (1 - self.weight) * label_loss + self.weight * divergence

    def _log_softened(self, logits: Tensor) -> Tensor:
        """The logarithms of the predictions at the temperature."""
        return F.log_softmax(logits.float() / self.temperature, 1)
