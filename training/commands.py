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

    python main.py test                         its accuracy, class by class, and its calibration
    python main.py predict cat.jpg pictures/    what it takes images for
    python main.py export --to onnx             a file for ONNX Runtime; or --to int8, or --to torch

Read logs/model_accuracy.log, an aligned row an epoch, and logs/torch_summary.log, the network layer by layer.
"""
SWEEP = """Train once for each combination of the values, and for each seed; then compare all runs.

    python main.py sweep --lr 0.01,0.05,0.1 --seeds 3 --epochs 8 --validation 5000
    python main.py sweep --one-at-a-time --flip-p 0.5,0 --dropout 0,0.1,0.2 --epochs 8 --validation 5000

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
    python main.py plot RUN                     its --name, its folder's name under logs/runs, or a path
"""
TEST = """Accuracy, loss, calibration and each class's accuracy of trained weights on the test images of their run.

    python main.py test                         the newest finished run
    python main.py test logs/reference          the reference run
    python main.py test RUN/best.safetensors --flip
"""
PREDICT = """What a trained network takes images for: files that Pillow reads, of any size and mode, and folders of them.

    python main.py predict cat.jpg              by the newest finished run
    python main.py predict pictures/ --run logs/reference --json
"""
EXPORT = """A trained network as one file that runs without this program, in the folder of its run. Input: image, uint8,
N x 32 x 32 x 3, RGB. Output: logits. The normalization is inside. The file is loaded back and compared with the network on the
test images before it is written.

    python main.py export --to onnx             model.onnx, for ONNX Runtime
    python main.py export --to int8             model.int8.onnx, in 8 bits, calibrated on training images
    python main.py export --to torch RUN        model.pt2, for torch.export.load
"""
FIXED = ("dataset", "data_dir", "log_dir", "device", "threads", "workers", "batches", "capture", "name", "pictures",
         "tensorboard")  # one value for a whole sweep


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


def parse_plot(arguments: list[str]) -> argparse.Namespace:
    """run, log_dir, data_dir, device. Raises UserError."""
    return _checked(_of_a_run("plot", PLOT, "log_dir", "data_dir", "device"), arguments)


def parse_test(arguments: list[str]) -> argparse.Namespace:
    """run, log_dir, data_dir, device, flip. Raises UserError."""
    parser = _of_a_run("test", TEST, "log_dir", "data_dir", "device")
    parser.add_argument("--flip", action="store_true", help="also with each image mirrored, reported apart")
    return _checked(parser, arguments)


def parse_predict(arguments: list[str]) -> argparse.Namespace:
    """images, run, log_dir, device, json, top. Raises UserError."""
    parser = _of_a_run("predict", PREDICT, "log_dir", "device", run="--run")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="an image file, or a folder of them")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="name the N most probable classes (default: 3)")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    asked = _checked(parser, arguments)
    if asked.top < 1:
        raise UserError(f"top is {asked.top}, but must be 1 or more")
    return asked


def parse_export(arguments: list[str]) -> argparse.Namespace:
    """run, log_dir, data_dir, to. Raises UserError."""
    parser = _of_a_run("export", EXPORT, "log_dir", "data_dir")
    parser.add_argument("--to", required=True, choices=("onnx", "torch", "int8"), help="the kind of file")
    return _checked(parser, arguments)


def _of_a_run(verb: str, description: str, *settings: str, run: str = "run") -> Parser:
    """A parser for what is done with a finished run; of the `settings`, those that are not given have Config's default."""
    parser = Parser(verb, description)
    how: dict[str, Any] = {} if run.startswith("-") else {"nargs": "?"}
    path = "or a path" if verb == "plot" else "a path, or a .safetensors file"
    parser.add_argument(run, metavar="RUN", **how, help=f"a run's --name, its folder's name under logs/runs, {path}; the "
                        "newest finished run if none is named")
    for name in settings:
        parser.add_setting(Config.__dataclass_fields__[name])
    parser.set_defaults(**{name: getattr(Config, name) for name in settings})
    return parser


def _checked(parser: Parser, arguments: list[str]) -> argparse.Namespace:
    """What the command line asks for, its settings in their ranges. Raises UserError."""
    asked = parser.parse_args(arguments)
    Config(**{name: value for name, value in vars(asked).items() if name in Config.__dataclass_fields__})
    return asked


def parse_compare(arguments: list[str]) -> argparse.Namespace:
    """runs, log_dir. Raises UserError."""
    parser = Parser("compare", COMPARE)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a run's --name, its folder's name under logs/runs, or a path")
    parser.add_setting(Config.__dataclass_fields__["log_dir"])
    parser.set_defaults(log_dir=Config.log_dir)
    return parser.parse_args(arguments)
