"""The loss of tinycnn/training/distillation.py in one kernel, with its gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tinycnn.kernels import launches


class _SoftmaxLoss(torch.autograd.Function):
    """What launches.softmax_loss computes."""

    @staticmethod
    def forward(ctx, logits, labels, teachers, smoothing, share, temperature):
        loss, ctx.gradients = launches.softmax_loss(logits.contiguous(), labels, teachers, smoothing, share, temperature)
        return loss

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.gradients, *5 * [None]


def softmax_loss(logits: Tensor, labels: Tensor, teachers: Sequence[Tensor], smoothing: float, share: float,
                 temperature: float) -> Tensor:
    """The mean loss of a batch, a float32 scalar in nats: cross-entropy of the logits (N x classes, float32 or bfloat16) with
    label smoothing, and with `share` the distillation loss from the logits of `teachers`, N x classes each."""
    return _SoftmaxLoss.apply(logits.float(), labels, teachers, smoothing, share, temperature)
