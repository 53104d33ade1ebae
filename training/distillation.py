"""Knowledge distillation: train on a teacher's predictions too (Hinton, Vinyals and Dean 2015, arXiv:1503.02531)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Distillation:
    """Adds a trained network's predictions to the loss: those for the very images of a batch, as they were augmented."""

    def __init__(self, teacher: nn.Module, weight: float, temperature: float) -> None:
        """`weight` is the teacher's share of the loss, 0 to 1; the labels have the rest."""
        self.teacher, self.weight, self.temperature = teacher.eval().requires_grad_(False), weight, temperature

    def loss(self, label_loss: Tensor, logits: Tensor, images: Tensor) -> Tensor:
        """The loss to train by, a scalar in nats: the weighted mean of `label_loss` and the Kullback-Leibler divergence of the
        teacher's softened predictions from those of `logits`, N x classes, for `images`, N x 3 x H x W. The divergence is
        multiplied by the squared temperature, because its gradients shrink by that."""
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        log_student, log_teacher = (F.log_softmax(each.float() / self.temperature, 1) for each in (logits, teacher_logits))
        divergence = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * self.temperature ** 2
        return (1 - self.weight) * label_loss + self.weight * divergence
