"""The ways of making batches train to the same accuracy: a few seeds each, on real images.

    python benchmarks/same_training.py --data-dir ~/data --epochs 80   prints, and writes benchmarks/results/same_training*.txt

Every run is main.py with its own seed, in a folder of its own under --log-dir; one that is finished is not made again. Workers
and device draw from different generators, so the figures differ as those of two seeds do; what is compared is their means, by
the standard error of the difference. On CUDA captured steps join.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tinycnn.runs.finding import find_runs
from tinycnn.runs.record import SUMMARY, Run, read_run

RESULTS = Path(__file__).parent / "results"
PRINTED = "printed.txt"


def trained(arguments: argparse.Namespace, way: str, flags: list[str], seed: int) -> Run:
    """One run of main.py. Raises RuntimeError where its steps should be captured and weren't."""
    logs = Path(arguments.log_dir) / f"{way}-{arguments.device}-{arguments.epochs}-{seed}"
    if not any((run / SUMMARY).exists() for run in find_runs(logs)):
        command = [sys.executable, str(Path(__file__).parents[1] / "main.py"), "--dataset", "cifar10", "--data-dir",
                   arguments.data_dir, "--log-dir", str(logs), "--epochs", str(arguments.epochs), "--device", arguments.device,
                   "--workers", str(arguments.workers), "--threads", str(arguments.threads), "--seed", str(seed),
                   "--no-pictures", *flags]
        logs.mkdir(parents=True, exist_ok=True)
        with open(logs / PRINTED, "w") as printed:
            subprocess.run(command, check=True, stdout=printed)
    if "not captured" in (logs / PRINTED).read_text():
        raise RuntimeError(f"steps were not captured: see {logs / PRINTED}")
    return next(read_run(run) for run in find_runs(logs) if (run / SUMMARY).exists())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--log-dir", default="logs/same_training")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--epochs", type=int, default=3, help="length of the schedule (default: 3; the baseline has 80)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0, help="as of main.py")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("a spread needs at least 2 seeds")
    ways = {"workers": ["--batches", "workers"], "device": ["--batches", "device", "--capture", "off"]}
    if arguments.device == "cuda":
        ways["captured"] = ["--batches", "device", "--capture", "on"]
    runs: dict[str, list[Run]] = {way: [] for way in ways}
    for seed in range(arguments.seeds):
        for way, flags in ways.items():
            runs[way].append(trained(arguments, way, flags, seed))
            print(f"{way}, seed {seed}: {runs[way][-1].rows[-1]}", flush=True)
    text = table(runs)
    print("\n" + text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"same_training{'' if arguments.device == 'cpu' else '_cuda'}.txt").write_text(text)


def table(runs: dict[str, list[Run]]) -> str:
    """The accuracies of each way of making batches, and how they differ from the first way's."""
    first = next(iter(runs.values()))
    device = first[0].record["machine"]["device"]
    lines = [f"Batches made in different ways, {device}, epochs: {len(first[0].rows)}, "
             f"seeds: {len(first)}", "mean +- standard deviation in %, difference from the first row +- its standard error", "",
             f"{'':<10}{'train':>15}{'difference':>17}{'test':>17}{'difference':>17}"
             + ("   a run" if "cuda" in device else "")]
    for way, made in runs.items():
        line = f"{way:<10}"
        for name in ("train_acc", "test_acc"):
            one, other = ([run.rows[-1][name] for run in each] for each in (first, made))
            difference = statistics.mean(other) - statistics.mean(one)
            error = ((statistics.variance(one) + statistics.variance(other)) / len(one)) ** 0.5
            line += f"{statistics.mean(other):9.2f} +- {statistics.stdev(other):.2f}"
            line += f"{difference:+10.2f} +- {error:.2f}" if made is not first else " " * 17
        if "cuda" in device:
            line += f"   {statistics.median(sum(row['seconds'] for row in run.rows) for run in made):.1f} s"
        lines.append(line.rstrip())
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
