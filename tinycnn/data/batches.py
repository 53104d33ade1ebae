"""Make the batches of a run: whole ones on the device, or image by image in worker processes."""

import copy
from collections.abc import Callable

import albumentations as A
import numpy as np
import torch

from augmentation import test_policy, train_policy, uncropped_policy
from config import SIDE, Config, UserError, uncropped_epochs
from tinycnn.data.dataset import Images
from tinycnn.data.device_batches import DeviceBatches
from tinycnn.data.device_policy import DevicePolicy, Unsupported
from tinycnn.data.tensors import as_array
from tinycnn.data.worker_batches import WorkerBatches

Batches = DeviceBatches | WorkerBatches
Policies = dict[str, A.Compose]


def make_policies(config: Config, mean: tuple[float, ...], std: tuple[float, ...]) -> Policies:
    """The policy of each split, and of training without a crop where an epoch has none. `mean` and `std` are each channel's, as
    fractions of 255."""
    normalization = test_policy(mean, std)
    image = np.arange(SIDE * SIDE * 3).reshape(SIDE, SIDE, 3).astype(np.uint8)
    made, expected = as_array(normalization(image=image)["image"]), (image / 255 - mean) / std
    if made.shape != expected.shape or not np.allclose(made, expected, rtol=1e-4, atol=1e-4):
        raise UserError("the test policy in augmentation.py must be A.Normalize(mean, std) alone: predict and export "
                        "do nothing else to an image")
    policies = {"train": train_policy(config, mean, std), "validation": normalization, "test": normalization}
    return policies | ({"uncropped": uncropped_policy(config, mean, std)} if uncropped_epochs(vars(config)) else {})


def check_policies(policies: Policies, images: Images) -> None:
    """Raise UserError unless each policy makes images of three channels and of one size from the first hundred images."""
    for name, policy in policies.items():
        tried = copy.deepcopy(policy)
        tried.set_random_seed(0)
        shapes = {as_array(tried(image=image.copy())["image"]).shape for image in images.train.images[:100]}
        if len(shapes) > 1 or any(len(shape) != 3 or shape[2] != 3 for shape in shapes):
            found = " and ".join(" x ".join(map(str, shape)) for shape in sorted(shapes))
            raise UserError(f"the policy of {name} images in augmentation.py makes images of {found}, but must make "
                            "height x width x 3, of one size")


def resolve_batches(batches: str, policies: Policies, images: Images, device: torch.device) -> str:
    """Resolve Config's `batches`: "auto" is "device" where every policy runs on whole batches, else "workers", and a line is
    printed that says why. "device" where it is impossible is an error."""
    if batches == "workers":
        return batches
    height, width = images.train.images.shape[1:3]
    try:
        if device.type == "mps":
            raise Unsupported("64-bit arithmetic")
        for policy in policies.values():
            DevicePolicy(policy, height, width, torch.device("cpu"))
    except Unsupported as reason:
        if batches == "device":
            raise UserError(f"--batches device can't run {reason} on whole batches on device {device}: use --batches workers, "
                            "or change the policy") from reason
        print(f"Batches are made by workers: {reason} can't run on whole batches on device {device}.")
        return "workers"
    return "device"


def make_batches(config: Config, images: Images, policies: Policies, device: torch.device,
                 share_of: Callable[[int], slice] = slice) -> Batches:
    """The batches of each policy, made as `config.batches` says: "device" or "workers". `share_of(n)` is the slice of a batch
    of n images that this process makes; by default all."""
    splits = {name: getattr(images, "train" if name == "uncropped" else name) for name in policies}
    if config.batches == "device":
        return DeviceBatches(splits, policies, config.batch_size, config.seed, device, share_of, config.kernels == "fused")
    return WorkerBatches(splits, policies, config.batch_size, config.seed, config.workers, device.type == "cuda",
                         share_of)
