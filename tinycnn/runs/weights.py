"""Trained weights: safetensors files with what is needed to use them."""

import hashlib
import inspect
import itertools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from config import SIDE, Config, UserError, flag, net_settings
from tinycnn.data.dataset import Dataset
from tinycnn.errors import as_user_errors
from tinycnn.runs.files import write
from tinycnn.runs.finding import PROGRAM, find_finished
from tinycnn.runs.network import NetClass, find_net_class
from tinycnn.runs.record import FINAL, MODEL, NAME_WEIGHTS


@dataclass(frozen=True)
class Weights:
    """The content of a .safetensors file of a run. `mean` and `std` are each channel's, as fractions of 255."""

    path: Path
    tensors: dict[str, Tensor]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    config: dict[str, Any]  # the run's settings, as in its config.json
    fingerprint: str | None  # of the images trained on; None in files from before it was kept
    model: str | None  # the hash of model.py's code (tinycnn.sources); None in files from before it was kept
    digest: str  # SHA-256 of the tensors

    @property
    def name(self) -> str:
        """The name of these weights in logs, whatever their path: run, file, first digits of the SHA-256."""
        file = "" if self.path.name == FINAL else f"/{self.path.name}"
        return f"{self.path.resolve().parent.name}{file}:{self.digest[:8]}"

    def trained_on(self, images: Dataset) -> bool:
        """Whether these weights were trained on `images`, as far as the file tells."""
        if self.fingerprint:
            return self.fingerprint == images.fingerprint
        pairs = zip((*self.mean, *self.std), itertools.chain(*images.statistics), strict=True)
        return self.class_names == images.class_names and all(math.isclose(*pair) for pair in pairs)

    def build_net(self, model: str | None = None) -> nn.Module:
        """The network of these weights, on the CPU, in evaluation mode, by the rule of find_net_class; `model`: the file that
        the user named. Raises UserError where these weights don't fit it."""
        net_class = find_net_class(self.path, self.model, model)
        try:
            with as_user_errors(), torch.no_grad():
                net = net_class(len(self.class_names), **_taken(net_class, net_settings(self.config)))
                net.load_state_dict(self.tensors)
                output = net.eval()(torch.zeros(2, 3, SIDE, SIDE))
                if output.shape != (2, len(self.class_names)):
                    raise ValueError(f"it returns {' x '.join(map(str, output.shape))} for 2 images, not 2 x "
                                     f"{len(self.class_names)}, a logit for each class")
        except UserError:
            raise
        except Exception as error:  # an edited model.py may raise anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UserError(f"{self.path} does not hold weights of Net in {model or MODEL} for {len(self.class_names)} classes "
                            f"({reason}): name the model.py that it was trained with (--model FILE), or another run") from error
        return net


NamedWeights = Mapping[str, list[Weights]]  # the weights that each of NAME_WEIGHTS names


def _taken(net_class: NetClass, settings: dict[str, Any]) -> dict[str, Any]:
    """Those of `settings` that `net_class` takes: an older model.py may lack some, which had no effect then."""
    parameters = inspect.signature(net_class).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return settings
    return {name: value for name, value in settings.items() if name in parameters}


def find_weights(log_dir: Path, name: str | None) -> Path:
    """The .safetensors file that is named, or the final weights of the newest finished run that matches `name`."""
    if name is None or Path(name).suffix != ".safetensors":
        return find_finished(log_dir, name) / FINAL
    path = next((path for path in (Path(name), log_dir / "runs" / name, PROGRAM / name) if path.is_file()), None)
    if path is None:
        raise UserError(f"there is no file {name}, neither here nor in {log_dir / 'runs'}: name a run, or a file by the "
                        "folder's name of a run, such as 2026-01-31_12-00-00/best.safetensors")
    return path


def load_weights(config: Config) -> NamedWeights:
    """The weights that the config's NAME_WEIGHTS name."""
    found = {}
    for setting in NAME_WEIGHTS:
        try:
            names = map(os.path.expanduser, filter(None, getattr(config, setting).split(",")))
            found[setting] = [read_weights(find_weights(Path(config.log_dir), name)) for name in names]
        except UserError as error:
            raise UserError(f"{flag(setting)}: {error}") from error
    return found


def recorded_names(weights: NamedWeights) -> dict[str, str]:
    """The values of NAME_WEIGHTS in records, wherever the weights lie."""
    return {setting: ",".join(each.name for each in found) for setting, found in weights.items()}


