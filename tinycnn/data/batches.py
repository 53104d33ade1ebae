"""The batches of a run, by the policies of augmentation.py: whole ones made on the device, or image by image in workers."""

import copy
import re
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import albumentations as A
import numpy as np
import torch

from config import SIDE, Config, UserError
from tinycnn.data.dataset import Dataset
from tinycnn.data.device_batches import DeviceBatches
from tinycnn.data.device_policy import DevicePolicy, Unsupported
from tinycnn.data.tensors import as_array
from tinycnn.data.worker_batches import WorkerBatches

Batches = DeviceBatches | WorkerBatches
TrainPolicy = Callable[[int], A.Compose]  # an epoch's
MakePolicy = Callable[..., A.Compose]  # augmentation.train_policy or test_policy
# What the usual arguments and transforms of older code are called now
NEW_NAMES = {
    "max_holes": "num_holes_range", "min_holes": "num_holes_range", "max_height": "hole_height_range",
    "min_height": "hole_height_range", "max_width": "hole_width_range", "min_width": "hole_width_range", "fill_value": "fill",
    "mask_fill_value": "fill_mask", "value": "fill", "mask_value": "fill_mask", "cval": "fill", "mode": "border_mode",
    "always_apply": "p=1", "var_limit": "std_range", "quality_lower": "quality_range", "quality_upper": "quality_range",
    "Cutout": "CoarseDropout"}
Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel, as fractions of 255


def make_batches(config: Config, dataset: Dataset, train_policy: MakePolicy, test_policy: MakePolicy,
                 device: torch.device, statistics: Statistics | None = None) -> Batches:
    """The batches of `dataset` on `device`, made as `config.batches` says: "device" or "workers". `statistics` are those of the
    training images, if no others are given. Raises UserError for policies that can't be used."""
    policies = make_policies(config, statistics or dataset.statistics, train_policy, test_policy)
    for epoch in (0, config.epochs - 1):
        _check_size(f"training images of epoch {epoch}", policies[0](epoch), dataset)
    _check_size("test images", policies[1], dataset)
    make: Any = DeviceBatches
    if config.batches != "device":
        make = partial(WorkerBatches, workers=config.workers)
    return make(dataset, *policies, config, device)


def make_policies(config: Config, statistics: Statistics, train_policy: MakePolicy,
                  test_policy: MakePolicy) -> tuple[TrainPolicy, A.Compose]:
    """The policy of the training images, a function of the epoch, and that of all others. Raises UserError unless the latter
    only normalizes."""
    mean, std = statistics
    normalization = _make_policy(test_policy, mean, std)
    image = np.arange(SIDE * SIDE * 3).reshape(SIDE, SIDE, 3).astype(np.uint8)
    made, expected = as_array(normalization(image=image)["image"]), (image / 255 - mean) / std
    if made.shape != expected.shape or not np.allclose(made, expected, rtol=1e-4, atol=1e-4):
        raise UserError("test_policy in augmentation.py must be A.Normalize(mean, std) alone: predict and export do nothing "
                        "else to an image")
    return partial(_make_policy, train_policy, config, mean=mean, std=std), normalization


def _make_policy(make: Callable[..., A.Compose], *arguments: Any, **keywords: Any) -> A.Compose:
    """Call `make`. Raises UserError for what Albumentations doesn't have, though it only warns of arguments."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", r"Argument\(s\)", UserWarning)
        try:
            return make(*arguments, **keywords)
        except (UserWarning, AttributeError, ValueError) as error:
            if not (problem := _refused(error)):
                raise
            line = traceback.extract_tb(error.__traceback__)[1].lineno
            raise UserError(f"augmentation.py, line {line}: in Albumentations {A.__version__} {problem}") from error


def _refused(error: Exception) -> str:
    """What Albumentations refuses: an argument, a transform, or a value. Empty for other errors."""
    if isinstance(error, UserWarning):
        [(names, transform)] = re.findall(r"'(.*)' .* (\w+)$", str(error))
        return f"{transform} takes no {', '.join(map(_with_new_name, names.split(', ')))}"
    if isinstance(error, AttributeError):
        return f"there is no {_with_new_name(str(error.name))}" if error.obj is A else ""
    is_value = "validation error" in str(error)  # of pydantic, on several lines
    return ": ".join(map(str.strip, str(error).split(" [type")[0].split("\n")[1:])) if is_value else ""


def _with_new_name(name: str) -> str:
    return f"{name} (now {NEW_NAMES[name]})" if name in NEW_NAMES else name


def _check_size(name: str, policy: A.Compose, dataset: Dataset) -> None:
    """Raise UserError unless the policy makes images of three channels and of one size from the first hundred images."""
    tried = copy.deepcopy(policy)
    tried.set_random_seed(0)
    shapes = {as_array(tried(image=image.copy())["image"]).shape for image in dataset.train.images[:100]}
    if len(shapes) > 1 or any(len(shape) != 3 or shape[2] != 3 for shape in shapes):
        found = " and ".join(" x ".join(map(str, shape)) for shape in sorted(shapes))
        raise UserError(f"the policy of {name} in augmentation.py makes images of {found}, but must make height x width x 3, "
                        "of one size")


def choose_batches(config: Config, dataset: Dataset, policies: tuple[TrainPolicy, A.Compose], device: torch.device) -> str:
    """"device" or "workers", for Config's `batches`: "auto" is "device" where every policy runs on whole batches, else
    "workers", and a line is printed that says why. Raises UserError where "device" is impossible."""
    if config.batches == "workers":
        return "workers"
    height, width = dataset.train.images.shape[1:3]
    try:
        if device.type == "mps":
            raise Unsupported("64-bit arithmetic")
        for policy in (policies[0](0), policies[0](config.epochs - 1), policies[1]):
            DevicePolicy(policy, height, width, torch.device("cpu"))
    except Unsupported as reason:
        if config.batches == "device":
            raise UserError(f"--batches device can't run {reason} on whole batches on device {device}: use --batches workers, "
                            "or change the policy") from reason
        print(f"Batches are made by workers: {reason} can't run on whole batches on device {device}.")
        return "workers"
    return "device"
