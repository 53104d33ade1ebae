"""Parse the command line. Needs no torch, so that --help and a wrong flag answer at once."""

import argparse
import dataclasses
import importlib.metadata
import itertools
import os
import platform
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from config import MACHINE_SETTINGS, RECIPES, SETTINGS, Config, UserError, available_cores, did_you_mean, flag
from tinycnn.commands import help as texts

VERSION = "1.0.0"


def parse(line: list[str]) -> Namespace:
    """Parse `line`. Returns its `verb`, and the arguments that commands/<verb>.py reads."""
    verbs: dict[str, Callable[[list[str]], Namespace]] = {
        "train": _parse_train, "sweep": _parse_sweep, "compare": _parse_compare, "plot": _parse_plot, "test": _parse_test,
        "predict": _parse_predict, "export": _parse_export}
    for name, field in SETTINGS.items():
        if field.type not in (str, int, float, bool) or not field.metadata:
            raise UserError(f"the defaults in config.py: {name} must be declared as {name}: TYPE = setting(DEFAULT, MEANING), "
                            "with TYPE str, int, float or bool")
    try:
        Config()
    except UserError as error:
        raise UserError(f"the defaults in config.py: {error}") from error
    verb, rest = (line[0], line[1:]) if line and not line[0].startswith("-") else ("train", line)
    if verb not in verbs:
        raise UserError(f"there is no command {verb!r}{did_you_mean(verb, verbs)} (python main.py --help lists all)")
    arguments = verbs[verb](rest)
    arguments.verb = verb
    return arguments


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors."""

    def __init__(self, verb: str, description: str) -> None:
        super().__init__(prog=f"python main.py {verb}".strip(), description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        plain = message.replace("ignored explicit argument", "takes no value, but was given")  # as in --nesterov=true
        raise UserError(f"{plain} ({self.prog} --help lists all settings)")

    def parse(self, line: list[str]) -> Namespace:
        """Parse; name the nearest flag where one is unknown."""
        arguments, unknown = self.parse_known_args(line)
        if unknown:
            word = unknown[0].split("=")[0]
            self.error(f"unknown argument {word}" + (did_you_mean(word, self._option_string_actions)
                                                     if word.startswith("-") else ""))
        return arguments

    def add_setting(self, name: str, default_text: str | None = None, **how: Any) -> None:
        """A flag for a setting, absent from the result where it isn't given. `default_text` replaces the default in its help,
        `how` how it is read."""
        field = SETTINGS[name]
        if not how:
            read = os.path.expanduser if name.endswith("_dir") else field.type  # shells leave --data-dir=~/data as it is
            how = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": read, "metavar": "VALUE"}
        meaning = f"{field.metadata['help']} (default: {default_text or repr(field.default)})".replace("%", "%%")
        self.add_argument(flag(name), default=argparse.SUPPRESS, help=meaning, **how)

    def add_recipe(self) -> None:
        """The flag --recipe."""
        self.add_argument("--recipe", type=_recipe, default={}, metavar="NAME",
                          help=f"a named set of settings: {', '.join(RECIPES)}; flags override it")


def _recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe."""
    if name not in RECIPES:
        raise argparse.ArgumentTypeError(f"there is no recipe {name!r}{did_you_mean(name, RECIPES)} "
                                         f"(recipes: {', '.join(RECIPES)})")
    unknown = RECIPES[name].keys() - SETTINGS.keys()
    if unknown:
        setting = min(unknown)
        raise argparse.ArgumentTypeError(f"recipe {name} in config.py has the setting {setting!r}, which is none of Config's"
                                         + did_you_mean(setting, SETTINGS))
    return RECIPES[name]


def _version() -> str:
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = "not installed"
    return f"tiny-cifar10-cnn {VERSION}, Python {platform.python_version()}, torch {torch}"


