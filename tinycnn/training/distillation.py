"""Knowledge distillation: train on a teacher's predictions too (Hinton, Vinyals and Dean 2015, arXiv:1503.02531)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinycnn.streams import after_this, side_stream
from tinycnn.training.machine import has_bfloat16


class Distillation:
    """Adds the predictions of trained networks to the loss. They see the same augmented images as the network that learns."""

    def __init__(self, teachers: Sequence[nn.Module], weight: float, temperature: float) -> None:
        """`weight` is the teachers' share of the loss, 0 to 1; the labels have the rest."""
        self.teachers = [_frozen(teacher) for teacher in teachers]
        self.weight, self.temperature = weight, temperature

    def teacher_logits(self, images: Tensor) -> list[Tensor]:
        """Each teacher's logits, N x classes, float32 or under autocast bfloat16, for float images N x 3 x H x W. A GPU
        computes them beside what is launched next: call `wait_for` its side stream before they are used."""
        with torch.no_grad(), after_this(side_stream(images.device)):
            return [teacher(images) for teacher in self.teachers]

    def loss(self, label_loss: Tensor, logits: Tensor, teacher_logits: list[Tensor]) -> Tensor:
        """The loss to train by, a float32 scalar in nats: (1 - weight) * label_loss + weight * T**2 * KL(p || q), averaged over
        the N images, with q = softmax(logits / T), and p the mean over teachers of softmax(teacher_logits / T).

        `logits` and each of `teacher_logits`: N x classes, float32 or bfloat16. T**2, the squared temperature, keeps the size
        of the gradients (Hinton et al. 2015, section 2)."""
        predictions = [self._log_softened(each) for each in teacher_logits]
        log_mean = predictions[0] if len(predictions) == 1 else (
            torch.logsumexp(torch.stack(predictions), 0) - math.log(len(predictions)))
        log_student = self._log_softened(logits)
        divergence = F.kl_div(log_student, log_mean, reduction="batchmean", log_target=True) * self.temperature ** 2
        return (1 - self.weight) * label_loss + self.weight * divergence

    def _log_softened(self, logits: Tensor) -> Tensor:
        """The logarithms of the predictions at the temperature."""
        return F.log_softmax(logits.float() / self.temperature, 1)


def _frozen(teacher: nn.Module) -> nn.Module:
    """The network for predictions only, changed in place: the weights that autocast would cast in each step are cast once."""
    for layer in teacher.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and has_bfloat16(layer.weight.device):
            for parameter in layer.parameters():
                parameter.data = parameter.data.bfloat16()
    return teacher.eval().requires_grad_(False)
