"""python main.py compare: compare finished runs with each other and with the reference run."""

from argparse import Namespace
from pathlib import Path

from config import Config
from tinycnn.commands.parser import Parser

HELP = """Compare finished runs: what differs from the reference run, the accuracy, and whether the difference is
significant. Also writes experiments.csv and experiments.png to the log folder.

    python main.py compare                      all finished runs
    python main.py compare RUN RUN              these, and the reference run
"""


def parse(line: list[str]) -> Namespace:
    """Parse the arguments of `compare`."""
    parser = Parser("compare", HELP)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a run's --name, its folder's name under logs/runs, or a path")
    parser.add_setting("log_dir", default=Config.log_dir)
    return parser.parse(line)


def run(arguments: Namespace) -> None:
    """Print the tables of the runs that `arguments.runs` name, or of all runs; write experiments.csv and experiments.png."""
    from tinycnn.experiments.selection import compare_runs

    compare_runs(Path(arguments.log_dir), arguments.runs)
