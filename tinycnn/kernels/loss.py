"""The loss of a step in one kernel, with its gradients and the metrics."""

import torch
from torch import Tensor

from tinycnn.kernels import launches
from tinycnn.training.step import Loss, TrainStep


class _SoftmaxLoss(torch.autograd.Function):
    """What launches.softmax_loss computes."""

    @staticmethod
    def forward(ctx, logits, labels, teachers, smoothing, share, temperature, sums):
        loss, ctx.gradients = launches.softmax_loss(logits.contiguous(), labels, teachers, smoothing, share, temperature, sums)
        return loss

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.gradients, *6 * [None]


def fused_loss(step: TrainStep) -> Loss:
    """What computes as `step.own_loss` does, metrics included."""
    distillation = step.distillation
    share, temperature = (distillation.weight, distillation.temperature) if distillation else (0.0, 1.0)

    def loss(logits: Tensor, labels: Tensor, teacher_logits: list[Tensor]) -> Tensor:
        return _SoftmaxLoss.apply(logits.float(), labels, teacher_logits, step.label_smoothing, share, temperature,
                                  step.metrics.sums)

    return loss
