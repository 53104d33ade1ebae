"""Training speed beside the script most people write, in images per second, and the memory of a whole run.

    python benchmarks/training_speed.py --data-dir ~/data          prints, and writes benchmarks/results/training_speed.txt

Both train the same network on the same images with the same Albumentations steps, batch size, threads and number of
workers. Each measurement is a process of its own; the two take turns, and medians are compared. "The usual script" is
a Dataset that opens one PIL image at a time and ends in ToTensorV2, NCHW memory, and .item() on every batch.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # or it asks the network at import
RESULTS = Path(__file__).parent / "results"
WARM_UP = 10  # steps before the clock starts


def usual_script(data_dir: str, steps: int, workers: int) -> float:
    """Images per second of the script most people write."""
    import albumentations as A
    import numpy as np
    import torch
    from albumentations.pytorch import ToTensorV2
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    import main
    from config import Config
    from model import Net
    from training.augment import train_policy
    from training.images import load

    config = Config()
    images = load("cifar10", data_dir)
    policy = A.Compose([*train_policy(config, *images.statistics()), ToTensorV2()])

    class OneByOne(Dataset):
        def __len__(self):
            return len(images.train)

        def __getitem__(self, index):
            picture = Image.fromarray(images.train.images[index])
            return policy(image=np.array(picture))["image"], int(images.train.labels[index])

    torch.set_num_threads(main.cores())
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    criterion = torch.nn.CrossEntropyLoss()
    net.train()
    loss_sum = correct = 0.0
    for step, (inputs, labels) in enumerate(DataLoader(OneByOne(), config.batch_size, shuffle=True, num_workers=workers)):
        if step == WARM_UP:
            started = time.perf_counter()
        if step == WARM_UP + steps:
            break
        optimizer.zero_grad()
        outputs = net(inputs)
        loss = criterion(outputs, labels)
        loss.backward()
        optimizer.step()
        loss_sum += loss.item()
        correct += outputs.argmax(1).eq(labels).sum().item()
    return steps * config.batch_size / (time.perf_counter() - started)


def this_program(data_dir: str, steps: int, workers: int) -> float:
    """Images per second of main.py's own parts."""
    from contextlib import closing
    from itertools import islice

    from tqdm import tqdm

    import main
    from config import Config
    from training.loop import train_epoch

    parts = main.build(Config(dataset="cifar10", data_dir=data_dir, workers=workers, device="cpu"))
    with closing(main.make_batches(parts)) as batches, tqdm(disable=True) as bar:
        stream = iter(batches.shuffled("train", 0))
        train_epoch(parts.net, parts.optimizer, islice(stream, WARM_UP), parts.device, 0.0, bar)
        started = time.perf_counter()
        train_epoch(parts.net, parts.optimizer, islice(stream, steps), parts.device, 0.0, bar)
        return steps * parts.config.batch_size / (time.perf_counter() - started)


PATHS = {"the usual script": usual_script, "this program": this_program}


def measured(path: str, arguments: argparse.Namespace) -> float:
    """One measurement of `path` in a new process."""
    command = [sys.executable, __file__, "--measure", path, "--data-dir", arguments.data_dir, "--steps", str(arguments.steps),
               "--workers", str(arguments.workers)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def proportional_memory(pid: int) -> int:
    """Bytes that a process and its descendants hold, shared pages counted once (Linux)."""
    total = 0
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total = 1024 * next(int(line.split()[1]) for line in rollup if line.startswith("Pss:"))
        for thread in Path(f"/proc/{pid}/task").iterdir():
            total += sum(proportional_memory(int(child)) for child in (thread / "children").read_text().split())
    except (OSError, StopIteration):
        if Path(f"/proc/{pid}").exists():  # it has not just ended: this system doesn't tell
            raise
    return total


def peak_memory(arguments: argparse.Namespace) -> float:
    """The peak, in GB, of `python main.py --epochs 1` with its workers: loading, an epoch, a test, the final files."""
    import tempfile

    with tempfile.TemporaryDirectory() as logs:
        command = [sys.executable, str(Path(__file__).parents[1] / "main.py"), "--dataset", "cifar10", "--data-dir",
                   arguments.data_dir, "--workers", str(arguments.workers), "--log-dir", logs, "--epochs", "1"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        peak = 0
        while process.poll() is None:
            peak = max(peak, proportional_memory(process.pid))
            time.sleep(0.2)
    if process.returncode:
        raise RuntimeError("python main.py failed")
    return peak / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--steps", type=int, default=40, help="steps a measurement (default: 40)")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each (default: 5)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--measure", choices=PATHS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(PATHS[arguments.measure](arguments.data_dir, arguments.steps, arguments.workers)))
        return
    speeds: dict[str, list[float]] = {path: [] for path in PATHS}
    for _ in range(arguments.repeats):
        for path in PATHS:
            speeds[path].append(measured(path, arguments))
            print(f"{path}: {speeds[path][-1]:.0f} images/s", flush=True)
    usual = statistics.median(speeds["the usual script"])
    lines = [f"Training speed, {platform.machine()} CPU, {os.cpu_count()} cores, {arguments.workers} workers, batch 128, "
             f"{arguments.repeats} interleaved measurements of {arguments.steps} steps", "",
             f"{'':<20} {'images/s: median':>16} {'min':>6} {'max':>6} {'ratio':>6}"]
    for path, values in speeds.items():
        median = statistics.median(values)
        lines.append(f"{path:<20} {median:16.0f} {min(values):6.0f} {max(values):6.0f} {median / usual:6.2f}")
    if sys.platform == "linux":
        lines += ["", f"peak memory of python main.py --epochs 1, workers included: {peak_memory(arguments):.2f} GB"]
    text = "\n".join(lines) + "\n"
    print("\n" + text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "training_speed.txt").write_text(text)


if __name__ == "__main__":
    main()
