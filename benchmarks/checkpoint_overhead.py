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
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

RESULTS = Path(__file__).parent / "results"


def main(data_dir: str, rounds: int, steps: int) -> str:
    """Measure; returns the text of the result."""
    from tqdm import tqdm

    import main as program
    from config import Config
    from model import Net
    from training.loop import train_epoch
    from training.parts import build

    with tempfile.TemporaryDirectory(dir=".") as logs:  # on the disk that holds logs/, not on a file system in memory
        parts = build(Config(dataset="cifar10", data_dir=data_dir, log_dir=logs, device="cpu"), Net)
        log, checkpoints = program.open_records(parts, None)
        a_step, a_checkpoint = [], []
        with closing(parts.batches()) as batches, tqdm(disable=True) as bar:
            stream = iter(batches.shuffled("train", 0))
            for _ in range(rounds):
                started = time.perf_counter()
                train_epoch(parts.step, islice(stream, steps), bar)
                a_step.append((time.perf_counter() - started) / steps)
                started = time.perf_counter()
                checkpoints.epoch_ended(parts.state(), log, last=True)
                a_checkpoint.append(time.perf_counter() - started)
    epoch = statistics.median(a_step) * -(-len(parts.images.train) // parts.config.batch_size)
    checkpoint = statistics.median(a_checkpoint)
    return (f"Checkpoints, {platform.machine()} CPU, {os.cpu_count()} cores, medians of {rounds} rounds of {steps} steps and "
            f"one checkpoint\n\nan epoch of {len(parts.images.train):,} images, its test left out: {epoch:.1f} s\n"
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
