"""Compare the fused policy with DevicePolicy, without a GPU. Run with TRITON_INTERPRET=1, which counts from Triton's import on.

Prints, as JSON, the names of all policies, and of those whose images, or their order in memory, differ.
"""

import json

import albumentations as A
import cv2
import numpy as np
import torch

from augmentation import train_policy
from config import RECIPES, Config
from tinycnn.data.device_policy import DevicePolicy
from tinycnn.kernels import policy as fused_policy
from tinycnn.kernels.policy import FusedPolicy

fused_policy.PIXELS = 128  # so that several programs make an image, the last one in part
MEAN, STD, CPU = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), torch.device("cpu")


def all_transforms(border: int) -> A.Compose:
    """Each transform, far from its defaults, with pixels of every border."""
    return A.Compose([
        A.HorizontalFlip(p=0.5),
        A.Affine(rotate=(-180, 180), scale=(0.5, 2), shear=(-20, 20), translate_percent=(-0.5, 0.5), border_mode=border,
                 fill=(3, 200, 77), p=0.8),
        A.PadIfNeeded(30, 25, border_mode=border, fill=(255, 0, 9)), A.RandomCrop(19, 23),
        A.CoarseDropout(num_holes_range=(1, 3), hole_height_range=(2, 9), hole_width_range=(3, 5), fill=(1, 2, 255), p=0.9),
        A.Normalize(MEAN, STD)])


def of_config(epoch: int = 0, **settings) -> A.Compose:
    return train_policy(Config(**settings | {"teacher": ""}), epoch, MEAN, STD)


policies = {f"{name}, epoch {epoch}": of_config(epoch, **RECIPES[name])
            for name, epoch in (("baseline", 0), ("strong", 0), ("fast", 0), ("fast", 29))}
policies |= {f"border {border}": all_transforms(border)
             for border in (cv2.BORDER_CONSTANT, cv2.BORDER_REFLECT, cv2.BORDER_REFLECT_101)}
pad = A.PadIfNeeded(40, 40, border_mode=cv2.BORDER_CONSTANT, fill=9)
policies |= {"flip and pad": A.Compose([A.HorizontalFlip(p=0.5), pad]), "nothing": A.Compose([])}
different = []
for name, policy in policies.items():
    height, width = (16, 12) if name.startswith("border") else (32, 32)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (12, height, width, 3), np.uint8))
    plain, fused = (kind(policy, height, width, CPU) for kind in (DevicePolicy, FusedPolicy))
    uniform = torch.rand(len(images), plain.draws, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    chosen = torch.tensor([7, 2])
    expected, made = (each.apply(images, chosen, each.sample(uniform)) for each in (plain, fused))
    if not torch.equal(made, expected) or made.stride() != expected.stride():
        different.append(name)
print(json.dumps({"policies": list(policies), "different": different}))
