"""How long a GPU takes for something."""

import statistics
import time
from collections.abc import Callable

import torch


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Of a call of `run`, the median of three rounds of ten. Waits for the device."""
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    rounds = []
    for _ in range(3):
        wait()
        started = time.perf_counter()
        for _ in range(10):
            run()
        wait()
        rounds.append(time.perf_counter() - started)
    return 100 * statistics.median(rounds)
