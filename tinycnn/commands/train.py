"""python main.py, python main.py --resume: train a new run, or an unfinished one to its end."""

import platform
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from config import SETTINGS, Config
from tinycnn.commands.parser import Parser, complete_settings

VERSION = "1.1.0"

HELP = """Train the network on CIFAR-10. Logs, checkpoints and weights go to logs/.

    python main.py                              80 epochs with the settings of config.py
    python main.py --recipe fast --seed 1       a named set of settings; every setting is a flag of the same name
    python main.py --data-dir ~/data            use, or download to, ~/data/cifar-10-batches-py
    python main.py --dataset folder --data-dir pictures     pictures/train/<class>/*, pictures/test/<class>/*
    python main.py --resume                     resume the newest unfinished run
    torchrun --standalone --nproc-per-node=gpu main.py      one run on all GPUs (docs/cluster.md)

Other commands (python main.py COMMAND --help):

    find-lr                                     suggest a learning rate, in at most an epoch
    sweep --lr 0.01,0.05 --seeds 3              train a run for each combination of values and seeds, then compare
    compare                                     compare runs: what differs, and whether the difference is significant
    plot                                        draw the pictures of the newest finished run
    test                                        print its accuracy, class by class, and its calibration
    predict cat.jpg pictures/                   classify images; --explain draws where it saw the classes
    export                                      write a file for ONNX Runtime, torch.export.load or a browser

Read logs/model_accuracy.log, a row per epoch, and logs/torch_summary.log, the network layer by layer.
"""


def parse(line: list[str]) -> Namespace:
    """Parse the arguments of training: given (the settings of the command line, recipe included), resume (a run, "" for the
    newest, None for a new run), and the new run's config."""
    parser = Parser("", HELP)
    parser.add_argument("--version", action="store_true", help="print the versions of the program, Python and torch")
    parser.add_recipe()
    parser.add_argument("--resume", nargs="?", const="", metavar="RUN",
                        help="resume an unfinished run, the newest if none is named")
    for name in SETTINGS:
        parser.add_setting(name)
    given = vars(parser.parse(line))
    resume, recipe, version = (given.pop(name) for name in ("resume", "recipe", "version"))
    if version:
        print(_versions())
        sys.exit()
    flags, given = given, recipe | given
    if resume is not None:
        return Namespace(given=given, resume=resume, config=None)
    given = complete_settings(given)
    config = Config(**given)
    if "min_lr" in flags and config.schedule in ("step", "constant"):
        print(f"--min-lr has no effect with --schedule {config.schedule}", file=sys.stderr)
    return Namespace(given=given, resume=None, config=config)


def _versions() -> str:
    import importlib.metadata  # as slow as all else of the start

    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = "not installed"
    return f"tiny-cifar10-cnn {VERSION}, Python {platform.python_version()}, torch {torch}"


def run(arguments: Namespace, train: Callable[..., Path], *_: Callable) -> int:
    """Train the run that `arguments.config` describes, or resume the one that `arguments.resume` names, in this process or in
    all that torchrun has started. `train` is main.train."""
    import shlex

    from tinycnn.inference.result import show
    from tinycnn.processes import world
    from tinycnn.runs.inputs import load_inputs
    from tinycnn.runs.run import choose_run
    from tinycnn.training.distributed import join_processes

    with join_processes():
        # the first process decides, which holds the lock of a run that is resumed
        chosen = choose_run(arguments.config, arguments.given, arguments.resume) if world.is_first else None
        config = world.broadcast(lambda: chosen.config if chosen else None)
        if config is None:
            print("the run of this job is finished")
            return 0
        inputs = load_inputs(config)
        folder = train(config, inputs, chosen)
    if world.is_first:
        show(folder, inputs)
        where = "" if config.log_dir == Config.log_dir else f", each with --log-dir {shlex.quote(config.log_dir)}"
        print(f"Next: python main.py test | predict IMAGE | export | compare{where}")
    return 0
