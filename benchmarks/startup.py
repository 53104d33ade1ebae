"""What the start of the program costs: CPU seconds and seconds from the command to the end of the first training step.

    python benchmarks/startup.py --data-dir ~/data --beside FOLDER     this checkout and another one, on a CPU
    python -X importtime main.py --help                                one import by another

All take turns: the program on the drawn images and on CIFAR-10, and the imports that it can't do without. A process ends after
its first step. The rows have medians, and the median ratio to the checkout beside within a turn.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTS = {"import torch": "import torch",
           "import torch, albumentations": "import torch, albumentations"}
# main.py until the first step of an optimizer. The hook is set when torch loads its first optimizers, not before: what the
# program does before and while it imports torch belongs to its start
FIRST_STEP = """
import os, runpy, sys
class Hook:
    def find_spec(self, name, *_):
        if name == "torch.optim.sgd":
            from torch.optim.optimizer import register_optimizer_step_post_hook
            register_optimizer_step_post_hook(end)
def end(optimizer, *_):
    if sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"]) < 100_000:
        return  # earlier versions try a small network first
    if startup := sys.modules.get("tinycnn.startup"):
        startup.end()
    print("\\n" + (startup.line() if startup else ""), "; with torch._dynamo" * ("torch._dynamo" in sys.modules), flush=True)
    os._exit(0)
sys.meta_path.insert(0, Hook())
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def measured(code: str, *arguments: str) -> tuple[float, float, str]:
    """CPU seconds and seconds of a Python process, and the last line that it printed."""
    before, began = os.times(), time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    seconds, after = time.perf_counter() - began, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return cpu, seconds, (done.stdout.splitlines() or [""])[-1].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, help="another checkout")
    parser.add_argument("--data-dir", help="folder with cifar-10-batches-py; without it on drawn images only")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    checkouts = {"this": ROOT} | ({"beside": options.beside.resolve()} if options.beside else {})
    datasets = {"drawn images": ["--dataset=synthetic"]} | (
        {"CIFAR-10": ["--dataset=cifar10", f"--data-dir={os.path.abspath(options.data_dir)}"]} if options.data_dir else {})
    found: dict[tuple[str, str], list[tuple[float, float, str]]] = {}
    with tempfile.TemporaryDirectory() as logs:
        for _ in range(options.repeats):
            for name, code in IMPORTS.items():
                found.setdefault((name, ""), []).append(measured(code))
            for images, flags in datasets.items():
                for name, folder in checkouts.items():
                    found.setdefault((images, name), []).append(measured(
                        FIRST_STEP, str(folder / "main.py"), "--device=cpu", f"--log-dir={logs}", "--no-pictures", *flags))
    print("| until the first step | checkout | CPU s | s | CPU, ratio | s, ratio |\n|---|---|--:|--:|--:|--:|")
    for (what, name), times in found.items():
        beside = found.get((what, "beside"), times)
        cpu, seconds = (statistics.median(values) for values in ([each[0] for each in times], [each[1] for each in times]))
        cpu_ratio = statistics.median(one[0] / other[0] for one, other in zip(times, beside, strict=True))
        ratio = statistics.median(one[1] / other[1] for one, other in zip(times, beside, strict=True))
        print(f"| {what} | {name} | {cpu:.2f} | {seconds:.2f} | {cpu_ratio:.2f} | {ratio:.2f} |")
    print("\nlast turn:")
    for (what, name), times in found.items():
        if times[-1][2]:
            print(f"- {what}, {name}: {times[-1][2]}")


if __name__ == "__main__":
    main()
