"""The network of trained weights: that of model.py, or of another file that the user names."""

import inspect
import shlex
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from config import UserError, net_settings
from model import Net
from tinycnn.runs.finding import REFERENCE
from tinycnn.runs.record import MODEL
from tinycnn.runs.weights import Weights
from tinycnn.training.epoch import check_output
from tinycnn.training.errors import as_user_errors

MODULE_NAME = "named_model"  # of a model.py that is not ours


def load_net_class(path: Path) -> Callable[..., nn.Module]:
    """Run a model.py and return its `Net`: a class, or a function that chooses one by the settings."""
    module = types.ModuleType(MODULE_NAME)
    module.__file__ = str(path)
    sys.modules[MODULE_NAME] = module  # where dataclasses look for it
    try:
        with as_user_errors():
            # importlib would leave __pycache__ in the run's folder
            exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"--model {path} can't be read ({error.strerror or error}): name a model.py") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"--model {path} can't be imported ({type(error).__name__}: {error}): name another file") from error
    net_class = vars(module).get("Net")
    if not callable(net_class) or (isinstance(net_class, type) and not issubclass(net_class, nn.Module)):
        raise UserError(f"--model {path} has no class Net that is a torch.nn.Module: name a model.py that has one")
    return net_class


def build_trained_net(weights: Weights, model: str | None) -> nn.Module:
    """Build the network of `weights`, on the CPU, in evaluation mode, with the `Net` of the file `model`, or ours where that is
    None. Raises UserError where `weights` record the identity of another network."""
    net_class = load_net_class(Path(model)) if model is not None else Net
    num_classes = len(weights.class_names)
    try:
        with as_user_errors():
            net = net_class(num_classes, **_taken(net_class, net_settings(weights.config)))
    except UserError:
        raise
    except Exception as error:  # a model.py that the user named may raise anything
        settings = " and ".join(net_settings(weights.config))
        raise UserError(f"Net of {model or MODEL} must take num_classes; {settings} are optional ({error})") from error
    if not isinstance(net, nn.Module):
        raise UserError(f"Net of {model or MODEL} must return a torch.nn.Module, and returned {type(net).__name__}")
    weights.check_identity(net, model or MODEL, _remedy(weights, model))
    weights.load_into(net, _remedy(weights, model))
    check_output(net, num_classes)
    return net


def _taken(net_class: Callable[..., nn.Module], settings: dict[str, Any]) -> dict[str, Any]:
    """Those of `settings` that `net_class` takes: an older model.py may lack some, which had no effect then."""
    parameters = inspect.signature(net_class).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return settings
    return {name: value for name, value in settings.items() if name in parameters}


def _remedy(weights: Weights, model: str | None) -> str:
    own = weights.path.parent / MODEL
    if not own.exists() and own.resolve().is_relative_to(REFERENCE):  # which has one for all committed runs
        own = REFERENCE / MODEL
    if own.exists() and (model is None or own.resolve() != Path(model).resolve()):
        return f"that of the run lies in {own}; use it with --model {shlex.quote(str(own))}"
    return "undo the edits made since, or name the run's model.py with --model"
