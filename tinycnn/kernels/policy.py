"""A policy on whole batches in one Triton kernel: the same bits as DevicePolicy, whose steps each pass through memory."""

from typing import Any

import albumentations as A
import cv2
import torch
import triton
import triton.language as tl
from torch import Tensor

from tinycnn.data.device_policy import (
    Affine,
    CoarseDropout,
    DevicePolicy,
    HorizontalFlip,
    PadIfNeeded,
    RandomCrop,
    Unsupported,
)
from tinycnn.data.packed_images import SHIFTS

ORDER = [HorizontalFlip, Affine, PadIfNeeded, RandomCrop, CoarseDropout]  # each may be left out
CONSTANT, REFLECT_101 = tl.constexpr(cv2.BORDER_CONSTANT), tl.constexpr(cv2.BORDER_REFLECT_101)
BITS = tl.constexpr(SHIFTS[1])  # between two channels of a packed pixel
PIXELS = 256  # that a program makes


class FusedPolicy(DevicePolicy):
    """A DevicePolicy that runs as one kernel, on a GPU. Raises Unsupported also where it has other transforms than ORDER, or
    another order."""

    def __init__(self, policy: A.Compose, height: int, width: int, device: torch.device) -> None:
        super().__init__(policy, height, width, device)
        kinds = [type(transform) for transform in self.transforms]
        if kinds != [kind for kind in ORDER if kind in kinds]:
            raise Unsupported(", then ".join(kind.__name__ for kind in kinds))
        self.steps: dict[type, Any] = dict(zip(kinds, self.transforms, strict=True))
        last = self.transforms[-1] if self.transforms else None
        self.size = (last.height, last.width) if last else (height, width)
        affine, pad, hole = (self.steps.get(kind) for kind in (Affine, PadIfNeeded, CoarseDropout))
        self.constants = {
            "HEIGHT": height, "WIDTH": width, "OUT_WIDTH": self.size[1], "OUT_PIXELS": self.size[0] * self.size[1],
            "FLIP": HorizontalFlip in self.steps,
            "AFFINE": affine is not None, "AFFINE_BORDER": affine.border if affine else 0,
            "AFFINE_FILL": affine.fill if affine else 0,
            "PAD": pad is not None, "PAD_TOP": pad.top if pad else 0, "PAD_LEFT": pad.left if pad else 0,
            "PAD_BORDER": pad.border if pad else 0, "PAD_FILL": pad.fill if pad else 0,
            "CROP": RandomCrop in self.steps,
            "HOLES": hole.transform.num_holes_range[1] if hole else 0, "HOLE_FILL": hole.fill if hole else 0}

    def sample(self, uniform: Tensor) -> list[Tensor]:
        """As DevicePolicy.sample, but with the coordinates of an Affine in place of its matrices."""
        sampled = dict(zip(self.steps, super().sample(uniform), strict=True))
        columns, rows = self.steps[Affine].coordinates(sampled[Affine]) if Affine in sampled else (uniform, uniform)
        flips, corners, holes = (sampled.get(kind, uniform) for kind in (HorizontalFlip, RandomCrop, CoarseDropout))
        return [flips, columns, rows, corners, holes]  # `uniform` stands for what is not read

    def apply(self, images: Tensor, chosen: Tensor, parameters: list[Tensor]) -> Tensor:
        """As DevicePolicy.apply."""
        height, width = self.size
        out = torch.empty(len(chosen), height, width, 3, device=images.device)
        augment[(len(chosen), triton.cdiv(height * width, PIXELS))](
            images, chosen, *(values.contiguous() for values in parameters), self.table, out, PIXELS=PIXELS, **self.constants)
        return out.permute(0, 3, 1, 2)


@triton.jit
def _inside(index, SIZE: tl.constexpr, BORDER: tl.constexpr):
    """As packed_images._inside: where in the image a border takes its pixels from."""
    if BORDER == CONSTANT:
        return tl.minimum(tl.maximum(index, 0), SIZE - 1)
    period = 2 * SIZE - 2 if BORDER == REFLECT_101 else 2 * SIZE
    index = (index % period + period) % period  # the remainder of a negative number may be negative
    if BORDER == REFLECT_101:
        return SIZE - 1 - tl.abs(index - (SIZE - 1))
    return tl.minimum(index, 2 * SIZE - 1 - index)


