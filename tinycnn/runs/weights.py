"""Trained weights: safetensors files with what is needed to use them."""

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from config import Config, UserError, net_settings
from model import Net
from tinycnn.data.dataset import Images
from tinycnn.network.identity import network_identity
from tinycnn.runs.files import write
from tinycnn.runs.finding import PROGRAM, find_finished
from tinycnn.runs.record import FINAL, MODEL


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
    identity: str | None  # of the network (tinycnn.network.identity); None in files from before it was kept
    digest: str  # SHA-256 of the tensors

    @property
    def name(self) -> str:
        """The name of these weights in logs, whatever their path: run, file, first digits of the SHA-256."""
        file = "" if self.path.name == FINAL else f"/{self.path.name}"
        return f"{self.path.resolve().parent.name}{file}:{self.digest[:8]}"

    def trained_on(self, images: Images) -> bool:
        """Whether these weights were trained on `images`, as far as the file tells."""
        if self.fingerprint:
            return self.fingerprint == images.fingerprint
        pairs = zip((*self.mean, *self.std), itertools.chain(*images.statistics), strict=True)
        return self.class_names == images.class_names and all(math.isclose(*pair) for pair in pairs)

    def build_net(self) -> nn.Module:
        """The network of these weights, on the CPU. Raises UserError where model.py has another one."""
        net = Net(len(self.class_names), **net_settings(self.config))
        self.check_identity(net, MODEL, "name a run of the present network, or undo the edits made since")
        self.load_into(net)
        return net

    def check_identity(self, net: nn.Module, source: str, remedy: str) -> None:
        """Raise UserError, which ends with the `remedy`, where these weights record the identity of another network than `net`,
        which the file `source` defines."""
        if self.identity and self.identity != network_identity(net):
            raise UserError(f"{self.path} holds weights of another network than that of {source}: {remedy}")

    def load_into(self, net: nn.Module, remedy: str = "undo the edits made since, or train again") -> None:
        """Copy these weights into `net`. Raises UserError, which ends with the `remedy`, where they don't fit."""
        try:
            net.load_state_dict(self.tensors)
        except RuntimeError as error:
            raise UserError(f"{self.path} does not hold weights of the network in model.py for {len(self.class_names)} classes "
                            f"({' '.join(str(error).split())[:200]}): {remedy}") from error


def find_weights(log_dir: Path, name: str | None) -> Path:
    """The .safetensors file that is named, or the final weights of the newest finished run that matches `name`."""
    if name is None or Path(name).suffix != ".safetensors":
        return find_finished(log_dir, name) / FINAL
    path = next((path for path in (Path(name), log_dir / "runs" / name, PROGRAM / name) if path.is_file()), None)
    if path is None:
        raise UserError(f"there is no file {name}, also not below {log_dir / 'runs'}: name a run, or a .safetensors file "
                        "of one")
    return path


def find_teachers(config: Config) -> list[Weights]:
    """The weights of the teachers that the config names."""
    try:
        return [read_weights(find_weights(Path(config.log_dir), name)) for name in config.teacher.split(",") if name]
    except UserError as error:
        raise UserError(f"--teacher: {error}") from error


def check_teachers(teachers: Sequence[Weights], images: Images) -> None:
    """Raise UserError where a teacher has seen other images than this run's, so it may know those that are held out."""
    for teacher in teachers:
        if not teacher.trained_on(images):
            raise UserError(f"teacher {teacher.path} was trained on other images than this run's, or held others out: name "
                            "one of the same dataset and the same --validation")


def read_weights(path: Path) -> Weights:
    """The weights in a file that save_weights wrote."""
    try:
        data = path.read_bytes()
        tensors, (header, body) = load(data), _split(data)
        metadata = {key: json.loads(value) for key, value in header.get("__metadata__", {}).items()}
        digest = hashlib.sha256(body).hexdigest()
        digests = {"sha256": digest, "header_sha256": _header_digest(header)}
        if any(metadata.get(key, found) != found for key, found in digests.items()):
            raise ValueError("its checksum is wrong")
        if any(tensor.isnan().any() for tensor in tensors.values()):
            raise ValueError("some of its weights are not numbers")
        mean, std = (tuple(map(float, metadata[name])) for name in ("mean", "standard_deviation"))
        if not len(mean) == len(std) == 3 or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
            raise ValueError("its mean and standard deviation are not those of three channels")
        config = net_settings(vars(Config())) | metadata["config"]  # older files have fewer settings
        Config(**net_settings(config))
        class_names = metadata["class_names"]
        if not isinstance(class_names, list) or not all(isinstance(name, str) for name in class_names):
            raise ValueError("its class names are no list of names")
        for key in ("images", "network"):
            if not isinstance(metadata.get(key), str | None):
                raise ValueError(f"its {key} is no text")
        return Weights(path, tensors, tuple(class_names), mean, std, config, metadata.get("images"), metadata.get("network"),
                       digest)
    except (UserError, SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged, or holds no weights of this program ({error}): name another file, or train "
                        "again") from error


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
