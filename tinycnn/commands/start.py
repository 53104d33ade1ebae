"""Start the program, and end it: with one line on stderr for what a user can fix, with a traceback for bugs.

Python's version is checked here, so this file and main.py must be valid for older versions too.
"""

import importlib
import importlib.util
import os
import re
import signal
import sys

if sys.version_info < (3, 11):
    sys.stderr.write("error: this program needs Python 3.11 or newer, and this is Python %d.%d: install a newer one, "
                     "and make a virtual environment with it\n" % sys.version_info[:2])
    sys.exit(2)

import contextlib
import io
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from config import Config, UserError
from tinycnn.commands.parser import parse
from tinycnn.text import printable
from tinycnn.training.errors import STOP_SIGNALS, StopRequested, as_user_errors, raise_stop, stop_on_signals

STARTED = time.perf_counter()

# What makes PyTorch's three CPU libraries use AVX2 at most; they read it when they are loaded
AVX2_VARIABLES = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
                  "MKL_CBWR": "AVX2"}
PACKAGES = ("torch", "albumentations", "torchsummary", "safetensors", "matplotlib", "scipy", "tqdm")


def parse_or_exit() -> Namespace:
    """Parse the command line. Errors end the program here, and from here on everywhere, in one line."""
    sys.excepthook = _end_by_exception
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (until the process ends)
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is signal.SIG_DFL:  # not SIGINT, which has Python's, nor what nohup ignores
            signal.signal(number, lambda number, frame: raise_stop(number))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files and classes may hold what a terminal can't show
    arguments = parse(sys.argv[1:])
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the package {missing[0]} is not installed for {sys.executable}: activate the virtual environment, "
                        "or install the packages with python -m pip install -r requirements.txt")
    cap_instruction_set(arguments)
    return arguments


def run_or_exit(arguments: Namespace, train: Callable) -> None:
    """Run the command, and end the process with its exit status."""
    _exit(run(arguments, train))


def run(arguments: Namespace, train: Callable) -> int:
    """Run the command that `arguments` name. Returns the exit status; bugs pass as exceptions. `train` is main.train."""
    try:
        with stop_on_signals(), as_user_errors():
            if arguments.verb != "train" and os.environ.get("WORLD_SIZE", "1") != "1":
                raise UserError(f"torchrun trains one run: start python main.py {arguments.verb} without it")
            command = importlib.import_module(f"tinycnn.commands.{arguments.verb}")
            return command.run(arguments, train) if arguments.verb in ("train", "sweep") else command.run(arguments) or 0
    except BaseException as error:
        status = report(error)
        if status is None:
            raise
        return status


def report(error: BaseException) -> int | None:
    """Print an error that the user can fix as one line on stderr. Returns the exit status, or None for a bug."""
    if isinstance(error, StopRequested):
        line, status = f"stopped by {error.signal.name}", error.status
    elif isinstance(error, KeyboardInterrupt):  # before the signal handlers are in place, or after
        line, status = "stopped by SIGINT", 130
    elif isinstance(error, BrokenPipeError):
        line, status = "stopped: the output was closed", 2
    elif isinstance(error, UserError | OSError):  # an OSError that nobody foresaw is still the machine's, and names its file
        line, status = f"error: {error}", 2
    elif isinstance(error, MemoryError) or "failed to map segment" in str(error):
        line, status = "error: out of memory: close other programs", 2
    else:
        return None
    line = re.sub(r"\s*[\r\n]+\s*", " ", "; ".join([line, *getattr(error, "__notes__", [])]).strip())
    with contextlib.suppress(OSError):  # stderr is closed
        print(printable(line), file=sys.stderr)  # names of files may hold escape codes
    return status


def cap_instruction_set(arguments: Namespace) -> None:
    """Have PyTorch use the CPU instructions of the setting, which works only before it is loaded."""
    if _instruction_set(arguments) != "avx2":
        return
    if "torch" in sys.modules and os.environ.get("ATEN_CPU_CAPABILITY") != AVX2_VARIABLES["ATEN_CPU_CAPABILITY"]:
        raise UserError("--instruction-set avx2 must be known before PyTorch is loaded: start with python main.py")
    os.environ.update(AVX2_VARIABLES)


def _instruction_set(arguments: Namespace) -> str:
    """The setting of the command line, or else of the run to resume."""
    if arguments.verb == "sweep":
        return arguments.configs[0].instruction_set
    if arguments.verb != "train":
        return "auto"
    if arguments.resume is None:
        return arguments.config.instruction_set
    if "instruction_set" in arguments.given:
        return arguments.given["instruction_set"]
    from tinycnn.runs.finding import find_unfinished, peek_record  # loads NumPy, which --help doesn't need

    folder = find_unfinished(Path(arguments.given.get("log_dir", Config.log_dir)), arguments.resume)
    return peek_record(folder).get("config", {}).get("instruction_set", "auto")


def _end_by_exception(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    status = report(error)
    if status is None:
        sys.__excepthook__(kind, error, traceback)
    _exit(1 if status is None else status)


def _exit(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a closed pipe, a full disk: the user has been told
            stream.flush()
    os._exit(status)  # all is on disk and no worker is left; with torch, Python's own way out takes more than a second
