"""Every setting of a run: name, default, meaning, unit, range; and the recipes.

Edit a default here and run `python main.py` again, or give the setting as a flag of the same name:
`python main.py --batch-size 256 --nesterov`. The text beside a setting is the help of its flag.
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

SIDE = 32  # pixels: the height and width of every image


class UserError(Exception):
    """An error that the user can fix. The program ends with its message as one line on stderr and exit status 2."""


def setting(default: Any, meaning: str, low: float | None = None, high: float | None = None,
            choices: tuple[str, ...] = ()) -> Any:
    """Declare a field of Config with the metadata of its flag and its check. The range includes `low` and `high`."""
    default = os.path.expanduser(default) if isinstance(default, str) else default
    return dataclasses.field(default=default, metadata={"help": meaning, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of one run. A value of the wrong type or out of its range raises UserError."""

    # data
    dataset: str = setting("auto", "images: cifar10; folder: your own; synthetic: built in; auto: cifar10, or, without "
                           "--data-dir, where it is not there and can't be downloaded, a demonstration on synthetic",
                           choices=("auto", "cifar10", "folder", "synthetic"))
    data_dir: str = setting("data", "folder with cifar-10-batches-py, or with train/<class>/* and test/<class>/*")
    batch_size: int = setting(128, "images per step", low=1, high=65536)
    validation: int = setting(0, "training images to hold out, equally many of each class, the same for every seed; choose "
                              "settings by the accuracy on them: the test images are evaluated once, after the last epoch",
                              low=0, high=10**7)
    workers: int = setting(2, "processes that augment images (--batches workers); changes speed, never results",
                           low=0, high=256)
    batches: str = setting("auto", "where batches are made: device: whole batches, on the device that trains; workers: image "
                           "by image, in processes; auto: device if the augmentation can run there. The two "
                           "draw other random numbers from the same distributions", choices=("auto", "device", "workers"))

    # augmentation of training images
    flip_p: float = setting(0.5, "probability of a horizontal flip", low=0, high=1)
    affine_p: float = setting(0.5, "probability of a shift, scaling and rotation, border reflected", low=0, high=1)
    shift: float = setting(0.09375, "largest shift, as a fraction of the image's side; each shift is rounded towards zero to "
                           "whole pixels, so a limit of 3 pixels reaches 2", low=0, high=1)
    scale: float = setting(0.1, "largest scaling up or down, as a fraction of the size", low=0, high=0.9)
    rotate: float = setting(15.0, "largest rotation, degrees either way", low=0, high=180)
    crop_padding: int = setting(0, "reflection padding before a random crop, pixels", low=0, high=16)
    crop_size: int = setting(32, "side of the random crop, pixels; 24 costs 56 % of the compute", low=16, high=32)
    whole_images_share: float = setting(0.0, "share of the epochs, the last ones, that train on whole images, without a crop",
                                        low=0, high=1)
    coarse_dropout_p: float = setting(0.5, "probability of one square hole filled with the dataset's mean", low=0, high=1)
    coarse_dropout_size: int = setting(16, "side of the hole, pixels", low=1, high=32)

    # optimization
    epochs: int = setting(80, "passes over the training images", low=1, high=100_000)
    lr: float = setting(0.01, "learning rate of SGD: the highest of the schedule", low=1e-12, high=1000)
    min_lr: float = setting(1e-6, "learning rate after the last epoch, of cosine and one-cycle", low=0, high=1000)
    schedule: str = setting("cosine", "learning rate by epoch: cosine: from lr down to min_lr; one-cycle: up to lr for three "
                            "tenths of the steps, then down to min_lr, by step; step: a tenth after half and after three "
                            "quarters of the epochs; constant", choices=("cosine", "one-cycle", "step", "constant"))
    warmup: int = setting(0, "first epochs, in which the learning rate grows linearly to lr; one-cycle has its own", low=0,
                          high=100_000)
    momentum: float = setting(0.9, "momentum of SGD", low=0, high=0.9999)
    nesterov: bool = setting(False, "use Nesterov momentum")
    weight_decay: float = setting(5e-4, "L2 penalty on all parameters, biases and BatchNorm included", low=0, high=10)
    label_smoothing: float = setting(0.0, "label smoothing of the cross-entropy loss", low=0, high=0.99)

    # trained weights
    init: str = setting("", "trained weights to begin with: a finished run, as for --teacher, or a .safetensors file; a layer "
                        "that doesn't fit, such as the head for other classes, begins anew; empty: all begin anew")
    teacher: str = setting("", "finished run to distill into the new network: its --name, its folder's name under logs/runs, "
                           "or a path; several, separated by commas: the mean of their predictions (in a sweep: A+B); empty: "
                           "train on labels alone")
    teacher_share: float = setting(0.9, "weight of the distillation loss; that of the label loss is 1 minus it", low=0, high=1)
    temperature: float = setting(4.0, "temperature of the distillation loss: both networks' logits are divided by it",
                                 low=0.1, high=100)

    # model
    width: int = setting(1, "channel multiplier: 1 is the network of 155,434 parameters", low=1, high=16)
    dropout: float = setting(0.0, "dropout probability before the classifier; 0 leaves the layer out", low=0, high=0.99)

    # run
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    capture: str = setting("auto", "record a training step as a CUDA graph and replay it: on, off, or auto: on CUDA with "
                           "PyTorch 2.13 or newer, in one process, with batches made on the device, after a check that the "
                           "replay computes the same",
                           choices=("auto", "on", "off"))
    kernels: str = setting("pytorch", "kernels of captured steps and of augmentation: pytorch; or fused: Triton kernels of "
                           "this program, if a check at the start finds them correct and faster; compiling them takes "
                           "half a minute, once",
                           choices=("pytorch", "fused"))
    deterministic: bool = setting(False, "use deterministic kernels only, so that CUDA gives the same bits in every run")
    instruction_set: str = setting("auto", "CPU instructions to use: auto: all the processor has; avx2: at most AVX2, for the "
                                   "same bits on newer processors", choices=("auto", "avx2"))
    seed: int = setting(0, "seed of all random numbers", low=0, high=2**32 - 1)
    threads: int = setting(0, "CPU threads of PyTorch; 0: one for each core", low=0, high=1024)
    name: str = setting("", "name of the run, appended to the date in its folder's name")
    pictures: bool = setting(True, "draw pictures at the end of the run; python main.py plot draws them at any time")
    tensorboard: bool = setting(False, "also write TensorBoard event files")
    log_dir: str = setting("logs", "folder for model_accuracy.log, torch_summary.log and the runs' folders")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, check_setting(field, getattr(self, field.name)))
        if self.warmup and (self.schedule == "one-cycle" or self.warmup >= self.epochs):
            raise UserError(f"--warmup is {self.warmup}, but must be less than --epochs, {self.epochs}, and 0 with --schedule "
                            "one-cycle, which has its own")
        if self.min_lr > self.lr:
            raise UserError(f"--min-lr is {self.min_lr}, but must not exceed --lr, {self.lr}: lower --min-lr")
        if self.nesterov and self.momentum == 0:
            raise UserError("--nesterov is on, but --momentum is 0.0: raise --momentum, or leave --nesterov out")
        if self.deterministic and self.kernels == "fused":
            raise UserError("--kernels is fused, which timing may choose, but --deterministic asks for the same bits in every "
                            "run: leave one of them out")
        for name in ("data_dir", "log_dir"):
            if not getattr(self, name):
                raise UserError(f"{flag(name)} is empty: name a folder")
        if self.teacher and not all(self.teacher.split(",")):
            raise UserError(f"--teacher is {self.teacher!r}: put one comma between two names, and none at the end")
        if "," in self.init:
            raise UserError(f"--init is {self.init!r}: a run begins with the weights of one, so name one")
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", self.device):
            raise UserError(f"--device is {self.device!r}, but must be one of auto, cpu, cuda, cuda:N, mps")
        if not re.fullmatch(r"[A-Za-z0-9_.+=-]{0,100}", self.name) or self.name.endswith(".safetensors"):
            raise UserError(f"--name is {self.name!r}, but must be at most 100 of the letters A to Z, digits and _.=-, "
                            "and must not end in .safetensors")


