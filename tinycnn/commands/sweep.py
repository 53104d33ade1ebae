"""python main.py sweep: train the runs that have not been made, then compare all runs."""

import os
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tinycnn.commands import compare
from tinycnn.commands.start import AVX2_VARIABLES
from tinycnn.experiments.claims import remove_stale_claims
from tinycnn.experiments.cluster import make_runs_on_ray
from tinycnn.experiments.sweep import Outcome, PlannedRun, Train, make_runs_here, plan_runs


def run(arguments: Namespace, train: Train) -> int:
    """Train the runs of `arguments.configs`, here or on Ray. `train` is main.train. Returns 1 where a run on Ray failed or
    diverged."""
    remove_stale_claims(Path(arguments.log_dir))
    if arguments.on == "here":
        plan, images = plan_runs(arguments.configs)
        outcomes = make_runs_here(plan, partial(train, images=images))
    else:
        capped = {name: os.environ[name] for name in AVX2_VARIABLES if name in os.environ}  # --instruction-set
        plan, outcomes = make_runs_on_ray(arguments.configs, arguments.on, arguments.cpus_per_run, arguments.gpus_per_run,
                                          capped)
    print_outcomes(plan, outcomes)
    compare.run(Namespace(log_dir=arguments.log_dir, runs=[]))
    return int(arguments.on != "here" and any(outcome in (Outcome.FAILED, Outcome.DIVERGED) for outcome in outcomes))


def print_outcomes(plan: Sequence[PlannedRun], outcomes: Sequence[Outcome]) -> None:
    """Print how many runs were made, and name those that diverged or are under way elsewhere."""
    print(f"\n{sum(outcome in (Outcome.TRAINED, Outcome.PRESENT) for outcome in outcomes)} of {len(plan)} runs are finished")
    advice = {Outcome.DIVERGED: "", Outcome.FAILED: "; repeat the sweep, which skips what is finished",
              Outcome.ELSEWHERE: "; repeat the sweep when they have ended"}
    for outcome, hint in advice.items():
        runs = [planned.description for planned, its_outcome in zip(plan, outcomes, strict=True) if its_outcome is outcome]
        if runs:
            print(f"{len(runs)} {outcome.value} ({'; '.join(runs)}){hint}")
    print()
