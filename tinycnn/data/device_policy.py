"""Run an A.Compose on whole batches, in torch, on a CPU or a CUDA GPU.

The Compose alone defines the policy: each batch transform here reads the parameters of one of its transforms. `sample` turns
uniform random numbers into the parameters of N images; calling the transform applies them. The pixels are Albumentations' own,
bit for bit where OpenCV interpolates in fixed point, as its x86-64 builds do. Between the transforms the images are packed: see
packed_images.py.
"""

from typing import Any, Protocol

import albumentations as A
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from torch import Tensor

from tinycnn.data.packed_images import grid, pack, packed_pixel, pixels_at, unpack

BORDERS = (cv2.BORDER_CONSTANT, cv2.BORDER_REFLECT, cv2.BORDER_REFLECT_101)


class Unsupported(ValueError):
    """A transform that can't run on whole batches. The message is its name, and the parameter where only
    that is unsupported."""


# ---------------------------------------------------------------- the transforms

class BatchTransform(Protocol):
    """A transform on whole batches. `draws`: how many uniform random numbers an image needs. `height`, `width`: the size of its
    output. Parameters have one row an image; their shape and type is each transform's own."""

    draws: int
    height: int
    width: int

    def __init__(self, transform: Any, height: int, width: int) -> None:
        """For input of this height and width. Raises Unsupported."""

    def sample(self, uniform: Tensor, /) -> Tensor:
        """The parameters of N images, from N x draws random numbers in [0, 1)."""

    def __call__(self, packed: Tensor, parameters: Tensor, /) -> Tensor:
        """Transform packed images, N x H x W, each by its parameters."""


class HorizontalFlip:
    """Parameters: N bool."""

    draws = 1

    def __init__(self, transform: A.HorizontalFlip, height: int, width: int) -> None:
        self.p, self.height, self.width = transform.p, height, width

    def sample(self, uniform: Tensor) -> Tensor:
        return uniform[:, 0] < self.p

    def __call__(self, packed: Tensor, flipped: Tensor) -> Tensor:
        return torch.where(flipped[:, None, None], packed.flip(2), packed)


class Affine:
    """Shift, shear, rotation and scaling about the centre. Parameters: N x 2 x 3 float64, the matrix from input coordinates
    (x, y, 1) to output coordinates."""

    draws = 8

    def __init__(self, transform: A.Affine, height: int, width: int) -> None:
        _require(transform, interpolation=(cv2.INTER_LINEAR,), fit_output=(False,), balanced_scale=(False,),
                 border_mode=BORDERS)
        self.transform, self.height, self.width = transform, height, width
        self.border, self.fill = transform.border_mode, _fill(transform, rounded=True)

    def sample(self, uniform: Tensor) -> Tensor:
        """Draw and multiply as Albumentations does; the identity where the transform isn't applied."""
        applied, *draws = uniform.unbind(1)
        t = self.transform
        scale_x = _between(draws[0], t.scale["x"])
        scale_y = scale_x if t.keep_ratio else _between(draws[1], t.scale["y"])
        angle = _between(draws[2], t.rotate).deg2rad()
        shear_x, shear_y = (-_between(draw, t.shear[axis]).deg2rad() for draw, axis in zip(draws[3:5], "xy", strict=True))
        shift_x, shift_y = self._shift(draws[5], "x", self.width), self._shift(draws[6], "y", self.height)
        cos, sin, tan_x, tan_y = angle.cos(), angle.sin(), shear_x.tan(), shear_y.tan()
        a, b = (cos - tan_x * sin) * scale_x, (sin + tan_x * cos) * scale_y
        c, d = (tan_y * cos - sin) * scale_x, (tan_y * sin + cos) * scale_y
        x, y = (self.width - 1) / 2, (self.height - 1) / 2
        matrices = torch.stack([a, b, x + shift_x - a * x - b * y, c, d, y + shift_y - c * x - d * y], dim=1).view(-1, 2, 3)
        identity = torch.eye(2, 3, dtype=matrices.dtype, device=matrices.device)
        return torch.where((applied < t.p)[:, None, None], matrices, identity)

    def _shift(self, uniform: Tensor, axis: str, size: int) -> Tensor:
        """Whole pixels. Fractions of a shift by percent are cut, which favours 0."""
        if self.transform.translate_px is not None:
            return _integer(uniform, *(int(limit) for limit in self.transform.translate_px[axis]))
        return (_between(uniform, self.transform.translate_percent[axis]) * size).trunc()

    def coordinates(self, matrices: Tensor) -> tuple[Tensor, Tensor]:
        """Where output pixels come from, in 1024ths of an input pixel: the sum of a part by their column, int32 N x 2 x W, and
        one by their row, int32 N x 2 x H; of both, first of x, then of y."""
        a, b, shift_x, c, d, shift_y = matrices.view(-1, 6, 1).unbind(1)
        determinant = a * d - b * c
        row, column = (each.view(1, -1) for each in grid(self.height, self.width, matrices.device, matrices.dtype))
        by_column = [d / determinant * column, -c / determinant * column]
        by_row = [-b / determinant * row + (b * shift_y - d * shift_x) / determinant,
                  a / determinant * row + (c * shift_x - a * shift_y) / determinant]
        columns, rows = (torch.stack(parts, 1).mul_(1024).round_().int() for parts in (by_column, by_row))
        return columns, rows

    def __call__(self, packed: Tensor, matrices: Tensor) -> Tensor:
        """As OpenCV's warpAffine: both parts of a coordinate are rounded to 1/1024 pixel, their sum to 1/32, and weights are
        whole 1024ths (imgwarp.cpp: AB_BITS 10, INTER_BITS 5)."""
        columns, rows = self.coordinates(matrices)
        position = (columns[:, :, None, :] + rows[:, :, :, None]).add_(16).bitwise_right_shift_(5)
        (x, y), (right, down) = (position >> 5).unbind(1), (position & 31).unbind(1)
        (here, beside), (below, across) = pixels_at(packed, [y, y + 1], [x, x + 1], self.border, self.fill)
        total = ((32 - down) * ((32 - right) * here + right * beside) + down * ((32 - right) * below + right * across))
        half = packed_pixel((512, 512, 512))
        return total.add_(half).bitwise_right_shift_(10).bitwise_and_(packed_pixel((255, 255, 255)))


