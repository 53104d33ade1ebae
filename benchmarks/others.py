"""The training speed of this program, of the script most people write, and of a loop in the style of the fastest."""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

import main
from augmentation import test_policy, train_policy
from config import Config
from model import Net
from tinycnn.data.batches import Batches as Made
from tinycnn.data.dataset import Dataset as Images
from tinycnn.data.loading import load_dataset
from tinycnn.data.tensors import Epoch
from tinycnn.runs.inputs import load_inputs
from tinycnn.training.machine import find_device
from tinycnn.training.steps import Step, fastest_step

WARM_UP = 10  # steps before the clock starts, on a CPU; on a GPU a whole epoch
# "train", and where it was measured "test", in images per second; of a GPU "once", the seconds that only a first epoch takes
Measured = dict[str, float]
Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


def timed(run: Callable[[Batches], object], make: Callable[[], Batches], steps: int, device: torch.device) -> Measured:
    """Images per second of `run`, which works through batches, on those that `make` gives: on a GPU a whole pass, after
    another as warm-up, and what that took longer; on a CPU `steps` batches."""
    begun = time.perf_counter()
    seen, batches = 0, iter(make())  # which starts workers, if there are any

    def counted(batches: Batches) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        nonlocal seen
        for images, labels in batches:
            seen += len(images)
            yield images, labels

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    run(batches if device.type == "cuda" else islice(batches, WARM_UP))
    wait()
    started = time.perf_counter()
    run(counted(make() if device.type == "cuda" else islice(batches, steps)))
    wait()
    spent = time.perf_counter() - started
    return {"train": seen / spent, "once": started - begun - spent}


def make_program(config: Config, note: Callable[[str], object] = str) -> tuple[Step, nn.Module, LRScheduler, Made]:
    """The step, network, scheduler and batches that main.train makes of a config."""
    inputs = load_inputs(config)
    net, optimizer, scheduler, criterion, batches = main.build(inputs)
    step = fastest_step(main.train_step, net, optimizer, criterion, inputs.config, note)
    return step, net, scheduler, batches


def this_program(config: Config, steps: int) -> Measured:
    """main.py's own epochs and tests."""
    step, net, scheduler, made = make_program(config)
    device, epochs = next(net.parameters()).device, count()
    with made:
        measured = timed(lambda batches: main.train_epoch(step, net, Epoch(iter(batches), 0), scheduler),
                         lambda: made.train(next(epochs)), steps, device)
        return measured | {"test": timed(lambda batches: main.test_epoch(net, Epoch(iter(batches), 0)), made.test, 10,
                                         device)["train"]}


class OneByOne(Dataset):
    """One PIL image at a time, as most scripts have it."""

    def __init__(self, split, policy) -> None:
        import albumentations as A
        from albumentations.pytorch import ToTensorV2

        self.split, self.policy = split, A.Compose([*policy, ToTensorV2()])

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        picture = Image.fromarray(self.split.images[index])
        return self.policy(image=np.array(picture))["image"], int(self.split.labels[index])


def usual_script(arguments: argparse.Namespace, workers: int, threads: int) -> Measured:
    """The script most people write."""
    config, images, device = Config(), load_dataset(arguments.dataset, arguments.data_dir), find_device(arguments.device)
    mean, std = images.statistics
    loaders = [DataLoader(OneByOne(split, policy), config.batch_size, shuffle=True, num_workers=workers) for split, policy in (
        (images.train, train_policy(config, 0, mean, std)), (images.test, test_policy(mean, std)))]
    torch.set_num_threads(threads)
    net = Net().to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    criterion = torch.nn.CrossEntropyLoss()

    def train(batches: Batches) -> None:
        net.train()
        correct, loss_sum = 0, 0.0
        for inputs, labels in batches:
            inputs, labels = inputs.to(device), labels.to(device)
            optimizer.zero_grad()
            outputs = net(inputs)
            loss = criterion(outputs, labels)
            loss.backward()
            optimizer.step()
            loss_sum += loss.item()
            correct += outputs.argmax(1).eq(labels).sum().item()

    def test(batches: Batches) -> None:
        net.eval()
        correct = 0
        for inputs, labels in batches:
            with torch.no_grad():
                correct += net(inputs.to(device)).argmax(1).eq(labels.to(device)).sum().item()

    measured = timed(train, lambda: loaders[0], arguments.steps, device)
    return measured | {"test": timed(test, lambda: loaders[1], arguments.steps // 2, device)["train"]}


def fast_public_style(arguments: argparse.Namespace) -> Measured:
    """The same network in a loop in the style of the fastest public CIFAR-10 code; CUDA only."""
    config, images, device = Config(), load_dataset(arguments.dataset, arguments.data_dir), find_device(arguments.device)
    train_images, labels = _normalized(images.train.images, images, device), torch.from_numpy(images.train.labels).to(device)
    plain = Net().to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(plain.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay,
                                fused=True)
    net: torch.nn.Module = torch.compile(plain, mode="max-autotune", dynamic=False)  # type: ignore[assignment]

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.randperm(len(labels), device=device)
        augmented = _flipped_and_moved(train_images)
        for start in range(0, len(order) - 127, 128):  # the short last batch is dropped, as there
            indices = order[start:start + 128]
            yield augmented[indices], labels[indices]

    def train(batches: Batches) -> None:
        net.train()
        for inputs, targets in batches:
            with torch.autocast("cuda", torch.bfloat16):
                loss = F.cross_entropy(net(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return timed(train, batches, arguments.steps, device)  # not its test, which would have to be compiled for minutes, too


def _normalized(pixels, images: Images, device: torch.device) -> torch.Tensor:
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in images.statistics)
    scaled = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2) / 255
    return ((scaled - mean) / std).bfloat16().contiguous(memory_format=torch.channels_last)


def _flipped_and_moved(images: torch.Tensor) -> torch.Tensor:
    """A whole epoch flipped and moved by up to two pixels."""
    count, device = len(images), images.device
    padded = F.pad(images, (2, 2, 2, 2), "reflect")
    y, x = (torch.randint(0, 5, (count, 1), device=device) + torch.arange(32, device=device) for _ in range(2))
    image = torch.arange(count, device=device)[:, None, None, None]
    channel = torch.arange(3, device=device)[:, None, None]
    moved = padded[image, channel, y[:, None, :, None], x[:, None, None, :]]
    flipped = torch.where(torch.rand(count, 1, 1, 1, device=device) < 0.5, moved.flip(3), moved)
    return flipped.contiguous(memory_format=torch.channels_last)
