"""Load what testing, plotting and exporting a trained run need."""

import dataclasses
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from augmentation import test_policy, train_policy
from config import SETTINGS, Config, UserError
from tinycnn.cores import default_threads
from tinycnn.data.batches import choose_batches, make_batches, make_policies
from tinycnn.data.dataset import Dataset, DatasetMissing
from tinycnn.data.loading import load_dataset
from tinycnn.inference.classifier import check_finite
from tinycnn.runs.checkpoint import read_local_paths
from tinycnn.runs.record import present_names
from tinycnn.runs.weights import Weights, find_weights, read_weights
from tinycnn.training.machine import autocast, find_device, keep_freed_memory, move


@dataclass(frozen=True)
class Trained:
    """Trained weights, their network in evaluation mode on `device`, and the dataset of their run. `config` is the run's, with
    the `batches` and `threads` of this machine."""

    weights: Weights
    net: nn.Module
    dataset: Dataset
    config: Config
    device: torch.device

    @torch.no_grad()
    def predict(self, split: str = "test", mirrored: bool = False) -> tuple[Tensor, Tensor]:
        """The network's logits, float32 N x classes, and the labels, int64 N, of the images of a split, or of their mirror
        images; on the CPU. Raises UserError where a logit is not finite."""
        statistics, outputs = (self.weights.mean, self.weights.std), []
        self.net.eval()
        with make_batches(self.config, self.dataset, train_policy, test_policy, self.device, statistics) as batches:
            for images, labels in batches.test() if split == "test" else batches.validation():
                with autocast(self.device):
                    outputs.append((self.net(images.flip(3) if mirrored else images).float(), labels))
        logits, labels = (torch.cat(parts).cpu() for parts in zip(*outputs, strict=True))
        check_finite(logits)
        return logits, labels


def load_trained(arguments: Namespace) -> Trained:
    """Load the run that the command line names. `arguments` has run (None: the newest finished run), log_dir, device, model (a
    model.py, or None) and data_dir (None: where the run had its images)."""
    device = find_device(arguments.device)
    weights = read_weights(find_weights(Path(arguments.log_dir), arguments.run))
    net = weights.build_net(arguments.model)  # before any image is downloaded
    config = _restore_config(weights, arguments)
    try:
        dataset = load_dataset(config.dataset, config.data_dir).hold_out(config.validation)
    except DatasetMissing as error:
        tried = f", and could not be downloaded ({error.__cause__})" if error.__cause__ else ""
        raise UserError(f"the images that {weights.path} was trained on are not in {config.data_dir}{tried}: name the folder "
                        "that holds them with --data-dir") from error
    if not weights.trained_on(dataset):
        raise UserError(f"the images in {config.data_dir} are not those that {weights.path} was trained on: name their folder "
                        "with --data-dir")
    policies = make_policies(config, (weights.mean, weights.std), train_policy, test_policy)
    config = dataclasses.replace(config, batches=choose_batches(config, dataset, policies, device))
    keep_freed_memory()
    torch.set_num_threads(config.threads)
    return Trained(weights, move(net, device), dataset, config, device)


def _restore_config(weights: Weights, arguments: Namespace) -> Config:
    """The settings of the run on this machine. Those that only training needs have their defaults."""
    data_dir = arguments.data_dir or read_local_paths(weights.path.parent).get("data_dir", Config.data_dir)
    here = {"data_dir": data_dir, "log_dir": arguments.log_dir, "device": arguments.device, "threads": default_threads()}
    training = {"batches", "capture", "init", "teacher", "deterministic", "instruction_set"}
    known = {name: value for name, value in present_names(weights.config).items() if name in SETTINGS.keys() - training}
    try:
        return Config(**(known | here))
    except UserError as error:
        raise UserError(f"{weights.path} was made by another version of this program ({error}): use it with that one, or train "
                        "again") from error
