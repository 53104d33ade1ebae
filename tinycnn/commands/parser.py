"""Parse the command line. Needs no torch, so that --help and a wrong flag answer at once.

Each command's flags and help text are in its file, tinycnn/commands/<command>.py; here is what they share.
"""

import argparse
import importlib
import os
import sys
from argparse import Namespace
from typing import Any, NoReturn

from config import ALIASES, RECIPES, SETTINGS, Config, UserError, did_you_mean, flag
from tinycnn.cores import available_cores

VERBS = ("train", "find-lr", "sweep", "compare", "plot", "test", "predict", "export")

# Flags of other programs
HERE_IT_IS = {
    "--learning-rate": "--lr", "--batchsize": "--batch-size", "--num-epochs": "--epochs", "--num-workers": "--workers",
    "--wd": "--weight-decay", "--gpu": "--device cuda", "--data": "--data-dir", "--output-dir": "--log-dir",
    "--scheduler": "--schedule", "--lr-scheduler": "--schedule", "--lr-schedule": "--schedule",
    "--optimizer": "SGD; another one is an edit of main.py", "--loss": "cross-entropy; another one is an edit of main.py"}


def parse(line: list[str]) -> Namespace:
    """Parse `line`. Returns its `verb`, and the arguments that tinycnn/commands/<verb>.py reads."""
    check_defaults()
    verb, rest = (line[0], line[1:]) if line and not line[0].startswith("-") else ("train", line)
    if verb not in VERBS:
        raise UserError(f"there is no command {verb!r}{did_you_mean(verb, VERBS)} (python main.py --help lists all)")
    arguments = command_module(verb).parse(rest)
    arguments.verb = verb
    return arguments


def command_module(verb: str) -> Any:
    """The module of a command: its parse(line) returns the arguments that its run() takes."""
    return importlib.import_module(f"tinycnn.commands.{verb.replace('-', '_')}")


def check_defaults() -> None:
    """Raise UserError for a mistake in the defaults of config.py."""
    for name, field in SETTINGS.items():
        if field.type not in (str, int, float, bool) or not field.metadata:
            raise UserError(f"the defaults in config.py: {name} must be declared as {name}: TYPE = setting(DEFAULT, MEANING), "
                            "with TYPE str, int, float or bool")
    try:
        Config()
    except UserError as error:
        raise UserError(f"the defaults in config.py: {error}") from error


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with the flags that commands share. Its errors are UserErrors."""

    def __init__(self, verb: str, description: str) -> None:
        super().__init__(prog=f"python main.py {verb}".strip(), description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        plain = message.replace("ignored explicit argument", "takes no value, but was given")  # as in --nesterov=true
        raise UserError(f"{plain} ({self.prog} --help lists all settings)")

    def parse(self, line: list[str]) -> Namespace:
        """Parse; name what an unknown argument may stand for."""
        arguments, unknown = self.parse_known_args(line)
        if unknown:
            word = unknown[0].split("=")[0]
            self.error(f"unknown argument {word}{self._hint(word)}")
        return arguments

    def _hint(self, word: str) -> str:
        """What to write in place of an unknown argument."""
        if word in VERBS:
            return f": put the command first: python main.py {word} ..."
        if word.lower() in ("true", "false"):
            return ": a switch takes no value: write --nesterov or --no-nesterov, for example"
        if not word.startswith("-"):
            return ""
        word = word.lower().replace("_", "-")
        return f": here it is {HERE_IT_IS[word]}" if word in HERE_IT_IS else did_you_mean(word, self._option_string_actions)

    def add_setting(self, name: str, default: Any = argparse.SUPPRESS, default_text: str = "", **how: Any) -> None:
        """The flag of a setting; absent from the result where it isn't given, unless it has a `default`. `default_text`
        replaces the default in its help, `how` how it is read."""
        field = SETTINGS[name]
        if not how:
            how = ({"action": argparse.BooleanOptionalAction} if field.type is bool
                   else {"type": lambda text: _read(name, text), "metavar": "VALUE"})
        meaning = f"{field.metadata['help']} (default: {default_text or repr(field.default)})".replace("%", "%%")
        names = [name, *(earlier for earlier, now in ALIASES.items() if now == name)]
        self.add_argument(*map(flag, names), dest=name, default=default, help=meaning, **how)

    def add_recipe(self) -> None:
        """The flag --recipe, whose value is the recipe's settings."""
        self.add_argument("--recipe", type=_recipe, default={}, metavar="NAME",
                          help=f"a named set of settings: {', '.join(RECIPES)}; flags override it")

    def add_run(self, *settings: str, argument: str = "run") -> None:
        """What a command needs that uses a finished run: RUN, these `settings`, --model. Without a data_dir, None, the images
        are where the run had them."""
        self.add_argument(argument, metavar="RUN", **({} if argument.startswith("-") else {"nargs": "?"}),  # type: ignore[arg-type]
                          help="a run's --name, its folder's name under logs/runs, a path, or a .safetensors file; the newest "
                          "finished run if none is named")
        for name in settings:
            if name == "data_dir":
                self.add_setting(name, default=None, default_text="where the run had its images")
            else:
                self.add_setting(name, default=getattr(Config, name))
        self.add_argument("--model", metavar="FILE",
                          help="use the network of this file, such as logs/runs/<folder>/model.py; it is run as code")


def _read(name: str, text: str) -> Any:
    """The value of a setting."""
    kind: Any = SETTINGS[name].type
    try:
        return os.path.expanduser(text) if name.endswith("_dir") else kind(text)  # shells leave --data-dir=~/data as it is
    except ValueError:
        comma = ": write a decimal point; several values are for python main.py sweep" if "," in text else ""
        raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' * (kind is int)}number{comma}") from None


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


def check_settings(arguments: Namespace) -> Namespace:
    """Return `arguments`. Raises UserError where a setting among them has a wrong value."""
    Config(**{name: value for name, value in vars(arguments).items() if name in SETTINGS and value is not None})
    return arguments


def complete_settings(given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a new run, of which the line or a recipe gives these. Where it names a data_dir, even the default one,
    CIFAR-10 must be there."""
    if "+" in given.get("name", ""):  # older runs may have one
        raise UserError(f"--name is {given['name']!r}, but must not contain +, which separates the teachers of a sweep")
    if given.get("threads", 0) > available_cores():
        print(f"--threads is {given['threads']}, but this program may use {available_cores()} cores: more threads than cores "
              "are slower", file=sys.stderr)
    if Config.dataset == "auto" and given.get("data_dir") == Config.data_dir:
        given = {"dataset": "cifar10"} | given
    return given
