"""Train a compact depthwise-separable CNN on CIFAR-10: dataset, Net, SGD, scheduler, training and test loops, log.

    python main.py                      80 epochs with the settings of config.py
    python main.py --recipe fast        30 epochs, a quarter of the compute
    python main.py --resume             resume the newest unfinished run
    python main.py --help               all settings and commands

Edit config.py for settings, augmentation.py for the images, model.py for the network, and this file for all else. A run keeps
copies of the four files, and `compare` says which of them were edited.
"""

if __name__ == "__main__":  # before torch is loaded, so that --help and a wrong flag answer at once
    import os
    import sys
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # PYTHONSAFEPATH and -I leave it out
    from tinycnn.commands.start import parse_or_exit, run_or_exit
    arguments = parse_or_exit()

from math import nan
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, OneCycleLR, SequentialLR

from augmentation import test_policy, train_policy
from config import Config, net_settings
from model import Net
from tinycnn.data.batches import Batches, make_batches
from tinycnn.data.tensors import Epoch
from tinycnn.runs.inputs import Inputs, load_inputs
from tinycnn.runs.run import Run
from tinycnn.runs.weights import begin_with
from tinycnn.training.distillation import Criterion, make_criterion
from tinycnn.training.distributed import averages, distribute
from tinycnn.training.machine import autocast, check_network, move, seed_torch
from tinycnn.training.optimizer import SGD
from tinycnn.training.progress import progress
from tinycnn.training.steps import Step, fastest_step

BY_BATCH = (OneCycleLR,)  # schedulers that step after each batch; all others step after each epoch


def train(config: Config, inputs: Inputs | None = None, run: Run | None = None) -> Path:
    """Train a new run, or `run` to its end, which was begun before. Returns the run's folder. A sweep passes `inputs`.

    Raises UserError for what the user can change, and Diverged where the loss is no longer finite."""
    inputs = inputs or load_inputs(config)               # images in memory, trained weights, the device
    config = inputs.config                               # with what is chosen by "auto"
    net, optimizer, scheduler, criterion, batches = build(inputs)
    run = run or Run(config)
    run.begin(inputs, net, optimizer, scheduler)         # makes the run's folder, or loads its last checkpoint
    with run, batches:                                   # ended early: says what is safe, and how to resume
        net = distribute(net, optimizer, scheduler)      # DistributedDataParallel, where torchrun has started several processes
        step = fastest_step(train_step, net, optimizer, criterion, config, run.note)  # a CUDA graph of it, where possible
        for epoch in range(run.epochs_done, config.epochs):
            seed_torch(config.seed, epoch + 1)           # of dropout; batches have random numbers of their own
            row = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"]}
            row["train_loss"], row["train_acc"] = train_epoch(step, net, batches.train(epoch), scheduler)
            last = epoch == config.epochs - 1
            if config.validation:                        # then the test images wait, so that no setting is chosen on them
                row["val_loss"], row["val_acc"] = test_epoch(net, batches.validation())
            tested = last or not config.validation
            row["test_loss"], row["test_acc"] = test_epoch(net, batches.test()) if tested else (nan, nan)
            if not isinstance(scheduler, BY_BATCH):
                scheduler.step()
            run.log_epoch(row)                           # prints it too; a new key of `row` is a new column
        run.finish()
    return run.folder


def build(inputs: Inputs) -> tuple[nn.Module, torch.optim.Optimizer, LRScheduler, Criterion, Batches]:
    """Everything that trains, at its beginning."""
    config, dataset, device = inputs.config, inputs.dataset, inputs.device
    batches = make_batches(config, dataset, train_policy, test_policy, device)
    seed_torch(config.seed, 0)
    net: nn.Module = Net(len(dataset.class_names), **net_settings(vars(config)))
    begin_with(net, inputs.init)                         # trained weights, all that fit
    check_network(net, len(dataset.class_names), config.crop_size)
    net = move(net, device)
    optimizer = SGD(net.parameters(), lr=config.lr, momentum=config.momentum, nesterov=config.nesterov,
                    weight_decay=config.weight_decay)
    scheduler = make_scheduler(optimizer, config, batches.per_epoch)
    criterion = make_criterion(config, [teacher.build_net() for teacher in inputs.teachers], device)
    return net, optimizer, scheduler, criterion, batches


def make_scheduler(optimizer: torch.optim.Optimizer, config: Config, steps: int) -> LRScheduler:
    """The scheduler that `config.schedule` names; `steps` are those of an epoch."""
    epochs = config.epochs - config.warmup
    if config.schedule == "one-cycle":  # momentum stays as it is
        final = max(config.min_lr, 1e-9 * config.lr)
        return OneCycleLR(optimizer, config.lr, total_steps=epochs * steps, cycle_momentum=False,
                          final_div_factor=config.lr / 25 / final)
    scheduler: LRScheduler = {
        "cosine": lambda: CosineAnnealingLR(optimizer, epochs, config.min_lr),
        "step": lambda: MultiStepLR(optimizer, [-(-epochs // 2), -(-epochs * 3 // 4)]),  # rounded up
        "constant": lambda: ConstantLR(optimizer, factor=1),
    }[config.schedule]()
    if config.warmup:
        linear = LinearLR(optimizer, start_factor=1 / (config.warmup + 1), total_iters=config.warmup)
        return SequentialLR(optimizer, [linear, scheduler], [config.warmup])
    return scheduler


def train_step(net: nn.Module, optimizer: torch.optim.Optimizer, criterion: Criterion, images: Tensor,
               labels: Tensor) -> Tensor:
    """Train on one batch: images float32 N x 3 x H x W, labels int64 N. Returns the sum of its losses and how many it got
    right, float32, on the device, without waiting for it."""
    with autocast(images.device):
        logits = net(images)
        loss = criterion(images, logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return torch.stack((loss.detach() * len(labels), (logits.argmax(1) == labels).sum()))


def train_epoch(step: Step, net: nn.Module, batches: Epoch, scheduler: LRScheduler) -> tuple[float, float]:
    """Train on each batch. Returns the mean loss, in nats per image, and the accuracy, in percent, of the epoch, in which the
    weights change."""
    net.train()
    sums, count = torch.zeros(2, device=next(net.parameters()).device), 0
    for images, labels in progress(batches, sums):
        sums += step(images, labels)
        count += len(labels)
        if isinstance(scheduler, BY_BATCH):
            scheduler.step()
    return averages(sums, count)


@torch.no_grad()
def test_epoch(net: nn.Module, batches: Epoch) -> tuple[float, float]:
    """Returns the mean cross-entropy, in nats per image, and the accuracy, in percent, over all batches."""
    net.eval()
    outputs = []
    for images, labels in batches:
        with autocast(images.device):
            outputs.append((net(images).float(), labels))
    logits, labels = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    loss, correct = F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(1) == labels).sum()
    return averages(torch.stack((loss, correct)), len(labels))


if __name__ == "__main__":
    run_or_exit(arguments, train, build, train_step)
