"""Atomic files, folders and locks."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from config import UserError
from tinycnn.runs import files
from tinycnn.runs.files import lock_file, make_run_folder, remove_run_leftovers, write


def test_two_runs_of_one_second_get_two_folders(tmp_path):
    folders = [make_run_folder(tmp_path, "2026-x", {"config.json": str(number)}) for number in range(4)]
    assert [folder.name for folder in folders] == ["2026-x", "2026-x-2", "2026-x-3", "2026-x-4"]
    assert [(folder / "config.json").read_text() for folder in folders] == ["0", "1", "2", "3"]
    assert len(list((tmp_path / "runs").iterdir())) == 4


@pytest.mark.skipif(sys.platform == "win32", reason="has no umask")
def test_a_run_folder_has_the_users_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        folder = make_run_folder(tmp_path, "x", {})
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o750


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "file"
    write(target, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(UserError, match=r"file could not be written \(No space left on device\): make room"):
        write(target, "new")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_was_deleted_is_no_reason_to_make_room(tmp_path):
    with pytest.raises(UserError, match="gone is gone: something deleted it") as error:
        write(tmp_path / "gone" / "file", "new")
    assert "make room" not in str(error.value)


@pytest.mark.parametrize("durable", [True, False])
def test_a_durable_write_reaches_the_disk_before_it_counts(tmp_path, monkeypatch, durable):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda handle: (events.append("sync"), fsync(handle)))
    monkeypatch.setattr(files.os, "replace", lambda *paths: (events.append("replace"), replace(*paths)))
    write(tmp_path / "file", "new", durable)
    assert events == (["sync", "replace", "sync"] if durable else ["replace"])  # the file, then its folder


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="can't tell which file was synced")
def test_the_files_of_a_new_run_reach_the_disk(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def noted(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(files.os, "fsync", noted)
    make_run_folder(tmp_path, "x", {"config.json": "{}", "checkpoint.pt": b"x"})
    assert [path.rpartition("-")[2] for path in synced if "tmp" in path.rpartition("/")[2]] == ["config.json", "checkpoint.pt"]
    assert synced[-1] == str(tmp_path / "runs")


def test_a_lock_is_one_processs(tmp_path):
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\n"
            f"from tinycnn.runs.files import lock_file\nlock = lock_file(Path({str(tmp_path / 'lock')!r}))\nimport os, time\n"
            "worker = os.fork() if hasattr(os, 'fork') else None\nif worker == 0: time.sleep(60), os._exit(0)\n"
            "print(lock is not None, worker, flush=True)\nsys.stdin.read()")
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    locked, worker = other.stdout.readline().split()
    assert locked == "True"
    assert lock_file(tmp_path / "lock") is None
    other.kill()
    other.wait()
    assert lock_file(tmp_path / "lock") is not None  # also while that has a worker left
    if worker != "None":
        os.kill(int(worker), signal.SIGKILL)
    other.communicate()


def test_what_killed_processes_left_is_removed_after_a_day(tmp_path):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    old, new = [tmp_path / ".tmp-1-model_accuracy.log", tmp_path / "runs" / ".new-1",
                tmp_path / "runs" / "mine" / ".tmp-1-checkpoint.pt"], [tmp_path / ".tmp-2-x", tmp_path / "runs" / ".new-2"]
    for path in (*old, *new):
        if path.name.startswith(".new"):
            path.mkdir()
            (path / "config.json").write_text("{}")
        else:
            path.write_text("half")
    (tmp_path / "runs" / "mine" / "config.json").write_text("{}")
    for path in (old[1] / "config.json", *old, tmp_path / "runs" / "mine" / "config.json"):
        os.utime(path, (time.time() - 25 * 3600,) * 2)
    remove_run_leftovers(tmp_path)
    assert not any(path.exists() for path in old)
    assert all(path.exists() for path in (*new, tmp_path / "runs" / "mine" / "config.json"))
