"""The run that a job of torchrun has begun, to find it again after torchrun has restarted its processes."""

import contextlib
import os
import platform
from pathlib import Path

from tinycnn.runs.files import write
from tinycnn.runs.finding import RunState, find_runs, run_state

JOB = ".job"  # a file in the run's folder


def mark_job(folder: Path) -> None:
    """Note in the folder of a run which job trains it. Does nothing without torchrun."""
    if job := _job():
        write(folder / JOB, job)


def find_job_run(log_dir: Path) -> tuple[RunState, Path]:
    """The run that this job has begun before torchrun restarted it, and its state; FOREIGN where there is none."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return RunState.FOREIGN, Path()
    for folder in find_runs(log_dir):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if (folder / JOB).read_text(encoding="utf-8") == _job():
                return run_state(folder), folder
    return RunState.FOREIGN, Path()


def _job() -> str:
    """The name of the job: torchrun's, or the torchrun process where it has none."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{platform.node()} {os.getppid()}" if name == "none" else name
