"""The two ways of making batches train to the same accuracy: a few seeds each, on real images.

    python benchmarks/same_training.py --data-dir ~/data --epochs 80     prints, and writes benchmarks/results/same_training.txt

Every run is main.py with its own seed. Workers and device draw from different generators, so the figures differ as those of
two seeds do; what is compared is their means, by the standard error of the difference.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from training.records import Run, find_runs, read_run

RESULTS = Path(__file__).parent / "results"


def trained(arguments: argparse.Namespace, batches: str, seed: int) -> Run:
    """One run of main.py."""
    with tempfile.TemporaryDirectory() as logs:
        subprocess.run([sys.executable, str(Path(__file__).parents[1] / "main.py"), "--dataset", "cifar10", "--data-dir",
                        arguments.data_dir, "--log-dir", logs, "--epochs", str(arguments.epochs), "--batches", batches,
                        "--seed", str(seed), "--no-pictures"], check=True, stdout=subprocess.DEVNULL)
        return read_run(find_runs(Path(logs))[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--epochs", type=int, default=1, help="length of the schedule (default: 1; the baseline has 80)")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("a spread needs at least 2 seeds")
    workers, device = ([trained(arguments, batches, seed) for seed in range(arguments.seeds)]
                       for batches in ("workers", "device"))
    lines = [f"Batches by workers and on the device, {device[0].record['machine']['device']}, a schedule of {arguments.epochs} "
             f"epochs, {arguments.seeds} seeds each: mean and standard deviation in %", ""]
    for name in ("train_acc", "test_acc"):
        one, other = ([run.rows[-1][name] for run in runs] for runs in (workers, device))
        difference = statistics.mean(other) - statistics.mean(one)
        error = ((statistics.variance(one) + statistics.variance(other)) / arguments.seeds) ** 0.5
        lines.append(f"{name:<9}  workers {statistics.mean(one):.2f} +- {statistics.stdev(one):.2f}   "
                     f"device {statistics.mean(other):.2f} +- {statistics.stdev(other):.2f}   "
                     f"difference {difference:+.2f}, its standard error {error:.2f}")
    text = "\n".join(lines) + "\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "same_training.txt").write_text(text)


if __name__ == "__main__":
    main()
