"""python main.py sweep: train the runs that have not been made, then compare all runs."""

import argparse
import dataclasses
import itertools
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from config import NOT_COMPARED, SETTINGS, Config, UserError
from tinycnn.commands.parser import Parser, complete_settings

HELP = """Train a run for each combination of the values, and for each seed; then compare all runs.

    python main.py sweep --lr 0.01,0.05,0.1 --seeds 3 --epochs 8 --validation 5000
    python main.py sweep --one-at-a-time --flip-p 0.5,0 --dropout 0,0.1,0.2 --epochs 8 --validation 5000
    python main.py sweep --lr 0.01,0.05 --seeds 5 --on ray --gpus-per-run 0.25      several at a time (docs/cluster.md)

A setting with several values, separated by commas, varies; one with a single value has it in every run. With
--one-at-a-time, one run has the defaults, and each other value varies alone. Repeat the command after an interruption:
finished runs are skipped, an unfinished one is resumed. Choose settings by --validation, not on the test images.
"""


def parse(line: list[str]) -> Namespace:
    """Parse the arguments of `sweep`: configs, in the order they run, all combinations with the first seed, then with the next;
    and where to run them."""
    parser = Parser("sweep", HELP)
    parser.add_recipe()
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="run each with the seeds 0 to N - 1 (default: 1)")
    parser.add_argument("--one-at-a-time", action="store_true", help="vary each setting alone, not all combinations")
    parser.add_argument("--on", default="here", metavar="WHERE",
                        help="here: one run after another, in this process; ray: several at a time, on Ray, which is started "
                        "on this machine unless RAY_ADDRESS names a cluster; ray://HOST:PORT: on that cluster (default: here)")
    parser.add_argument("--cpus-per-run", type=int, metavar="N",
                        help="CPU cores of a run on Ray, and its --threads (default: --threads, or else 1)")
    parser.add_argument("--gpus-per-run", type=float, metavar="N",
                        help="GPUs of a run on Ray; 0.25 lets four runs share one (default: 1 where there are GPUs, else 0)")
    for name, field in SETTINGS.items():
        if name in NOT_COMPARED:
            parser.add_setting(name)
        elif name != "seed":
            alone: dict[str, Any] = {"nargs": "?", "const": [True]} if field.type is bool else {}  # --nesterov means true
            parser.add_setting(name, type=_values(field), metavar="VALUE[,VALUE]", **alone)
    given = vars(parser.parse(line))
    seeds, one_at_a_time, recipe = (given.pop(name) for name in ("seeds", "one_at_a_time", "recipe"))
    on, cpus, gpus = (given.pop(name) for name in ("on", "cpus_per_run", "gpus_per_run"))
    _check_cluster(on, cpus, gpus, given.get("threads", 0))
    if not 1 <= seeds <= 1000:
        raise UserError(f"--seeds is {seeds}, but must lie in 1 to 1000")
    varied = {name: values for name, values in given.items() if name not in NOT_COMPARED and len(values) > 1}
    if not varied and seeds == 1:
        raise UserError("nothing varies in this sweep: give a setting several values (--lr 0.01,0.05), or --seeds 3")
    alike = {name: value if name in NOT_COMPARED else value[0] for name, value in given.items() if name not in varied}
    base = complete_settings(recipe | alike)
    if one_at_a_time:
        changes = [{}, *({name: value} for name, values in varied.items() for value in values
                         if value != base.get(name, getattr(Config, name)))]
    else:
        changes = [dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())]
    configs = [Config(**(base | change | {"seed": seed})) for seed in range(seeds) for change in changes]
    return Namespace(configs=configs, log_dir=configs[0].log_dir, on=on, cpus_per_run=cpus or configs[0].threads or 1,
                     gpus_per_run=gpus)


def _check_cluster(on: str, cpus: int | None, gpus: float | None, threads: int) -> None:
    """Check where a sweep is to run, and what each run is to have there."""
    if on not in ("here", "ray") and not on.startswith("ray://"):
        raise UserError(f"--on is {on!r}, but must be here, ray or ray://HOST:PORT")
    if on == "here" and (cpus is not None or gpus is not None):
        raise UserError("--cpus-per-run and --gpus-per-run are for --on ray: add it, or leave them out")
    if cpus is not None and not 1 <= cpus <= 1024:
        raise UserError(f"--cpus-per-run is {cpus}, but must lie in 1 to 1024")
    if cpus and threads and cpus != threads:
        raise UserError(f"--threads is {threads} and --cpus-per-run {cpus}: both set the threads of a run, so leave one out")
    if gpus is not None and not (0 <= gpus <= 64 and (gpus <= 1 or gpus == int(gpus))):
        raise UserError(f"--gpus-per-run is {gpus}, but must be a fraction of one, or a whole number up to 64")


def _values(field: dataclasses.Field) -> Callable[[str], list[Any]]:
    """Return a function that reads values of a setting, separated by commas."""
    read = {"true": True, "false": False}.__getitem__ if field.type is bool else field.type
    kind = "true or false" if field.type is bool else f"{field.type.__name__}s"  # type: ignore[union-attr]

    def values(text: str) -> list[Any]:
        """The values in `text`, of which none may come twice."""
        try:
            found: list[Any] = [read(part) for part in text.split(",")]  # type: ignore[operator]
        except (ValueError, KeyError):
            raise argparse.ArgumentTypeError(f"{text!r} must be {kind}, separated by commas") from None
        if field.name == "teacher":  # a comma separates the values, so a plus the teachers of one
            found = [names.replace("+", ",") for names in found]
        if len(set(found)) < len(found):
            raise argparse.ArgumentTypeError(f"{text!r} has a value twice")
        return found

    return values


def run(arguments: Namespace, train: Callable[..., Path], *_: Callable) -> int:
    """Train the runs of `arguments.configs`, here or on Ray. `train` is main.train. Returns 1 where a run on Ray failed or
    diverged."""
    from tinycnn.commands.start import AVX2_VARIABLES
    from tinycnn.experiments.claims import remove_stale_claims
    from tinycnn.experiments.cluster import make_runs_on_ray
    from tinycnn.experiments.selection import compare_runs
    from tinycnn.experiments.sweep import Outcome, make_runs_here, plan_runs, print_outcomes
    from tinycnn.inference.result import train_and_show

    log_dir = Path(arguments.log_dir)
    remove_stale_claims(log_dir)
    if arguments.on == "here":
        plan, dataset = plan_runs(arguments.configs)
        outcomes = make_runs_here(plan, lambda config, run: train_and_show(train, config, run, dataset))
    else:
        capped = {name: os.environ[name] for name in AVX2_VARIABLES if name in os.environ}  # --instruction-set
        plan, outcomes = make_runs_on_ray(arguments.configs, arguments.on, arguments.cpus_per_run, arguments.gpus_per_run,
                                          capped)
    print_outcomes(plan, outcomes)
    compare_runs(log_dir)
    return int(arguments.on != "here" and any(outcome in (Outcome.FAILED, Outcome.DIVERGED) for outcome in outcomes))