SETTINGS = {field.name: field for field in dataclasses.fields(Config)}
ALIASES = {"uncropped_share": "whole_images_share"}  # earlier names of settings, for flags and for the records of earlier runs
# Settings that can't vary in a sweep and that `compare` ignores: they don't change results, or only as another seed does.
# Images are compared by their fingerprint
NOT_COMPARED = ("dataset", "data_dir", "log_dir", "device", "threads", "workers", "batches", "capture", "kernels",
                    "deterministic", "instruction_set", "name", "pictures", "tensorboard")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """": did you mean X?" with the nearest of the `known` words, or an empty text."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    return f": did you mean {near[0]}?" if near else ""


def flag(name: str) -> str:
    """The flag of a setting: --batch-size of batch_size."""
    return "--" + name.replace("_", "-")


def net_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `settings` that the network is built from, as arguments of Net. Add yours."""
    return {name: settings[name] for name in ("dropout", "width")}


def check_setting(field: dataclasses.Field, value: Any) -> Any:
    """Return `value`, a whole number as a float where the field is one. Raises UserError unless it has the field's type and
    lies in its range."""
    low, high, choices = field.metadata["low"], field.metadata["high"], field.metadata["choices"]
    if field.type is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not field.type:
        raise UserError(f"{flag(field.name)} is {value!r}, but must be of type {field.type.__name__}")  # type: ignore[union-attr]
    if choices and value not in choices:
        raise UserError(f"{flag(field.name)} is {value!r}, but must be one of {', '.join(choices)}"
                        + did_you_mean(value, choices))
    if low is not None and not low <= value <= high:  # nan is in no range
        raise UserError(f"{flag(field.name)} is {value}, but must lie in {low} to {high}")
    return value


# LEARNINGS.md tells how these were chosen. By itself, only the learning rate made a significant difference
BETTER: dict[str, Any] = {"lr": 0.1, "min_lr": 0.0, "nesterov": True, "affine_p": 0.0}

# 24 x 24 of 36 x 36 pixels, then whole images for the last fifth of the epochs
SMALL_CROPS: dict[str, Any] = {"crop_padding": 2, "crop_size": 24, "whole_images_share": 0.2}

# Named sets of changes to the defaults above: `python main.py --recipe NAME`
RECIPES: dict[str, dict[str, Any]] = {
    "baseline": {},
    # A quarter of the baseline's compute
    "fast": BETTER | SMALL_CROPS | {"epochs": 30, "weight_decay": 1e-3, "coarse_dropout_p": 0.0},
    # The baseline's compute: 24 x 24 of 40 x 40 pixels, then whole images for the last tenth; a hole in every other image
    "strong": BETTER | {"epochs": 132, "crop_padding": 4, "crop_size": 24, "whole_images_share": 0.1, "coarse_dropout_size": 8},
    # More than twice strong's epochs, taught by a committed network of four times the width that saw the same crops
    "best": BETTER | SMALL_CROPS | {"epochs": 300, "coarse_dropout_size": 8, "teacher": "logs/reference/wide/seed-0"},
}
