"""The criterion: cross-entropy and, with teachers, distillation (Hinton, Vinyals and Dean 2015, arXiv:1503.02531)."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from config import Config
from tinycnn.device import has_bfloat16, memory_format

Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]  # of images, logits and labels: the mean loss of a batch


def make_criterion(config: Config, teachers: Sequence[nn.Module], device: torch.device) -> Criterion:
    """The mean loss of a batch, a float32 scalar in nats, as a function of its images (float32 N x 3 x H x W), logits
    (N x classes, float32 or bfloat16) and labels (int64 N)."""
    if not teachers:
        return CrossEntropy(config.label_smoothing)
    nets = [teacher.to(device).to(memory_format=memory_format(device)) for teacher in teachers]
    return Distillation(nets, config.teacher_share, config.temperature, config.label_smoothing)


class CrossEntropy:
    """Cross-entropy with label smoothing."""

    def __init__(self, label_smoothing: float) -> None:
        self.label_smoothing = label_smoothing

    def __call__(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean over the N images; the types are those of make_criterion."""
        # on CUDA autocast would leave its softmax in bfloat16
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)


class Distillation(CrossEntropy):
    """Adds the predictions of trained networks, which see the same augmented images as the network that learns."""

    def __init__(self, teachers: Sequence[nn.Module], share: float, temperature: float, label_smoothing: float = 0.0) -> None:
        """`share` is the teachers' share of the loss, 0 to 1; the labels have the rest."""
        super().__init__(label_smoothing)
        self.teachers = [_frozen(teacher) for teacher in teachers]
        self.share, self.temperature = share, temperature

    @torch.no_grad()
    def teacher_logits(self, images: Tensor) -> list[Tensor]:
        """Each teacher's logits, N x classes, float32 or on GPUs bfloat16, for float32 images N x 3 x H x W."""
        # on GPUs teachers have bfloat16 weights, also where a step runs in float32
        with torch.autocast(images.device.type, torch.bfloat16, enabled=has_bfloat16(images.device), cache_enabled=False):
            return [teacher(images) for teacher in self.teachers]

    def __call__(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """(1 - share) * cross-entropy + share * T**2 * KL(p || q), averaged over the N images, with q = softmax(logits / T),
        and p the mean over teachers of softmax(teacher_logits / T); the types are those of make_criterion.

        T**2, the squared temperature, keeps the size of the gradients (Hinton et al. 2015, section 2)."""
        predictions = [self._log_softened(each) for each in self.teacher_logits(images)]
        log_mean = predictions[0] if len(predictions) == 1 else (
            torch.logsumexp(torch.stack(predictions), 0) - math.log(len(predictions)))
        log_student = self._log_softened(logits)
        divergence = F.kl_div(log_student, log_mean, reduction="batchmean", log_target=True) * self.temperature ** 2
        return (1 - self.share) * super().__call__(images, logits, labels) + self.share * divergence

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