def fitting(net: nn.Module, init: Weights) -> dict[str, Tensor]:
    """The tensors of `init` that `net` has by the same name and in the same shape. Raises UserError where they are no filter:
    networks of other widths still have a bias for each class in common."""
    own = net.state_dict()
    found = {name: tensor for name, tensor in init.tensors.items() if name in own and own[name].shape == tensor.shape}
    if all(tensor.dim() < 2 for tensor in found.values()):
        raise UserError(f"--init: no layer of {init.path} fits this network: name weights of the same --width and model.py")
    return found


def begin_with(net: nn.Module, init: Weights | None) -> None:
    """Copy the tensors of `init` that fit into `net`; the others stay as they are."""
    if init:
        net.load_state_dict(fitting(net, init), strict=False)


def describe_init(net: nn.Module, init: Weights, classes: int) -> str:
    """A line for the log: which tensors of `net`, which has that many classes, begin anew."""
    anew = [name for name in net.state_dict() if name not in fitting(net, init)]
    if not anew:
        return f"init: {init.name}, all of it"
    names = " and ".join(anew) if len(anew) < 3 else f"{anew[0]} and {len(anew) - 1} others"
    why = f": {classes} classes, not {len(init.class_names)}" if classes != len(init.class_names) else ""
    return f"init: {init.name}, {names} begin{'s' * (len(anew) == 1)} anew{why}"


def check_held_out(weights: NamedWeights, whole: Dataset, images: Dataset) -> None:
    """Raise UserError where weights may know the images that this run holds out. `images`: those of `whole`, held out. An init
    of other images is welcome."""
    for init in weights["init"]:
        held = init.config.get("validation", 0)
        if held < len(images.validation) and init.trained_on(whole.hold_out(held)):
            raise UserError(f"--init: {init.path} was trained on images that this run holds out: name weights of the same "
                            "--validation, or leave --validation out")
    for teacher in weights["teacher"]:
        if not teacher.trained_on(images):
            raise UserError(f"teacher {teacher.path} was trained on other images than this run's, or held others out: name "
                            "one of the same dataset and the same --validation")


def read_weights(path: Path) -> Weights:
    """The weights in a file that save_weights wrote. Raises UserError for any other file."""
    try:
        data = path.read_bytes()
        tensors, (header, body) = load(data), _split(data)
        metadata = {key: json.loads(value) for key, value in header.get("__metadata__", {}).items()}
        digests = {"sha256": hashlib.sha256(body).hexdigest(), "header_sha256": _header_digest(header)}
        _check(all(metadata.get(key, found) == found for key, found in digests.items()), "its checksum is wrong")
        _check(all(tensor.isfinite().all() for tensor in tensors.values()), "some of its weights are not finite numbers")
        mean, std = (tuple(map(float, metadata[name])) for name in ("mean", "standard_deviation"))
        _check(len(mean) == len(std) == 3 and all(0 <= each <= 1 for each in mean)
               and all(1 / 255 <= each <= 1 for each in std),  # as Dataset.statistics bounds it
               "its mean and standard deviation are not those of three channels")
        config = net_settings(vars(Config())) | metadata["config"]  # older files have fewer settings
        Config(**net_settings(config))
        names = metadata["class_names"]
        _check(isinstance(names, list) and names and all(isinstance(name, str) for name in names), "it has no class names")
        fingerprint, model = metadata.get("images"), metadata.get("model")
        _check(isinstance(fingerprint, str | None) and isinstance(model, str | None), "its hashes are no text")
    except (UserError, SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError,
            OverflowError) as error:
        raise UserError(f"{path} is damaged, or holds no weights of this program ({error}): name another file, or train "
                        "again") from error
    return Weights(path, tensors, tuple(names), mean, std, config, fingerprint, model, digests["sha256"])


def _check(valid: object, fault: str) -> None:
    """Raise ValueError unless `valid`."""
    if not valid:
        raise ValueError(fault)


def save_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a network's state_dict as safetensors, with `metadata`, each value as JSON. The same tensors and metadata give
    the same bytes."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = save(on_cpu, {key: json.dumps(value) for key, value in metadata.items()})
    # The library writes the header's keys in another order in every process.
    header, body = _split(data)
    header["__metadata__"]["sha256"] = json.dumps(hashlib.sha256(body).hexdigest())
    header["__metadata__"]["header_sha256"] = json.dumps(_header_digest(header))
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    write(path, len(text).to_bytes(8, "little") + text + body, durable=True)


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the tensors in the bytes of a safetensors file: 8 bytes that hold the header's length, JSON, the rest."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8:8 + length]), data[8 + length:]


def _header_digest(header: dict[str, Any]) -> str:
    """SHA-256 of a header, without that digest in it. Files from before it was kept have none."""
    metadata = {key: value for key, value in header["__metadata__"].items() if key != "header_sha256"}
    return hashlib.sha256(json.dumps(header | {"__metadata__": metadata}, sort_keys=True).encode()).hexdigest()
