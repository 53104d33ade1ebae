"""python main.py, python main.py --resume: train a new run, or an unfinished one to its end."""

from argparse import Namespace
from collections.abc import Callable

from runs.resuming import load_unfinished


def run(arguments: Namespace, train: Callable) -> int:
    """Train the run that `arguments.config` describes, or resume the one that `arguments.resume` names."""
    if arguments.resume is None:
        train(arguments.config)
    else:
        unfinished = load_unfinished(arguments.resume, arguments.given)
        train(unfinished.config, unfinished)
    return 0
