"""What our training speed is compared with: the script most people write, and a loop in the style of the fastest."""

import argparse
import time
from collections.abc import Callable
from itertools import islice

WARM_UP = 10  # steps before the clock starts
Measured = dict[str, float]  # "train" and "test" in images per second, "first" step in seconds, "memory" of a GPU in bytes


def timed(step: Callable, batches, steps: int, device, size: int = 128) -> Measured:
    """Images per second over `steps` batches of `size` after a warm-up, and the seconds of the first step."""
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    batches, begun = iter(batches), time.perf_counter()
    step(*next(batches))
    wait()
    first = time.perf_counter() - begun
    for batch in islice(batches, WARM_UP - 1):
        step(*batch)
    wait()
    started, seen = time.perf_counter(), 0
    for batch in islice(batches, steps):
        step(*batch)
        seen += len(batch[0])
    wait()
    return {"train": seen / (time.perf_counter() - started), "first": first}


def usual_script(arguments: argparse.Namespace, workers: int) -> Measured:
    """The script most people write."""
    import albumentations as A
    import numpy as np
    import torch
    from albumentations.pytorch import ToTensorV2
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    import main
    from config import Config
    from model import Net
    from training.augment import test_policy, train_policy
    from training.images import load

    config, images = Config(), load("cifar10", arguments.data_dir)

    class OneByOne(Dataset):
        def __init__(self, split, policy):
            self.split, self.policy = split, A.Compose([*policy, ToTensorV2()])

        def __len__(self):
            return len(self.split)

        def __getitem__(self, index):
            picture = Image.fromarray(self.split.images[index])
            return self.policy(image=np.array(picture))["image"], int(self.split.labels[index])

    device = torch.device(arguments.device)
    torch.set_num_threads(main.cores())
    net = Net().to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    criterion = torch.nn.CrossEntropyLoss()
    correct, loss_sum = 0, 0.0

    def train(inputs, labels):
        nonlocal correct, loss_sum
        inputs, labels = inputs.to(device), labels.to(device)
        optimizer.zero_grad()
        outputs = net(inputs)
        loss = criterion(outputs, labels)
        loss.backward()
        optimizer.step()
        loss_sum += loss.item()
        correct += outputs.argmax(1).eq(labels).sum().item()

    def test(inputs, labels):
        nonlocal correct
        with torch.no_grad():
            correct += net(inputs.to(device)).argmax(1).eq(labels.to(device)).sum().item()

    statistics_of = images.statistics()
    loaders = [DataLoader(OneByOne(split, policy), config.batch_size, shuffle=True, num_workers=workers) for split, policy in (
        (images.train, train_policy(config, *statistics_of)), (images.test, test_policy(*statistics_of)))]
    net.train()
    measured = timed(train, loaders[0], arguments.steps, device)
    net.eval()
    return measured | {"test": timed(test, loaders[1], arguments.steps // 2, device)["train"]}


def fast_public_style(arguments: argparse.Namespace) -> Measured:
    """The same network in a loop in the style of the fastest public CIFAR-10 code; CUDA only."""
    import torch
    from torch.nn import functional as F

    import main
    from config import Config

    parts = main.build(Config(dataset="cifar10", data_dir=arguments.data_dir, device=arguments.device))
    device = parts.device
    mean, deviation = (torch.tensor(values, device=device)[:, None, None] for values in (parts.mean, parts.deviation))

    def normalized(images):
        pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2) / 255
        return ((pixels - mean) / deviation).bfloat16().contiguous(memory_format=torch.channels_last)

    train, test = normalized(parts.images.train.images), normalized(parts.images.test.images)
    labels = torch.from_numpy(parts.images.train.labels).to(device)
    net: torch.nn.Module = torch.compile(parts.net, mode="max-autotune")  # type: ignore[assignment]

    def augmented():
        """The epoch flipped and moved by up to two pixels, in a new order."""
        count = len(train)
        padded = F.pad(train, (2, 2, 2, 2), "reflect")
        y, x = (torch.randint(0, 5, (count, 1), device=device) + torch.arange(32, device=device) for _ in range(2))
        image = torch.arange(count, device=device)[:, None, None, None]
        channel = torch.arange(3, device=device)[:, None, None]
        moved = padded[image, channel, y[:, None, :, None], x[:, None, None, :]]
        flipped = torch.where(torch.rand(count, 1, 1, 1, device=device) < 0.5, moved.flip(3), moved)
        return flipped.contiguous(memory_format=torch.channels_last)

    def batches():
        while True:
            images, order = augmented(), torch.randperm(len(train), device=device)
            for start in range(0, len(order) - 127, 128):
                indices = order[start:start + 128]
                yield images[indices], labels[indices]

    def step(images, targets):
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(net(images), targets)
        parts.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parts.optimizer.step()

    net.train()
    measured = timed(step, batches(), arguments.steps, device)
    net.eval()

    def predict(images, _):
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            net(images).argmax(1)

    tests = ((part, None) for _ in range(100) for part in test.split(2000))
    return measured | {"test": timed(predict, tests, 20, device, size=2000)["train"]}
