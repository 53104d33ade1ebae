"""The inputs of a run: config, dataset, trained weights, device; and its record."""

import contextlib
import importlib.metadata
import io
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from augmentation import test_policy, train_policy
from config import Config, UserError
from tinycnn import startup
from tinycnn.data.batches import choose_batches, make_policies
from tinycnn.data.dataset import Dataset
from tinycnn.data.loading import load_dataset, resolve_auto
from tinycnn.processes import world
from tinycnn.runs.finding import refuse_run_folder
from tinycnn.runs.record import Record
from tinycnn.runs.tensorboard import check_tensorboard
from tinycnn.runs.weights import NamedWeights, Weights, check_held_out, load_weights, recorded_names
from tinycnn.sources import present_sources
from tinycnn.training.machine import describe_device, instruction_set, load_libraries, prepare, threads_of

PATHS = ("data_dir", "log_dir")  # paths on this machine, left out of a run's records
PACKAGES = {"torch": "torch", "cv2": "opencv-python-headless", "numpy": "numpy",
            "albumentations": "albumentations"}


@dataclass(frozen=True)
class Inputs:
    """What a run begins with. In `config`, what was left to the program ("auto", 0 threads) is decided; of `dataset`, the
    validation images are held out."""

    config: Config
    dataset: Dataset
    weights: NamedWeights
    device: torch.device

    @property
    def init(self) -> Weights | None:
        """The weights to begin with."""
        return next(iter(self.weights["init"]), None)

    @property
    def teachers(self) -> list[Weights]:
        """The weights of the teachers."""
        return self.weights["teacher"]


def load_inputs(config: Config, dataset: Dataset | None = None, weights: NamedWeights | None = None) -> Inputs:
    """Load what `config` names and prepare this process; a sweep passes the dataset, and a cluster the weights. Raises
    UserError for what the user can change."""
    startup.mark("packages")
    refuse_run_folder(Path(config.log_dir))
    if config.tensorboard:
        check_tensorboard()
    # before any image is downloaded
    weights = weights or world.broadcast(lambda: load_weights(config))
    device = prepare(config)
    load_libraries(device)
    dataset = dataset or _load_in_turn(config)
    startup.mark("device and images")
    config = resolve_auto(config, dataset)
    whole, dataset = dataset, dataset.hold_out(config.validation)
    check_held_out(weights, whole, dataset)
    if config.batch_size < world.size:
        raise UserError(f"--batch-size is {config.batch_size}, but the run has {world.size} processes, which share each batch: "
                        "give it at least as many images")
    batches = choose_batches(config, dataset, make_policies(config, dataset.statistics, train_policy, test_policy), device)
    return Inputs(replace(config, batches=batches, threads=threads_of(config)), dataset, weights, device)


def _load_in_turn(config: Config) -> Dataset:
    """Load the config's images, in one process of each machine first, so that the others find them downloaded or decoded. The
    first process resolves "auto"."""
    if world.size == 1:
        return load_dataset(config.dataset, config.data_dir)
    dataset = load_dataset(config.dataset, config.data_dir) if world.is_first else None
    kind = world.broadcast(lambda: dataset.kind if dataset else "")
    for turn in (world.local_rank == 0, world.local_rank > 0):
        if turn and dataset is None:
            with contextlib.redirect_stderr(io.StringIO()):  # the first process has told what there is to tell
                dataset = load_dataset(kind, config.data_dir)
        world.sum(torch.zeros(1))  # a barrier; gloo's all_reduce of an empty tensor doesn't wait
    assert dataset is not None
    fingerprint = dataset.fingerprint
    if world.broadcast(lambda: fingerprint) != fingerprint:
        raise UserError(f"the images in {config.data_dir} are not those of the first process: all machines need the same")
    return dataset


def make_record(inputs: Inputs, network: Mapping[str, Any], number: int) -> Record:
    """The content of config.json of a new run. `network` is that of describe_network; `number` counts the runs of a log
    folder."""
    config, dataset = inputs.config, inputs.dataset
    mean, std = dataset.statistics
    return {
        "number": number,
        "config": {key: value for key, value in asdict(config).items() if key not in PATHS} | recorded_names(inputs.weights),
        "network": dict(network),
        "sources": present_sources(),
        "dataset": {"kind": dataset.kind, "class_names": list(dataset.class_names), "sha256": dataset.fingerprint,
                    "train": len(dataset.train), "validation": len(dataset.validation), "test": len(dataset.test),
                    "mean": list(mean), "deviation": list(std)},
        "machine": {"device": describe_device(inputs.device), "instruction_set": instruction_set(),
                    **({"processes": world.size} if world.size > 1 else {}), "system": platform.system()},
        "versions": {"python": platform.python_version()} | {
            name: version for name, package in PACKAGES.items() if (version := _installed(package))},
        "notes": [],
    }


def _installed(package: str) -> str | None:
    """The version in the package's metadata, which is there without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
