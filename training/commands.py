"""What the command line asks for."""

import argparse
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NoReturn

from config import RECIPES, Config, UserError

TRAIN = """Train the network on CIFAR-10 and write what happened to logs/.

    python main.py                              the baseline: 80 epochs with the settings of config.py
    python main.py --epochs 8 --lr 0.05         every setting is a flag of the same name
    python main.py --data-dir ~/data            where cifar-10-batches-py is, or shall be downloaded to
    python main.py --dataset folder --data-dir pictures     your own: pictures/train/<class>/*, pictures/test/<class>/*
    python main.py --resume                     go on with the newest unfinished run

    python main.py sweep --lr 0.01,0.05 --seeds 3     runs that differ, one after another, then compare
    python main.py compare                      runs side by side: what differs, and whether it is more than noise
    python main.py plot                         pictures of the newest finished run

Read logs/model_accuracy.log, an aligned row an epoch, and logs/torch_summary.log, the network layer by layer.
"""
SWEEP = """Train once for each combination of the values, and for each seed; then compare all runs.

    python main.py sweep --lr 0.01,0.05,0.1 --seeds 3 --epochs 8 --validation 5000
    python main.py sweep --one-at-a-time --flip-p 0.5,0 --nesterov false,true --dropout 0,0.1,0.2 --epochs 8

A setting with one value has it in every run; one with several, with commas between, varies. With --one-at-a-time there is a
run with the defaults, and each value that is no default varies alone. Repeat the command after an interruption: finished
runs are skipped, an unfinished one goes on. Choose by --validation: the test images must choose nothing.
"""
COMPARE = """Finished runs side by side: what differs from the reference run, the accuracy, and whether a difference is more
than noise. Also writes experiments.md, experiments.csv and experiments.png to the log folder.

    python main.py compare                      all finished runs
    python main.py compare RUN RUN              these, and the reference run
"""
PLOT = """Pictures of a finished run, into its folder: accuracy.png, confusion_matrix.png, mistakes.png, augmentation.png and
receptive_field.png.

    python main.py plot                         the newest finished run
    python main.py plot RUN                     a folder's name under logs/runs, or a path
"""
FIXED = ("dataset", "data_dir", "log_dir", "device", "threads", "workers", "name", "pictures")  # one value for a whole sweep


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors."""

    def __init__(self, verb: str, description: str) -> None:
        super().__init__(prog=f"python main.py {verb}".strip(), description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists all settings)")

    def add_setting(self, field: dataclasses.Field, **how: Any) -> None:
        """A flag for a field of Config, absent from the result where it isn't given; `how` replaces the way it is read."""
        if not how:
            how = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type, "metavar": "VALUE"}
        meaning = f"{field.metadata['help']} (default: {field.default!r})".replace("%", "%%")
        self.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, help=meaning, **how)


def parse(arguments: list[str]) -> tuple[dict[str, Any], str | None]:
    """The settings that the command line gives, recipe included, and the run to resume ("" for the newest, None for
    none). Raises UserError."""
    parser = Parser("", TRAIN)
    parser.add_argument("--recipe", choices=RECIPES, default="baseline", help="a named set of settings; flags override it")
    parser.add_argument("--resume", nargs="?", const="", metavar="RUN",
                        help="go on with an unfinished run, the newest if none is named")
    for field in dataclasses.fields(Config):
        parser.add_setting(field)
    given = vars(parser.parse_args(arguments))
    resume = given.pop("resume")
    return RECIPES[given.pop("recipe")] | given, resume


def parse_sweep(arguments: list[str]) -> list[Config]:
    """The configs of a sweep, in the order they run: all combinations with the first seed, then with the next. Raises
    UserError."""
    parser = Parser("sweep", SWEEP)
    parser.add_argument("--recipe", choices=RECIPES, default="baseline", help="the settings to begin with")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="run each with the seeds 0 to N - 1 (default: 1)")
    parser.add_argument("--one-at-a-time", action="store_true", help="vary each setting alone, not all combinations")
    for field in dataclasses.fields(Config):
        if field.name in FIXED:
            parser.add_setting(field)
        elif field.name != "seed":
            parser.add_setting(field, type=_values(field), metavar="VALUE[,VALUE]")
    given = vars(parser.parse_args(arguments))
    seeds, one_at_a_time = given.pop("seeds"), given.pop("one_at_a_time")
    if not 1 <= seeds <= 1000:
        raise UserError(f"seeds is {seeds}, but must lie in 1 to 1000")
    base = RECIPES[given.pop("recipe")] | {name: value for name, value in given.items() if name in FIXED}
    base |= {name: values[0] for name, values in given.items() if name not in FIXED and len(values) == 1}
    varied = {name: values for name, values in given.items() if name not in FIXED and len(values) > 1}
    if one_at_a_time:
        changes = [{}, *({name: value} for name, values in varied.items() for value in values
                         if value != base.get(name, getattr(Config, name)))]
    else:
        changes = [dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())]
    return [Config(**(base | change | {"seed": seed})) for seed in range(seeds) for change in changes]


def _values(field: dataclasses.Field) -> Callable[[str], list[Any]]:
    """How to read values of a setting with commas between."""
    words = {"true": True, "false": False}

    def values(text: str) -> list[Any]:
        read = [words[part] if field.type is bool else field.type(part) for part in text.split(",")]  # type: ignore[operator]
        if len(set(read)) < len(read):
            raise argparse.ArgumentTypeError(f"{field.name} has a value twice in {text!r}")
        return read

    def named(text: str) -> list[Any]:
        try:
            return values(text)
        except (ValueError, KeyError):
            kind = "true or false" if field.type is bool else f"{field.type.__name__}s"  # type: ignore[union-attr]
            raise argparse.ArgumentTypeError(f"{text!r} must be {kind}, with commas between") from None

    return named


def parse_plot(arguments: list[str]) -> tuple[str, str | None, str | None]:
    """The log folder, the run that is named and the folder of the images, None where they are not. Raises UserError."""
    parser = Parser("plot", PLOT)
    parser.add_argument("run", nargs="?", metavar="RUN", help="the run; the newest finished one if none is named")
    for name in ("log_dir", "data_dir"):
        parser.add_setting(Config.__dataclass_fields__[name])
    given = vars(parser.parse_args(arguments))
    return given.get("log_dir", Config.log_dir), given["run"], given.get("data_dir")


def parse_compare(arguments: list[str]) -> tuple[str, list[str]]:
    """The log folder, and the runs that are named. Raises UserError."""
    parser = Parser("compare", COMPARE)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a folder's name under logs/runs, or a path")
    parser.add_setting(Config.__dataclass_fields__["log_dir"])
    given = vars(parser.parse_args(arguments))
    return given.get("log_dir", Config.log_dir), given["runs"]
