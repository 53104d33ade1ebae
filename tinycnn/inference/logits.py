"""The logits of a network for all batches of a split."""

import torch
from torch import Tensor, nn

from tinycnn.data.tensors import Epoch
from tinycnn.training.machine import autocast


@torch.no_grad()
def predict(net: nn.Module, batches: Epoch) -> tuple[Tensor, Tensor]:
    """The network's logits, float32 N x classes, and the labels, int64 N, of all batches, on their device. Leaves the network
    in evaluation mode."""
    net.eval()
    outputs = []
    for images, labels in batches:
        with autocast(images.device):
            outputs.append((net(images).float(), labels))
    return torch.cat([logits for logits, _ in outputs]), torch.cat([labels for _, labels in outputs])
