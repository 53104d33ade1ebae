"""Choose how training steps run: as train_step is, as a CUDA graph of it, with fused kernels, or on a part of each batch."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from config import Config
from tinycnn.device import has_bfloat16
from tinycnn.processes import world
from tinycnn.sources import present_sources
from tinycnn.training.capture import CapturedStep, Step
from tinycnn.training.dilated import use_fast_dilated_convs
from tinycnn.training.distillation import Criterion, CrossEntropy, Distillation
from tinycnn.training.distributed import step_on_parts
from tinycnn.training.machine import wait_for_libraries

# Before this release a failed capture left the allocator in capture mode (pytorch #180395). Code as shipped doesn't fail: no
# operation waits for the GPU, libraries are loaded before, no other thread uses CUDA, and lack of memory ends a run anyway.
# Compare it with torch.__version__, which is no plain text: 2.9 comes before 2.13
FAILURES_END_CLEANLY = "2.13"


def fastest_step(train_step: Callable[..., Tensor], net: nn.Module, optimizer: torch.optim.Optimizer, criterion: Criterion,
                 config: Config, note: Callable[[str], object] = print) -> Step:
    """main.train_step with its first three arguments, or what computes the same in less time, after a check. `note` is given a
    line for the log on how steps run, as soon as that is known."""
    device = next(net.parameters()).device
    use_fast_dilated_convs(net, device)
    reason = _why_not_captured(config, device)
    if reason:
        if config.kernels == "fused":
            print(f"Steps use PyTorch's kernels: the fused ones need captured steps, and {reason}.")
        if config.capture == "on":
            print(f"Steps are not captured: {reason}.")
        if device.type == "cuda" and config.capture != "off":
            note(f"not captured: {reason}")
        return (step_on_parts if world.size > 1 else partial)(train_step, net, optimizer, criterion)
    wait_for_libraries()
    fused = _fused_step(train_step, net, optimizer, criterion) if config.kernels == "fused" else None
    return CapturedStep(partial(train_step, net, optimizer, criterion), net, optimizer, fused, note)


def _why_not_captured(config: Config, device: torch.device) -> str:
    if config.capture == "off":
        return "--capture is off"
    if device.type != "cuda" or config.batches != "device":
        return "that needs CUDA, and batches made on the device"
    if world.size > 1:
        return "that needs a run of one process"
    if config.capture == "auto" and torch.__version__ < FAILURES_END_CLEANLY and (edited := present_sources()["edited"]):
        return f"PyTorch {torch.__version__} can't go on after a failed capture, as an edit of {', '.join(edited)} might cause"
    return ""


def _fused_step(train_step: Callable[..., Tensor], net: nn.Module, optimizer: torch.optim.Optimizer,
                criterion: Criterion) -> Step | None:
    """The step by the kernels of tinycnn/kernels. None, and a line that says why, where they can't compute it."""
    reason = "they can't compute what model.py does"
    if not has_bfloat16(next(net.parameters()).device):
        reason = "this GPU has no bfloat16"
    else:
        try:
            from tinycnn.kernels.network import fuse
            if fused := fuse(net):
                return partial(train_step, fused, optimizer, fuse_criterion(criterion))
        except ImportError as error:
            reason = f"they need Triton ({error})"
    print(f"Steps use PyTorch's kernels, not the fused ones: {reason}.")
    return None


def fuse_criterion(criterion: Criterion) -> Criterion:
    """What computes as a criterion of tinycnn.training.distillation does, in one kernel; any other as it is."""
    if type(criterion) not in (CrossEntropy, Distillation):
        return criterion
    from tinycnn.kernels.loss import softmax_loss

    def fused(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        if isinstance(criterion, Distillation):
            return softmax_loss(logits, labels, criterion.teacher_logits(images), criterion.label_smoothing, criterion.share,
                                criterion.temperature)
        assert isinstance(criterion, CrossEntropy)
        return softmax_loss(logits, labels, [], criterion.label_smoothing, 0.0, 1.0)

    return fused
