"""Trained weights: saved, found by the name of their run, and read with what is needed to use them."""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from config import Config, UserError
from training.images import Images
from training.records import FINAL, SUMMARY, find_runs, named_runs, write

MakeNet = Callable[[int, float, int], nn.Module]  # model.Net: number of classes, dropout and width in


@dataclass(frozen=True)
class Weights:
    """A .safetensors file of a run. `mean` and `deviation` are each channel's, as fractions of 255; `config` is what the run's
    config.json holds under that name."""

    path: Path
    tensors: dict[str, Tensor]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    config: dict[str, Any]
    fingerprint: str | None  # of the images trained on; None in files from before it was kept
    digest: str  # SHA-256 of the tensors

    @property
    def name(self) -> str:
        """How logs call these weights, wherever they lie: run, file, beginning of the SHA-256."""
        file = "" if self.path.name == FINAL else f"/{self.path.name}"
        return f"{self.path.resolve().parent.name}{file}:{self.digest[:8]}"

    def trained_on(self, images: Images) -> bool:
        """Whether `images` are those that these weights were trained on, as far as can be told."""
        if self.fingerprint:
            return self.fingerprint == images.fingerprint()
        pairs = zip((*self.mean, *self.deviation), itertools.chain(*images.statistics()), strict=True)
        return self.class_names == images.class_names and all(math.isclose(*pair) for pair in pairs)

    def network(self, make_net: MakeNet) -> nn.Module:
        """The network with these weights. Raises UserError where they are another network's."""
        net = make_net(len(self.class_names), self.config["dropout"], self.config["width"])
        self.load_into(net)
        return net

    def load_into(self, net: nn.Module) -> None:
        """Give `net` these weights. Raises UserError where they are another network's."""
        try:
            net.load_state_dict(self.tensors)
        except RuntimeError as error:
            said = " ".join(str(error).split())
            raise UserError(f"{self.path} does not hold weights of the network in model.py for {len(self.class_names)} classes "
                            f"({said[:200]}): undo the edits made since, or train anew") from error


def find(log_dir: Path, name: str | None) -> Path:
    """The weights of the newest finished run that a person calls `name`, or of any, where it is None: those at its end; or the
    .safetensors file that is named itself. Raises UserError."""
    if name is None:
        folder = next(filter(_finished, find_runs(log_dir)), None)
        if folder is None:
            raise UserError(f"there is no finished run in {log_dir / 'runs'}: train one, or name a run, such as "
                            "logs/reference, or a .safetensors file")
        return folder / FINAL
    if Path(name).suffix == ".safetensors":
        file = next((path for path in (Path(name), log_dir / "runs" / name) if path.is_file()), None)
        if file is None:
            raise UserError(f"there is no file {name}, also not below {log_dir / 'runs'}: name a run, or a .safetensors file "
                            "of one")
        return file
    folders = named_runs(log_dir, name)
    folder = next(filter(_finished, folders), folders[0])
    if not (folder / SUMMARY).exists():
        raise UserError(f"{name} is no finished run: go on with it (--resume), or name another one")
    if not (folder / FINAL).exists():
        raise UserError(f"run {name} has no {FINAL}: name one that has")
    return folder / FINAL


def _finished(folder: Path) -> bool:
    return (folder / SUMMARY).exists() and (folder / FINAL).exists()


def read(path: Path) -> Weights:
    """The weights in a file that save_weights wrote. Raises UserError where it is damaged or foreign."""
    try:
        with safe_open(path, "pt") as file:
            about = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is no dict)
        sha256 = digest(path.read_bytes())
        if about.get("sha256", sha256) != sha256:
            raise ValueError("its checksum is wrong")
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError("not all its weights are finite")
        mean, deviation = (tuple(map(float, about[name])) for name in ("mean", "standard_deviation"))
        if not len(mean) == len(deviation) == 3:
            raise ValueError("its mean and standard deviation are not those of three channels")
        config = {"dropout": 0.0, "width": 1} | about["config"]
        Config(dropout=config["dropout"], width=config["width"])
        class_names = tuple(map(str, about["class_names"]))
        return Weights(path, tensors, class_names, mean, deviation, config, about.get("images"), sha256)
    except (UserError, SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged, or holds no weights of this program ({error}): name another file, or train "
                        "anew") from error


def save_weights(path: Path, net: nn.Module, about: Mapping[str, Any]) -> None:
    """Write the weights as safetensors, with `about`, each value as JSON, as metadata. The same weights and metadata give
    the same bytes."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    data = save(tensors, {key: json.dumps(value) for key, value in about.items()})
    # The library writes the header's keys in another order in every process: 8 bytes that hold its length, then JSON.
    length = int.from_bytes(data[:8], "little")
    content = json.loads(data[8:8 + length])
    content["__metadata__"]["sha256"] = json.dumps(digest(data))
    header = json.dumps(content, sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    write(path, len(header).to_bytes(8, "little") + header + data[8 + length:], durable=True)


def digest(data: bytes) -> str:
    """SHA-256 of the tensors in the bytes of a safetensors file: of all that stands behind its header."""
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little"):]).hexdigest()
