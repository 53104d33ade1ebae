"""python main.py, python main.py --resume: train a new run, or an unfinished one to its end."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from config import Config, UserError
from tinycnn.runs.finding import RunState
from tinycnn.runs.jobs import find_job_run
from tinycnn.runs.resuming import MOVABLE, Unfinished, load_unfinished
from tinycnn.training.distributed import join_processes
from tinycnn.training.errors import Diverged


def run(arguments: Namespace, train: Callable) -> int:
    """Train the run that `arguments.config` describes, or resume the one that `arguments.resume` names, in this process or in
    all that torchrun has started."""
    with join_processes() as processes:
        # the first process, which holds the lock of a run that is resumed, decides for all
        chosen, unfinished = choose_run(arguments) if processes.is_first else (None, None)
        config = processes.broadcast(lambda: chosen)
        if config is None:
            print("the run of this job is finished")
            return 0
        if config.batch_size < processes.size:
            raise UserError(f"--batch-size is {config.batch_size}, but the run has {processes.size} processes, which share "
                            "each batch: give it at least as many images")
        train(config, unfinished, processes)
    return 0


def choose_run(arguments: Namespace) -> tuple[Config | None, Unfinished | None]:
    """The config of the run to train, None where this job has finished it; and the run to resume, None for a new one. That is
    the one that this job began before torchrun restarted it, or the one that is named."""
    given, name = arguments.given, arguments.resume
    state, folder = find_job_run(Path(given.get("log_dir", Config.log_dir)))
    if state is RunState.DIVERGED:
        raise Diverged(f"run {folder.name} has diverged: to start it again would only repeat this")
    if state is RunState.FINISHED:
        return None, None
    if state is RunState.UNFINISHED:
        name, given = str(folder), {setting: value for setting, value in given.items() if setting in MOVABLE}
    if name is None:
        return arguments.config, None
    unfinished = load_unfinished(name, given)
    return unfinished.config, unfinished
