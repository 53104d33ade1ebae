"""How long a sweep takes on Ray, against one run after another; and a run by torchrun, against one process.

    python benchmarks/cluster.py [--runs 8] [--epochs 20]

Each run has one thread. All listen on the loopback interface. The table goes to benchmarks/results/cluster.md. Run it on a
machine that does nothing else: with other programs on its cores the two ways are slowed down differently.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "cluster.md"
LOCAL = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def seconds(command: list[str], started: str = "") -> tuple[float, float]:
    """Run a command: its seconds, and those until it printed `started`."""
    begun, first = time.perf_counter(), 0.0
    program = subprocess.Popen(command, cwd=ROOT, env=os.environ | LOCAL, stdout=subprocess.PIPE, text=True)
    assert program.stdout
    for line in program.stdout:
        if started and not first and started in line:
            first = time.perf_counter() - begun
    if program.wait():
        sys.exit(f"{' '.join(command)} ended with status {program.returncode}")
    return time.perf_counter() - begun, first


def sweeps(runs: int, epochs: int, folder: Path) -> list[str]:
    """Rows of the table: the same sweep here and on Ray."""
    line = [sys.executable, "main.py", "sweep", "--dataset", "synthetic", "--epochs", str(epochs), "--seeds", str(runs),
            "--threads", "1", "--no-pictures", "--device", "cpu", "--log-dir"]
    here, begun = seconds([*line, str(folder / "here")], "Run 1 of")
    on_ray, ready = seconds([*line, str(folder / "ray"), "--on", "ray"], "runs on Ray")
    same = all(one.read_bytes() == other.read_bytes() for one, other in zip(
        *(sorted(folder.glob(f"{place}/runs/*/final.safetensors"), key=seed) for place in ("here", "ray")), strict=True))
    gain = (here - begun) / (on_ray - ready)
    return [f"| {runs} runs of {epochs} epochs, one after another | {here:.0f} | |",
            f"| the same on Ray, {os.cpu_count()} cores | {on_ray:.0f} | {here / on_ray:.2f} |",
            f"| the same, without the start ({begun:.0f} s here, {ready:.0f} s with Ray) | {on_ray - ready:.0f} | {gain:.2f} |",
            "", f"The weights are {'the same bytes' if same else 'NOT THE SAME'}."]


def seed(weights: Path) -> int:
    """The seed of the run that the weights are of."""
    return int(re.findall(r'"seed": (\d+)', (weights.parent / "config.json").read_text())[0])


def processes(epochs: int, folder: Path) -> list[str]:
    """Rows of the table: one run by one process and by two, each with one thread; at two widths."""
    rows = []
    for width in (1, 3):
        line = ["main.py", "--dataset", "synthetic", "--epochs", str(epochs), "--threads", "1", "--no-pictures",
                "--device", "cpu", "--width", str(width), "--log-dir", str(folder / f"run-{width}")]
        alone, _ = seconds([sys.executable, *line])
        shared, _ = seconds([sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",
                             "--nproc-per-node=2", *line])
        rows += [f"| one run, width {width}, {epochs} epochs, one process | {alone:.0f} | |",
                 f"| the same by torchrun, two processes | {shared:.0f} | {alone / shared:.2f} |"]
    return rows


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        rows = ["| what | seconds | times as fast |", "|---|--:|--:|", *sweeps(arguments.runs, arguments.epochs, Path(name))]
        table = [*rows[:5], *processes(max(1, arguments.epochs // 10), Path(name)), *rows[5:]]
    text = "\n".join(table) + f"\nThe load of the machine before was {load:.1f}.\n"
    RESULT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
