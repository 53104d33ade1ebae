"""The class of a run's network: Net of this program, or of the model.py that the run was made with."""

import shlex
import sys
import types
from collections.abc import Callable
from pathlib import Path

from torch import nn

from config import UserError
from model import Net
from tinycnn.errors import as_user_errors
from tinycnn.runs.finding import REFERENCE
from tinycnn.runs.record import MODEL
from tinycnn.sources import COPIED_FILES, code_hash, is_known_model

MODULE_NAME = "named_model"  # of a model.py that is not ours
NetClass = Callable[..., nn.Module]  # or a function that chooses a class by the settings


def find_net_class(weights: Path, recorded: str | None, named: str | None) -> NetClass:
    """The `Net` that the file `weights` was trained with: that of the file `named`, which is run as code; or, where that is
    None, this program's or that of the model.py beside the weights.

    `recorded` is the hash of the code of their model.py; None takes the one beside them, or this program's where there is none.
    A model.py that nobody named is run only if its code was shipped with this program. Raises UserError for any other.
    """
    if named is not None:
        return run_model(Path(named))
    own, ours = _model_of(weights), code_hash(COPIED_FILES[MODEL])
    source = own.read_bytes() if own else b""
    beside = code_hash(source) if own else ours
    if (recorded or beside) == ours:
        return Net
    if own and recorded not in (None, beside):
        own = None  # which was changed since
    if own and is_known_model(source):
        return run_model(own, source)
    raise UserError(f"{weights} was trained with another model.py than this program's: name that file, if you trust it "
                    f"(--model {shlex.quote(str(own)) if own else 'FILE'}; it is run as code)")


def _model_of(weights: Path) -> Path | None:
    """The model.py of the run that the weights lie in. The committed runs have one for all."""
    folders = [weights.parent, *([REFERENCE] if weights.resolve().is_relative_to(REFERENCE) else [])]
    return next((folder / MODEL for folder in folders if (folder / MODEL).is_file()), None)


def run_model(path: Path, source: bytes | None = None) -> NetClass:
    """Run a model.py, whose content may be given as `source`, and return its `Net`."""
    module = types.ModuleType(MODULE_NAME)
    module.__file__ = str(path)
    sys.modules[MODULE_NAME] = module  # where dataclasses look for it
    try:
        with as_user_errors():
            # importlib would leave __pycache__ in the run's folder
            exec(compile(path.read_bytes() if source is None else source, str(path), "exec"), vars(module))
        return module.Net
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"--model {path} can't be read ({error.strerror or error}): name a model.py") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"--model {path} can't be imported, or has no Net ({type(error).__name__}: {error}): name another "
                        "file") from error