class PadIfNeeded:
    """Parameters: none, N x 0."""

    draws = 0

    def __init__(self, transform: A.PadIfNeeded, height: int, width: int) -> None:
        _require(transform, p=(1,), border_mode=BORDERS, position=("center", "top_left", "top_right", "bottom_left",
                                                                   "bottom_right"))
        # Albumentations computes these without random numbers
        pads = transform.get_params_dependent_on_data({"shape": (height, width)}, {})
        self.top, self.left = pads["pad_top"], pads["pad_left"]
        self.height, self.width = height + self.top + pads["pad_bottom"], width + self.left + pads["pad_right"]
        self.border, self.fill = transform.border_mode, _fill(transform, rounded=True)

    def sample(self, uniform: Tensor) -> Tensor:
        return uniform[:, :0]

    def __call__(self, packed: Tensor, _: Tensor) -> Tensor:
        y, x = grid(self.height, self.width, packed.device)
        return pixels_at(packed, [y - self.top], [x - self.left], self.border, self.fill)[0][0]


class RandomCrop:
    """Parameters: N x 2 int32, the crop's top and left."""

    draws = 2

    def __init__(self, transform: A.RandomCrop, height: int, width: int) -> None:
        _require(transform, p=(1,), pad_if_needed=(False,))
        self.height, self.width = transform.height, transform.width
        self.positions = (height - self.height + 1, width - self.width + 1)
        if min(self.positions) < 1:
            raise Unsupported(f"RandomCrop to {self.height} x {self.width} from {height} x {width}")

    def sample(self, uniform: Tensor) -> Tensor:
        draws = zip(uniform.unbind(1), self.positions, strict=True)
        return torch.stack([_integer(draw, 0, count - 1) for draw, count in draws], dim=1).int()

    def __call__(self, packed: Tensor, corners: Tensor) -> Tensor:
        y, x = grid(self.height, self.width, packed.device)
        top, left = corners[:, :, None, None].unbind(1)
        return pixels_at(packed, [y + top], [x + left], cv2.BORDER_REFLECT, 0)[0][0]


class CoarseDropout:
    """Parameters: N x holes x 4 int32, left, top, right, bottom; all 0 where there is no hole."""

    def __init__(self, transform: A.CoarseDropout, height: int, width: int) -> None:
        if isinstance(transform.fill, str):
            raise Unsupported(f"CoarseDropout with fill={transform.fill!r}")
        self.transform, self.height, self.width = transform, height, width
        self.draws = 2 + 4 * transform.num_holes_range[1]
        self.fill = _fill(transform, rounded=False)

    def sample(self, uniform: Tensor) -> Tensor:
        """Draw whether it is applied and the number of holes, then size and place of each."""
        t, holes = self.transform, []
        applied, number = uniform[:, 0] < t.p, _integer(uniform[:, 1], *t.num_holes_range)
        in_pixels = t.hole_height_range[1] >= 1  # Albumentations' own rule; else both are fractions
        for hole, draws in enumerate(uniform[:, 2:].view(len(uniform), -1, 4).unbind(1)):
            height = self._side(draws[:, 0], t.hole_height_range, self.height, in_pixels)
            width = self._side(draws[:, 1], t.hole_width_range, self.width, in_pixels)
            top, left = (draws[:, 2] * (self.height - height + 1)).trunc(), (draws[:, 3] * (self.width - width + 1)).trunc()
            exists = applied & (number > hole)
            holes.append((torch.stack([left, top, left + width, top + height], dim=1) * exists[:, None]).int())
        return torch.stack(holes, dim=1)

    @staticmethod
    def _side(uniform: Tensor, limits: tuple[float, float], size: int, in_pixels: bool) -> Tensor:
        if in_pixels:
            return _integer(uniform, int(limits[0]), int(min(limits[1], size)))
        return (_between(uniform, limits) * size).trunc()

    def __call__(self, packed: Tensor, holes: Tensor) -> Tensor:
        y, x = grid(self.height, self.width, packed.device)
        for hole in holes.unbind(1):
            left, top, right, bottom = hole[:, :, None, None].unbind(1)
            packed = torch.where((x >= left) & (x < right) & (y >= top) & (y < bottom), self.fill, packed)
        return packed


