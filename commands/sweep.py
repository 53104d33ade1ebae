"""python main.py sweep: train the runs that have not been made, then compare all runs."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from commands import compare
from experiments.claims import remove_stale_claims
from experiments.sweep import Outcome, PlannedRun, Train, make_runs_here, plan_runs


def run(arguments: Namespace, train: Train) -> int:
    """Train the runs of `arguments.configs`. `train` is main.train."""
    remove_stale_claims(Path(arguments.log_dir))
    plan = plan_runs(arguments.configs)
    print_outcomes(plan, make_runs_here(plan, train))
    compare.run(Namespace(log_dir=arguments.log_dir, runs=[]))
    return 0


def print_outcomes(plan: Sequence[PlannedRun], outcomes: Sequence[Outcome]) -> None:
    """Print how many runs were made, and name those that diverged or are under way elsewhere."""
    print(f"\n{sum(outcome in (Outcome.TRAINED, Outcome.PRESENT) for outcome in outcomes)} of {len(plan)} runs are finished")
    for outcome, advice in ((Outcome.DIVERGED, ""), (Outcome.ELSEWHERE, "; repeat the sweep when they have ended")):
        runs = [planned.description for planned, its_outcome in zip(plan, outcomes, strict=True) if its_outcome is outcome]
        if runs:
            print(f"{len(runs)} {outcome.value} ({'; '.join(runs)}){advice}")
    print()