def _parse_train(line: list[str]) -> Namespace:
    """Parse the arguments of training: given (the settings of the command line, recipe included), resume (a run, "" for the
    newest, None for a new run), and the new run's config."""
    parser = Parser("", texts.TRAIN)
    parser.add_argument("--version", action="version", version=_version())
    parser.add_recipe()
    parser.add_argument("--resume", nargs="?", const="", metavar="RUN",
                        help="resume an unfinished run, the newest if none is named")
    for name in SETTINGS:
        parser.add_setting(name)
    given = vars(parser.parse(line))
    resume, recipe = given.pop("resume"), given.pop("recipe")
    given = recipe | given
    if resume is None and "data_dir" in given:
        given.setdefault("dataset", _named_dataset(given["data_dir"]))
    config = None if resume is not None else Config(**given)
    _check_name(given)
    _warn_about_threads(given.get("threads", 0))
    return Namespace(given=given, resume=resume, config=config)


def _check_name(given: Mapping[str, Any]) -> None:
    """Raise UserError for a name that a sweep would read as those of several teachers; older runs may have one."""
    if "+" in given.get("name", ""):
        raise UserError(f"--name is {given['name']!r}, but must not contain +, which separates the teachers of a sweep")


def _named_dataset(data_dir: str) -> str:
    """The dataset where the user named a data_dir. The default, typed out, must hold CIFAR-10 like any other."""
    return "cifar10" if data_dir == Config.data_dir else Config.dataset


def _warn_about_threads(threads: int) -> None:
    if threads > available_cores():
        print(f"--threads is {threads}, but this program may use {available_cores()} cores: more threads than cores are slower",
              file=sys.stderr)


def _parse_sweep(line: list[str]) -> Namespace:
    """Parse the arguments of a sweep: configs, in the order they run, all combinations with the first seed, then with the next;
    and log_dir."""
    parser = Parser("sweep", texts.SWEEP)
    parser.add_recipe()
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="run each with the seeds 0 to N - 1 (default: 1)")
    parser.add_argument("--on", default="here", metavar="WHERE",
                        help="here: one run after another, in this process; ray: several at a time, on Ray, which is started "
                        "on this machine unless RAY_ADDRESS names a cluster; ray://HOST:PORT: on that cluster (default: here)")
    parser.add_argument("--cpus-per-run", type=int, metavar="N",
                        help="CPU cores of a run on Ray, and its --threads (default: --threads, or else 1)")
    parser.add_argument("--gpus-per-run", type=float, metavar="N",
                        help="GPUs of a run on Ray; 0.25 lets four runs share one (default: 1 where there are GPUs, else 0)")
    parser.add_argument("--one-at-a-time", action="store_true", help="vary each setting alone, not all combinations")
    for name, field in SETTINGS.items():
        if name in MACHINE_SETTINGS:
            parser.add_setting(name)
        elif name != "seed":
            alone: dict[str, Any] = {}
            if field.type is bool:
                alone = {"nargs": "?", "const": [True]}  # --nesterov, as where a run is trained
            parser.add_setting(name, type=_values(field), metavar="VALUE[,VALUE]", **alone)
    given = vars(parser.parse(line))
    seeds, one_at_a_time, recipe = (given.pop(name) for name in ("seeds", "one_at_a_time", "recipe"))
    on, cpus, gpus = (given.pop(name) for name in ("on", "cpus_per_run", "gpus_per_run"))
    _check_cluster(on, cpus, gpus, given.get("threads", 0))
    _check_name(given)
    if not 1 <= seeds <= 1000:
        raise UserError(f"--seeds is {seeds}, but must lie in 1 to 1000")
    base = recipe | {name: value for name, value in given.items() if name in MACHINE_SETTINGS}
    base |= {name: values[0] for name, values in given.items() if name not in MACHINE_SETTINGS and len(values) == 1}
    varied = {name: values for name, values in given.items() if name not in MACHINE_SETTINGS and len(values) > 1}
    if not varied and seeds == 1:
        raise UserError("nothing varies in this sweep: give a setting several values (--lr 0.01,0.05), or --seeds 3")
    if one_at_a_time:
        changes = [{}, *({name: value} for name, values in varied.items() for value in values
                         if value != base.get(name, getattr(Config, name)))]
    else:
        changes = [dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())]
    if "data_dir" in given:
        base.setdefault("dataset", _named_dataset(given["data_dir"]))
    configs = [Config(**(base | change | {"seed": seed})) for seed in range(seeds) for change in changes]
    _warn_about_threads(configs[0].threads)
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
    words = {"true": True, "false": False}

    def read(text: str) -> list[Any]:
        """The values in `text`, of which none may come twice."""
        try:
            values = [words[part] if field.type is bool else field.type(part) for part in text.split(",")]  # type: ignore[operator]
            if field.name == "teacher":  # a comma separates the values, so a plus the teachers of one
                values = [str(value).replace("+", ",") for value in values]
        except (ValueError, KeyError):
            kind = "true or false" if field.type is bool else f"{field.type.__name__}s"  # type: ignore[union-attr]
            raise argparse.ArgumentTypeError(f"{text!r} must be {kind}, separated by commas") from None
        if len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"{text!r} has a value twice")
        return values

    return read


