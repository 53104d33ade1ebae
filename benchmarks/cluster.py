"""How long a sweep takes on Ray, against one run after another; and a run by several processes, against one process.

    python benchmarks/cluster.py [--runs 8] [--epochs 2] [--repeats 3]

The one run is measured at width 1, for two epochs, and at width 3, for one. Each run has one thread. The ways are measured in
turn, and the whole turn is repeated; the table has the medians of the seconds, and of the ratios within a turn. A sweep is
timed as a whole command, and from the beginning of its first run to the end of its last one; one run by its last epoch, as its
log has it. All listen on the loopback interface: the processes of one run are started as torchrun starts them, but meet in a
file, because torchrun's own store listens on all interfaces. The table goes to benchmarks/results/cluster.md. Run it on a
machine that does nothing else: other programs on its cores slow the two ways down differently.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tinycnn.runs.log import ACCURACY_LOG, read_log
from tinycnn.runs.record import MODEL, SUMMARY
from tinycnn.text import plural

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "cluster.md"
LOCAL = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
PROCESSES = 2
EPOCHS_OF_WIDTH = {1: 2, 3: 1}
# main.py in one of several processes, which meet in the file that is the first argument
MEET_IN_A_FILE = """
import os, runpy, sys
import torch.distributed as dist
rank, size, path = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), sys.argv.pop(1)
dist.rendezvous = lambda *_, **__: iter([(dist.FileStore(path, size), rank, size)])
sys.argv[0] = "main.py"
runpy.run_path("main.py", run_name="__main__")
"""


def start(command: list[str], **variables: str) -> subprocess.Popen:
    """Start a program in the repository's folder."""
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | LOCAL | variables, stdout=subprocess.DEVNULL)


def seconds(programs: list[subprocess.Popen]) -> float:
    """Seconds until the programs, just started, have ended."""
    begun = time.perf_counter()
    while any(program.poll() is None for program in programs) and not any(program.poll() for program in programs):
        time.sleep(0.01)
    for program in programs:
        if program.poll():
            for other in programs:
                other.kill()
                other.wait()
            sys.exit(f"{program.args!r} ended with status {program.returncode}")
    return time.perf_counter() - begun


def seconds_of_runs(log_dir: Path) -> float:
    """Seconds from the beginning of the first run to the end of the last one, by the files they left."""
    def times(name: str) -> list[float]:
        return [path.stat().st_mtime for path in log_dir.glob(f"runs/*/{name}")]
    return max(times(SUMMARY)) - min(times(MODEL))


def sweeps(runs: int, epochs: int, folder: Path) -> tuple[dict[str, float], bool]:
    """Seconds of the same sweep here and on Ray, and of their runs; whether both gave the same weights."""
    line = [sys.executable, "main.py", "sweep", "--dataset", "synthetic", "--epochs", str(epochs), "--seeds", str(runs),
            "--threads", "1", "--no-pictures", "--device", "cpu", "--log-dir"]
    here = seconds([start([*line, str(folder / "here")])])
    on_ray = seconds([start([*line, str(folder / "ray"), "--on", "ray"])])
    same = all(one.read_bytes() == other.read_bytes() for one, other in zip(
        *(sorted(folder.glob(f"{place}/runs/*/final.safetensors"), key=seed) for place in ("here", "ray")), strict=True))
    return {"here": here, "ray": on_ray, "runs here": seconds_of_runs(folder / "here"),
            "runs on Ray": seconds_of_runs(folder / "ray")}, same


def seed(weights: Path) -> int:
    """The seed of the run that the weights are of."""
    return int(re.findall(r'"seed": (\d+)', (weights.parent / "config.json").read_text())[0])


def one_run(width: int, epochs: int, folder: Path) -> dict[str, float]:
    """Seconds of an epoch by one process and by two, each with one thread."""
    logs = folder / f"width-{width}"
    line = ["--dataset", "synthetic", "--epochs", str(epochs), "--threads", "1", "--no-pictures", "--device", "cpu", "--width",
            str(width), "--log-dir", str(logs)]
    seconds([start([sys.executable, "main.py", *line])])
    alone = read_log(logs / ACCURACY_LOG)[1][-1]["seconds"]
    seconds([start([sys.executable, "-c", MEET_IN_A_FILE, str(folder / f"store-{width}"), *line], RANK=str(rank),
                   LOCAL_RANK=str(rank), WORLD_SIZE=str(PROCESSES), LOCAL_WORLD_SIZE=str(PROCESSES))
             for rank in range(PROCESSES)])
    return {f"width {width}, one process": alone, f"width {width}, together": read_log(logs / ACCURACY_LOG)[1][-1]["seconds"]}


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    load, turns, same = os.getloadavg()[0], [], True
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as name:
            turn, alike = sweeps(arguments.runs, arguments.epochs, Path(name))
            for width, epochs in EPOCHS_OF_WIDTH.items():
                turn |= one_run(width, epochs, Path(name))
        turns.append(turn)
        same = same and alike
        print(turn, flush=True)

    def row(what: str, key: str, than: str = "") -> str:
        spent = statistics.median(turn[key] for turn in turns)
        ratios = sorted(turn[than] / turn[key] for turn in turns) if than else []
        gain = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})" if ratios else ""
        return f"| {what} | {spent:.1f} | {gain} |"

    rows = ["| what | seconds | times as fast |", "|---|--:|--:|",
            row(f"{plural(arguments.runs, 'run')} of {plural(arguments.epochs, 'epoch')}, one after another", "here"),
            row("the same on Ray", "ray", "here"),
            row("without start and end, one after another", "runs here"),
            row("without start and end, on Ray", "runs on Ray", "runs here")]
    for width in EPOCHS_OF_WIDTH:
        rows += [row(f"an epoch of one run of width {width}, one process", f"width {width}, one process"),
                 row(f"the same by {PROCESSES} processes", f"width {width}, together", f"width {width}, one process")]
    text = "\n".join(rows) + (
        f"\n\nMedians of {plural(len(turns), 'turn')}, and the range of the ratios. {os.cpu_count()} CPU cores; the load of "
        f"the machine before was {load:.1f}. The weights of both sweeps are {'the same bytes' if same else 'NOT THE SAME'}.\n")
    RESULT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
