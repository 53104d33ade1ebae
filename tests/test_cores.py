"""How many cores a process may use: its affinity, its container's quota, OMP_NUM_THREADS."""

import pytest

from tinycnn import cores
from tinycnn.cores import available_cores, default_threads


@pytest.fixture
def groups(monkeypatch, tmp_path):
    """groups("0::/a", {"a/cpu.max": "..."}): pretend eight cores, and these control groups."""
    def groups(own: str, files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        (tmp_path / "own").write_text(own + "\n")

    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(cores, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return groups


@pytest.mark.parametrize(("own", "files", "expected"), [
    ("0::/", {"cpu.max": "max 100000"}, 8), ("0::/", {"cpu.max": "200000 100000"}, 2), ("0::/", {"cpu.max": "50000 100000"}, 1),
    ("0::/", {"cpu.max": "1600000 100000"}, 8),
    ("0::/slice/job", {"slice/cpu.max": "300000 100000", "slice/job/cpu.max": "max 100000"}, 3),
    ("4:cpu,cpuacct:/docker/x", {"cpu,cpuacct/cpu.cfs_quota_us": "250000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 2),
    ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8)])
def test_a_containers_quota_counts(groups, own, files, expected):
    groups(own, files)
    assert available_cores() == expected


def test_where_there_are_no_control_groups_the_affinity_counts(groups):
    assert available_cores() == 8


@pytest.mark.parametrize(("variable", "processes", "expected"), [
    ("", 1, 8), ("", 3, 2), ("", 9, 1), ("3", 1, 3), ("3", 4, 2), ("16", 1, 8), ("2,4", 1, 2), ("0", 1, 1), ("many", 1, 8)])
def test_threads_share_the_cores_and_stay_within_omp_num_threads(groups, monkeypatch, variable, processes, expected):
    monkeypatch.setattr(cores.os, "cpu_count", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert default_threads(processes) == expected
