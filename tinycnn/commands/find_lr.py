"""python main.py find-lr: find a learning rate to try, by a range test."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from config import SETTINGS, Config, UserError
from tinycnn.commands.parser import Parser, complete_settings

HELP = """Train for at most an epoch while the learning rate grows from batch to batch, and suggest the highest rate of the
schedule. Draws find_lr.png into the log folder; leaves nothing else.

    python main.py find-lr                              with the settings of config.py
    python main.py find-lr --recipe fast --width 2      with the settings that you want to train with
"""


def parse(line: list[str]) -> Namespace:
    """Returns config: the settings to train with."""
    parser = Parser("find-lr", HELP)
    parser.add_recipe()
    for name in SETTINGS:
        parser.add_setting(name)
    given = vars(parser.parse(line))
    return Namespace(config=Config(**complete_settings(given.pop("recipe") | given)), given=given, line=line)


def run(arguments: Namespace, _: Callable, build: Callable, train_step: Callable[..., Any]) -> None:
    """Run the test, draw its picture, print the suggestion. `build` and `train_step` are main.py's."""
    import shlex
    from pathlib import Path

    from tinycnn.experiments.range_test import FEWEST, LEAST_FALL, draw, range_test, suggest
    from tinycnn.runs.drawing import drawing, save
    from tinycnn.runs.inputs import load_inputs
    from tinycnn.training.machine import seed_torch
    from tinycnn.training.progress import progress
    from tinycnn.training.steps import fastest_step

    inputs = load_inputs(arguments.config)
    net, optimizer, _scheduler, criterion, batches = build(inputs)
    if batches.per_epoch < FEWEST:
        raise UserError(f"an epoch has {batches.per_epoch} batches, but a range test needs {FEWEST}: lower --batch-size")
    step = fastest_step(train_step, net, optimizer, criterion, inputs.config, note=lambda line: None)
    seed_torch(inputs.config.seed, 1)
    net.train()
    with batches:
        rates, losses = range_test(step, optimizer, progress(batches.train(0)), batches.per_epoch)
    path, suggestion = Path(inputs.config.log_dir, "find_lr.png"), suggest(rates, losses)
    path.parent.mkdir(parents=True, exist_ok=True)
    with drawing("find_lr.png"):
        save(draw(rates, losses), path)
        print(f"The loss by learning rate is drawn in {path}")
    if not suggestion:
        print(f"No suggestion: the loss fell by less than {100 * LEAST_FALL:.0f} %. The network learns nothing with these "
              "settings, or, with --init, has learned it already")
        return
    line = shlex.join([*arguments.line, "--lr", f"{suggestion:g}"])  # of two, the last counts
    print(f"Suggestion: --lr {suggestion:g}; LEARNINGS.md tells how accurate that is. Train with it:\n"
          f"    python main.py {line}")
