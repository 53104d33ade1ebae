"""python main.py plot: draw the pictures of a finished run."""

import re
from argparse import Namespace
from contextlib import closing
from pathlib import Path

import albumentations as A
import torch
from torch import nn

from config import UserError
from tinycnn.data.batches import Batches
from tinycnn.data.dataset import Images
from tinycnn.inference.loading import load_trained
from tinycnn.network.receptive_field import convolutions
from tinycnn.runs.plots import draw_all
from tinycnn.runs.record import read_run
from tinycnn.training.epoch import predict


def run(arguments: Namespace) -> None:
    """Draw the pictures of the run into its folder, from its weights and its images."""
    if arguments.run and arguments.run.endswith(".safetensors"):
        raise UserError(f"{arguments.run} is no run: pictures are drawn of a run; name its folder")
    trained = load_trained(arguments)
    with closing(trained.make_batches()) as batches:
        draw_pictures(trained.net, batches, trained.images, trained.policies["train"], trained.device,
                      trained.weights.path.parent)


def draw_pictures(net: nn.Module, batches: Batches, images: Images, policy: A.Compose, device: torch.device,
                  folder: Path) -> None:
    """Draw all pictures of the finished run in `folder`. `policy` is that of the training images."""
    logits, _ = predict(net, batches.in_order("test"), device)
    stages = {_stage_name(layer.name): layer.receptive_field for layer in convolutions(net)
              if layer.receptive_field and layer.output[1:] != (1, 1)}  # the last convolution of each block counts
    names = draw_all(read_run(folder), images, policy, logits.softmax(1).cpu().numpy(), stages)
    print(f"Pictures: {', '.join(names)}")


def _stage_name(layer: str) -> str:
    """conv block 1 of conv_block1.0.1."""
    return re.sub(r"(\d+)$", r" \1", layer.split(".")[0].replace("_", " "))