BATCH_TRANSFORMS: dict[type, type[BatchTransform]] = {
    A.HorizontalFlip: HorizontalFlip, A.Affine: Affine, A.ShiftScaleRotate: Affine, A.PadIfNeeded: PadIfNeeded,
    A.RandomCrop: RandomCrop, A.CoarseDropout: CoarseDropout}


def _require(transform: A.BasicTransform, **allowed: tuple) -> None:
    """Raise Unsupported where a parameter of `transform` has a value that isn't allowed."""
    for name, values in allowed.items():
        if getattr(transform, name) not in values:
            raise Unsupported(f"{type(transform).__name__} with {name}={getattr(transform, name)!r}")


def _fill(transform: A.BasicTransform, rounded: bool) -> int:
    """The colour of a border or a hole as a packed pixel: `rounded` and clipped, as OpenCV does, or cast to uint8."""
    fill = np.asarray(transform.fill, dtype=float)
    if fill.shape not in ((), (3,)):
        raise Unsupported(f"{type(transform).__name__} with fill={transform.fill!r}")
    channels = np.broadcast_to(fill, 3)
    return packed_pixel((np.rint(channels).clip(0, 255) if rounded else channels.astype(np.int64).astype(np.uint8)).tolist())


def _between(uniform: Tensor, limits: tuple[float, float]) -> Tensor:
    return limits[0] + (limits[1] - limits[0]) * uniform


def _integer(uniform: Tensor, low: int, high: int) -> Tensor:
    """Integers from `low` to `high`, both included, equally likely, as floats."""
    return low + (uniform * (high - low + 1)).trunc().clamp(max=high - low)


# ---------------------------------------------------------------- the policy

class DevicePolicy:
    """An A.Compose on whole batches. Raises Unsupported where one of its transforms can't run on them."""

    def __init__(self, policy: A.Compose, height: int, width: int, device: torch.device) -> None:
        if type(policy) is not A.Compose:
            raise Unsupported(type(policy).__name__)
        if policy.p != 1:
            raise Unsupported(f"Compose with p={policy.p}")
        transforms = list(policy.transforms)
        if transforms and type(transforms[-1]) is ToTensorV2:
            transforms.pop()
        values = np.arange(256, dtype=np.uint8)[:, None, None].repeat(3, axis=2)  # every value of every channel
        if transforms and type(transforms[-1]) is A.Normalize:
            _require(transforms[-1], p=(1,), normalization=("standard",))
            values = transforms.pop().apply(values)
        self.table = torch.from_numpy(values.astype(np.float32).reshape(-1)).to(device)  # 256 values x 3 channels
        self.transforms: list[BatchTransform] = []
        for transform in transforms:
            if type(transform) not in BATCH_TRANSFORMS:
                raise Unsupported(type(transform).__name__)
            self.transforms.append(BATCH_TRANSFORMS[type(transform)](transform, height, width))
            height, width = self.transforms[-1].height, self.transforms[-1].width
        self.draws = sum(transform.draws for transform in self.transforms)

    def sample(self, uniform: Tensor) -> list[Tensor]:
        """The parameters of each transform for N images, from N x draws random numbers in [0, 1)."""
        parts = uniform.split([transform.draws for transform in self.transforms], dim=1)
        return [transform.sample(part) for transform, part in zip(self.transforms, parts, strict=True)]

    def apply(self, images: Tensor, chosen: Tensor, parameters: list[Tensor]) -> Tensor:
        """Transform and normalize the `chosen` of all images. `chosen` are int64 indices; `parameters` are those of all images.
        Types as in a call."""
        return self(images[chosen], [values[chosen] for values in parameters])

    def __call__(self, images: Tensor, parameters: list[Tensor]) -> Tensor:
        """Transform and normalize uint8 N x H x W x 3 to float32 N x 3 x H x W in channels_last memory."""
        packed = pack(images)
        for transform, values in zip(self.transforms, parameters, strict=True):
            packed = transform(packed, values)
        indices = unpack(packed) * 3 + torch.arange(3, dtype=torch.int32, device=packed.device)
        return self.table.index_select(0, indices.view(-1)).view(indices.shape).permute(0, 3, 1, 2)