@triton.jit
def _is_outside(y, x, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    return (y < 0) | (y >= HEIGHT) | (x < 0) | (x >= WIDTH)


@triton.jit
def _channels(PACKED: tl.constexpr, channel):
    """The channels of a packed pixel."""
    return ((tl.full((1, 4), PACKED, tl.int64) >> channel * BITS) & 255).to(tl.int32)


@triton.jit
def _load(images, image, y, x, channel, valid, flipped, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BORDER: tl.constexpr,
          FILL: tl.constexpr):
    """The channels at y, x of an image that may be flipped, as int32."""
    row, column = _inside(y, HEIGHT, BORDER), _inside(x, WIDTH, BORDER)
    column = tl.where(flipped, WIDTH - 1 - column, column)
    values = tl.load(images + ((image * HEIGHT + row) * WIDTH + column) * 3 + channel, mask=valid, other=0).to(tl.int32)
    if BORDER == CONSTANT:
        values = tl.where(_is_outside(y, x, HEIGHT, WIDTH), _channels(FILL, channel), values)
    return values


@triton.jit
def augment(images, chosen, flips, columns, rows, corners, holes, table, out, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
            OUT_WIDTH: tl.constexpr, OUT_PIXELS: tl.constexpr, FLIP: tl.constexpr, AFFINE: tl.constexpr,
            AFFINE_BORDER: tl.constexpr, AFFINE_FILL: tl.constexpr, PAD: tl.constexpr, PAD_TOP: tl.constexpr,
            PAD_LEFT: tl.constexpr, PAD_BORDER: tl.constexpr, PAD_FILL: tl.constexpr, CROP: tl.constexpr, HOLES: tl.constexpr,
            HOLE_FILL: tl.constexpr, PIXELS: tl.constexpr):
    """PIXELS of an image that is made: each is followed back through the transforms, from the last to the first."""
    made, image = tl.program_id(0), tl.load(chosen + tl.program_id(0))
    pixel, channel = (tl.program_id(1) * PIXELS + tl.arange(0, PIXELS))[:, None], tl.arange(0, 4)[None, :]
    valid = (pixel < OUT_PIXELS) & (channel < 3)
    y, x = pixel // OUT_WIDTH, pixel % OUT_WIDTH
    in_hole = y < 0
    for hole in tl.static_range(HOLES):
        sides = holes + (image * HOLES + hole) * 4  # left, top, right, bottom
        across = (x >= tl.load(sides)) & (x < tl.load(sides + 2))
        in_hole = in_hole | (across & (y >= tl.load(sides + 1)) & (y < tl.load(sides + 3)))
    if CROP:
        y, x = y + tl.load(corners + image * 2), x + tl.load(corners + image * 2 + 1)
    in_border = y < 0
    if PAD:
        y, x = y - PAD_TOP, x - PAD_LEFT
        if PAD_BORDER == CONSTANT:
            in_border = _is_outside(y, x, HEIGHT, WIDTH)
        y, x = _inside(y, HEIGHT, PAD_BORDER), _inside(x, WIDTH, PAD_BORDER)
    flipped = False
    if FLIP:
        flipped = tl.load(flips + image) != 0
    if AFFINE:
        in_image = pixel < OUT_PIXELS  # else there is no column or row
        column, row = columns + image * 2 * WIDTH + x, rows + image * 2 * HEIGHT + y
        from_x = (tl.load(column, mask=in_image, other=0) + tl.load(row, mask=in_image, other=0) + 16) >> 5
        from_y = (tl.load(column + WIDTH, mask=in_image, other=0) + tl.load(row + HEIGHT, mask=in_image, other=0) + 16) >> 5
        x, y, right, down = from_x >> 5, from_y >> 5, from_x & 31, from_y & 31
        here = _load(images, image, y, x, channel, valid, flipped, HEIGHT, WIDTH, AFFINE_BORDER, AFFINE_FILL)
        beside = _load(images, image, y, x + 1, channel, valid, flipped, HEIGHT, WIDTH, AFFINE_BORDER, AFFINE_FILL)
        below = _load(images, image, y + 1, x, channel, valid, flipped, HEIGHT, WIDTH, AFFINE_BORDER, AFFINE_FILL)
        diagonal = _load(images, image, y + 1, x + 1, channel, valid, flipped, HEIGHT, WIDTH, AFFINE_BORDER, AFFINE_FILL)
        upper, lower = (32 - right) * here + right * beside, (32 - right) * below + right * diagonal
        values = ((32 - down) * upper + down * lower + 512) >> 10
    else:
        values = _load(images, image, y, x, channel, valid, flipped, HEIGHT, WIDTH, REFLECT_101, 0)
    values = tl.where(in_border, _channels(PAD_FILL, channel), values)
    values = tl.where(in_hole, _channels(HOLE_FILL, channel), values)
    normalized = tl.load(table + values * 3 + channel, mask=valid, other=0.0)
    tl.store(out + (made * OUT_PIXELS + pixel) * 3 + channel, normalized, mask=valid)
