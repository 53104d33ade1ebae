"""What checkpoints cost: the time to write one, beside the time of the epoch it follows.

    python benchmarks/checkpoint_overhead.py --data-dir ~/data     prints, and writes benchmarks/results/checkpoint_overhead.txt

Steps of training and checkpoints (copied, packed, hashed, flushed to disk, renamed) take turns in one process; medians
are compared. One checkpoint an epoch is the most that is ever written.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from analysis.identity import describe_network
from batches.making import make_batches, make_policies
from config import Config
from images.loading import load_images
from model import Net
from runs.log import Row
from runs.record import make_record
from runs.writer import start_run
from training.capture import make_step
from training.dilated import use_fast_dilated_convs
from training.epoch import train_epoch

RESULTS = Path(__file__).parent / "results"


def main(data_dir: str, rounds: int, steps: int) -> str:
    """Measure; returns the text of the result."""
    images = load_images("cifar10", data_dir)
    mean, std = images.statistics()
    device, config = torch.device("cpu"), Config(dataset="cifar10", data_dir=data_dir, batches="device")
    policies = make_policies(config, mean, std)
    net = Net().to(memory_format=torch.channels_last)
    use_fast_dilated_convs(net, device)
    optimizer = torch.optim.SGD(net.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    step = make_step(net, optimizer, device, config)
    record = make_record(config, describe_network(net), images, {"device": "cpu"}, 1, "")
    a_step, a_checkpoint = [], []
    with tempfile.TemporaryDirectory(dir=".") as logs:  # on the disk that holds logs/, not on a file system in memory
        writer = start_run(replace(config, log_dir=logs), record, net, optimizer)
        with closing(make_batches(config, images, policies, device)) as batches, tqdm(disable=True) as bar:
            stream = iter(batches.shuffled("train", 0))
            for number in range(rounds):
                started = time.perf_counter()
                result = train_epoch(step, islice(stream, steps), lambda _: config.lr, bar)
                a_step.append((time.perf_counter() - started) / steps)
                row: Row = {"epoch": number, "lr": config.lr, "train_loss": result.loss, "train_acc": result.accuracy,
                       "test_loss": 0.0, "test_acc": 0.0, "seconds": 0.0}
                started = time.perf_counter()
                writer.save_epoch(row, last=True)
                a_checkpoint.append(time.perf_counter() - started)
    epoch = statistics.median(a_step) * -(-len(images.train) // config.batch_size)
    checkpoint = statistics.median(a_checkpoint)
    return (f"Checkpoints, {platform.machine()} CPU, {os.cpu_count()} cores, medians of {rounds} rounds of {steps} steps and "
            f"one checkpoint\n\nan epoch of {len(images.train):,} images, its test left out: {epoch:.1f} s\n"
            f"a checkpoint: {1000 * checkpoint:.1f} ms (most {1000 * max(a_checkpoint):.1f})\n"
            f"overhead: {100 * checkpoint / epoch:.3f} %\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    result = main(arguments.data_dir, arguments.rounds, arguments.steps)
    print("\n" + result)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "checkpoint_overhead.txt").write_text(result)