def _parse_plot(line: list[str]) -> Namespace:
    return _checked(_finished_run_parser("plot", texts.PLOT, "log_dir", "data_dir", "device").parse(line))


def _parse_test(line: list[str]) -> Namespace:
    parser = _finished_run_parser("test", texts.TEST, "log_dir", "data_dir", "device")
    parser.add_argument("--flip", action="store_true", help="also average over each image and its mirror image")
    return _checked(parser.parse(line))


def _parse_predict(line: list[str]) -> Namespace:
    parser = _finished_run_parser("predict", texts.PREDICT, "log_dir", "device", run="--run")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="an image file, or a folder of them")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="print the N most probable classes (default: 3)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = _checked(parser.parse(line))
    if arguments.top < 1:
        raise UserError(f"--top is {arguments.top}, but must be 1 or more")
    return arguments


def _parse_export(line: list[str]) -> Namespace:
    parser = _finished_run_parser("export", texts.EXPORT, "log_dir", "data_dir")
    parser.add_argument("--to", default="onnx", choices=("onnx", "int8", "torch"), help="the kind of file (default: onnx)")
    return _checked(parser.parse(line))


def _parse_compare(line: list[str]) -> Namespace:
    parser = Parser("compare", texts.COMPARE)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a run's --name, its folder's name under logs/runs, or a path")
    parser.add_setting("log_dir")
    parser.set_defaults(log_dir=Config.log_dir)
    return parser.parse(line)


def _finished_run_parser(verb: str, description: str, *settings: str, run: str = "run") -> Parser:
    """A parser for a command that uses a finished run. Settings that aren't given have Config's default; data_dir, None: where
    the run had its images."""
    parser = Parser(verb, description)
    how: dict[str, Any] = {} if run.startswith("-") else {"nargs": "?"}
    path = "or a path" if verb == "plot" else "a path, or a .safetensors file"
    parser.add_argument(run, metavar="RUN", **how, help=f"a run's --name, its folder's name under logs/runs, {path}; the "
                        "newest finished run if none is named")
    for name in settings:
        parser.add_setting(name, default_text="where the run had its images" if name == "data_dir" else None)
    parser.add_argument("--model", metavar="FILE",
                        help="use the network of this file, such as logs/runs/<folder>/model.py; it is run as code")
    parser.set_defaults(**{name: None if name == "data_dir" else getattr(Config, name) for name in settings})
    return parser


def _checked(arguments: Namespace) -> Namespace:
    """Check the settings in `arguments`, and return them."""
    Config(**{name: value for name, value in vars(arguments).items() if name in SETTINGS and value is not None})
    return arguments
