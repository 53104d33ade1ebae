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

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.program import make_program
from config import Config
from model import Net
from tinycnn.network.identity import describe_network
from tinycnn.runs.log import Row
from tinycnn.runs.record import make_record
from tinycnn.runs.writer import start_run
from tinycnn.training.epoch import train_epoch

RESULTS = Path(__file__).parent / "results"


def main(data_dir: str, rounds: int, steps: int) -> str:
    """Measure; returns the text of the result."""
    program = make_program(Config(dataset="cifar10", data_dir=data_dir, batches="device", device="cpu"))
    config, images, step = program.config, program.images, program.step
    record = make_record(config, describe_network(Net()), {}, images, {"device": "cpu"}, 1, "")
    a_step, a_checkpoint = [], []
    with tempfile.TemporaryDirectory(dir=".") as logs:  # on the disk that holds logs/, not on a file system in memory
        writer = start_run(replace(config, log_dir=logs), record, step.net, step.optimizer)
        with closing(program.batches) as batches, tqdm(disable=True) as bar:
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
