"""How many CPU cores this process may use. Needs no torch, because the command line is checked before it is loaded."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_cores() -> int:
    """The cores that this process may run on, or as many as the CPU quota of its container amounts to."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([cores, *_quotas()])))


def default_threads(processes: int = 1) -> int:
    """The threads of each of `processes` that share the cores: one for each core, but at most OMP_NUM_THREADS, if set."""
    limit = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return max(1, min(available_cores() // processes, int(limit) if limit.isdecimal() else os.cpu_count() or 1))


def _quotas() -> Iterator[float]:
    """The quotas, in cores, of this process's control groups and of those around them (Linux, cgroup versions 1 and 2)."""
    with suppress(OSError):
        for line in OWN_CGROUPS.read_text().splitlines():  # 0::/path, or 4:cpu,cpuacct:/path
            _, controllers, path = line.split(":", 2)
            group = CGROUPS / controllers / path[1:]
            for folder in (group, *group.parents):
                with suppress(OSError, ValueError):  # no such file; no quota: max 100000
                    quota, period = map(int, (folder / "cpu.max").read_text().split())
                    yield quota / period
                with suppress(OSError):
                    quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
                    if quota > 0:  # -1: none
                        yield quota / period
