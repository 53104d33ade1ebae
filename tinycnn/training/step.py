"""One training step: forward pass, loss, backward pass, optimizer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from tinycnn.streams import side_stream, wait_for
from tinycnn.training.distillation import Distillation
from tinycnn.training.distributed import ALONE, Processes
from tinycnn.training.machine import has_bfloat16
from tinycnn.training.metrics import Metrics

Forward = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor, list[Tensor]], Tensor]


class TrainStep:
    """Trains on one batch and adds it to the metrics, without waiting for the device."""

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device,
                 label_smoothing: float, distillation: Distillation | None = None, processes: Processes = ALONE) -> None:
        self.net, self.optimizer, self.device = net, optimizer, device
        self.forward: Forward = net  # or what computes the same by other kernels
        self.loss: Loss | None = None  # likewise, in place of own_loss
        self.label_smoothing, self.distillation = label_smoothing, distillation
        self.metrics, self.autocast, self.processes = Metrics(device, processes), autocast(device), processes
        self.note = ""  # how steps run, for the log; a batch of a new size may change it
        self.first_done = 0.0  # time.perf_counter() when the first step returned

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """Train on images float32 N x 3 x H x W and labels int64 N, both on the device: this process's part of a batch."""
        if not len(images) and self.device.type == "cpu":  # BatchNorm would divide by zero; SyncBatchNorm needs every process
            self.optimizer.zero_grad()
            self.processes.average_gradients(self.net, 0)
            self.optimizer.step()
            return
        with self.autocast:
            teacher_logits = self.distillation.teacher_logits(images) if self.distillation else []
        # SyncBatchNorm exchanges float32, but for an empty part the dtype of its input: so no autocast there
        with self.autocast if len(images) else nullcontext(), counting_batches_together(self.net, self.device):
            logits = self.forward(images)
            if teacher_logits:
                wait_for(side_stream(self.device))
            loss = (self.loss or self.own_loss)(logits, labels, teacher_logits)
        self.optimizer.zero_grad()
        # In several processes, the gradients of the sum over images: SyncBatchNorm adds up gradients of parts that may
        # differ in size
        (loss * len(images) if self.processes.size > 1 else loss).backward()
        self.processes.average_gradients(self.net, len(images))
        self.optimizer.step()

    def own_loss(self, logits: Tensor, labels: Tensor, teacher_logits: list[Tensor]) -> Tensor:
        """The mean loss of a batch, from its logits and its teachers'; adds the batch to the metrics."""
        # on CUDA autocast would leave its softmax in bfloat16
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        if self.distillation:
            loss = self.distillation.loss(loss, logits, teacher_logits)
        if len(labels):
            self.metrics.add(loss, logits, labels)
        return loss


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on GPUs that have it in hardware. No cache: each weight is used once in a pass, and a cache would outlive a
    capture."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_bfloat16(device), cache_enabled=False)


@contextmanager
def counting_batches_together(net: nn.Module, device: torch.device) -> Iterator[None]:
    """On a GPU, count the batches of all BatchNorm layers in one kernel after the forward pass, instead of one kernel each.
    Layers without a momentum average by the count, so they keep their own."""
    modules = net.modules() if device.type == "cuda" else ()
    counts = [(layer, layer.num_batches_tracked) for layer in modules if isinstance(layer, _BatchNorm) and layer.training
              and layer.momentum is not None and layer.num_batches_tracked is not None
              and not isinstance(layer, nn.SyncBatchNorm)]  # which insists on counting
    for layer, _ in counts:
        layer._buffers["num_batches_tracked"] = None  # then the layer doesn't count
    try:
        yield
    finally:
        for layer, count in counts:
            layer._buffers["num_batches_tracked"] = count
    if counts:
        torch._foreach_add_([count for _, count in counts], 1)
