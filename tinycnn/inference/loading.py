"""Load what testing, plotting and exporting a trained run need."""

import dataclasses
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from config import SETTINGS, Config, UserError, available_cores
from tinycnn.data.batches import Batches, Policies, make_batches, make_policies, resolve_batches
from tinycnn.data.dataset import DatasetMissing, Images
from tinycnn.data.loading import load_images
from tinycnn.inference.network import build_trained_net
from tinycnn.runs.checkpoint import read_places
from tinycnn.runs.weights import Weights, find_weights, read_weights
from tinycnn.training.machine import find_device, keep_freed_memory, memory_format


@dataclass(frozen=True)
class Trained:
    """Trained weights, their network in evaluation mode on `device`, and the images and policies of their run. `config` is the
    run's, with the `batches` and `threads` of this machine."""

    weights: Weights
    net: nn.Module
    images: Images
    policies: Policies
    config: Config
    device: torch.device

    def make_batches(self) -> Batches:
        """Make the batches of the run."""
        return make_batches(self.config, self.images, self.policies, self.device)


def load_trained(arguments: Namespace) -> Trained:
    """Load the run that the command line names. `arguments` has run (None: the newest finished run), log_dir, device, model (a
    model.py, or None) and data_dir (None: where the run had its images)."""
    device = find_device(arguments.device)
    weights = read_weights(find_weights(Path(arguments.log_dir), arguments.run))
    net = build_trained_net(weights, arguments.model)  # before any image is downloaded
    config = _restore_config(weights, arguments)
    try:
        images = load_images(config.dataset, config.data_dir).hold_out(config.validation)
    except DatasetMissing as error:
        tried = f", and could not be downloaded ({error.__cause__})" if error.__cause__ else ""
        raise UserError(f"the images that {weights.path} was trained on are not in {config.data_dir}{tried}: name the folder "
                        "that holds them with --data-dir") from error
    if not weights.trained_on(images):
        raise UserError(f"the images in {config.data_dir} are not those that {weights.path} was trained on: name their folder "
                        "with --data-dir")
    policies = make_policies(config, weights.mean, weights.std)
    config = dataclasses.replace(config, batches=resolve_batches(config.batches, policies, images, device))
    keep_freed_memory()
    torch.set_num_threads(config.threads)
    return Trained(weights, net.to(device).to(memory_format=memory_format(device)), images, policies, config, device)


def _restore_config(weights: Weights, arguments: Namespace) -> Config:
    """The settings of the run on this machine. Those that only training needs have their defaults."""
    data_dir = arguments.data_dir
    if data_dir is None:
        data_dir = read_places(weights.path.parent).get("data_dir", Config.data_dir)
    here = {"data_dir": data_dir, "log_dir": arguments.log_dir, "device": arguments.device, "threads": available_cores()}
    training = {"batches", "capture", "teacher", "deterministic", "instruction_set"}
    known = {name: value for name, value in weights.config.items() if name in SETTINGS.keys() - training}
    try:
        return Config(**(known | here))
    except UserError as error:
        raise UserError(f"{weights.path} was made by another version of this program ({error}): use it with that one, or train "
                        "again") from error
