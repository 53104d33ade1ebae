"""Start the program, and end it: with one line on stderr for what a user can fix, with a traceback for bugs.

Python's version is checked here, so this file and main.py must be valid for older versions too.
"""

import sys

if sys.version_info < (3, 11):
    sys.stderr.write("error: this program needs Python 3.11 or newer, and this is Python %d.%d: install a newer one, "
                     "and make a virtual environment with it\n" % sys.version_info[:2])
    sys.exit(2)

import contextlib
import gc
import io
import os
import re
import signal
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from config import Config, UserError
from tinycnn import startup  # noqa: F401 (its clock starts)
from tinycnn.commands.parser import command_module, parse
from tinycnn.errors import StopRequested, stop_on_signals, user_message
from tinycnn.text import printable

TRAINING = ("train", "sweep", "find-lr")  # commands that train
# What makes PyTorch's three CPU libraries use AVX2 at most; they read it when they are loaded
AVX2_VARIABLES = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
                  "MKL_CBWR": "AVX2"}


def parse_or_exit() -> Namespace:
    """Parse the command line. Errors end the program here, and from here on everywhere, in one line."""
    sys.excepthook = _end_by_exception
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115 (closed)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files and classes may hold what a terminal can't show
    arguments = parse(sys.argv[1:])
    cap_instruction_set(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin keep other programs, and each other, from the cores
    if os.environ.get("WORLD_SIZE", "1") != "1":  # every process would say that it searched in vain for unused parameters
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    elif arguments.verb == "train" and arguments.config:
        from tinycnn.data.loading import load_ahead

        load_ahead(arguments.config)
    if arguments.verb in TRAINING and sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        print("Loading PyTorch and the images", file=sys.stderr)
    return arguments


def run_or_exit(arguments: Namespace, *functions: Callable) -> None:
    """Run the command. Where it fails, end the program with its exit status. `functions` are main.py's train, build and
    train_step, for commands that train."""
    _end(run(arguments, *functions))


def run(arguments: Namespace, *functions: Callable) -> int:
    """Run the command that `arguments` name. Returns the exit status; bugs pass as exceptions."""
    try:
        with stop_on_signals():
            if arguments.verb != "train" and os.environ.get("WORLD_SIZE", "1") != "1":
                raise UserError(f"torchrun trains one run: start python main.py {arguments.verb} without it")
            command = command_module(arguments.verb)
            status = command.run(arguments, *functions) if arguments.verb in TRAINING else command.run(arguments)
            sys.stdout.flush()
            return status or 0
    except BaseException as error:
        status = report(error)
        if status is None:
            raise
        return status


def report(error: BaseException) -> int | None:
    """Print an error that the user can fix as one line on stderr. Returns the exit status, or None for a bug."""
    if isinstance(error, StopRequested | KeyboardInterrupt):  # the latter before torch is loaded
        number = getattr(error, "signal", signal.SIGINT)
        line, status = f"stopped by {number.name}", 128 + number
    elif isinstance(error, BrokenPipeError):
        line, status = "stopped: the output was closed", 2
    elif isinstance(error, ModuleNotFoundError) and "." not in str(error.name):  # else one of our own, or a part of a package
        line, status = (f"error: the package {error.name} is not installed for {sys.executable}: activate the virtual "
                        "environment, or install the packages with python -m pip install -r requirements.txt"), 2
    elif isinstance(error, AttributeError) and (error.obj is Config or isinstance(error.obj, Config)):
        line, status = f"error: config.py has no setting {error.name}, which the program needs: put it back", 2
    else:
        message = user_message(error)
        if message is None:
            return None
        line, status = f"error: {message}", 2
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
    given = vars(arguments.configs[0]) if arguments.verb == "sweep" else getattr(arguments, "given", {})
    if "instruction_set" in given or getattr(arguments, "resume", None) is None:
        return given.get("instruction_set", Config.instruction_set)
    from tinycnn.runs.finding import find_unfinished, peek_record  # loads NumPy, which --help doesn't need

    folder = find_unfinished(Path(given.get("log_dir", Config.log_dir)), arguments.resume)
    return peek_record(folder).get("config", {}).get("instruction_set", "auto")


def _end_by_exception(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """sys.excepthook."""
    status = report(error)
    if status is None:
        sys.__excepthook__(kind, error, traceback)  # and Python ends with 1
    _end(status or 0)


def _end(status: int) -> None:
    """Let the program end as Python programs do, with this exit status."""
    try:
        sys.stdout.flush()
    except OSError:  # a closed pipe, a full disk: the user has been told, so Python need not find it out again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    gc.freeze()  # at its end Python would look through all that torch made for garbage: more than a second
    if status:
        sys.exit(status)
