"""Images packed for arithmetic: H x W int64, the three channels of a pixel 20 bits apart.

A weighted sum of packed pixels computes all three channels at once. With weights that add up to 1024 no channel carries into
the next: 255 * 1024 < 2**20.
"""

from collections.abc import Sequence

import cv2
import torch
from torch import Tensor

SHIFTS = (0, 20, 40)  # bits, of the three channels


def pack(images: Tensor) -> Tensor:
    """Pack uint8 N x H x W x 3 into int64 N x H x W."""
    red, green, blue = images.long().unbind(-1)
    return red | green << SHIFTS[1] | blue << SHIFTS[2]


def unpack(packed: Tensor) -> Tensor:
    """Unpack int64 N x H x W into int32 N x H x W x 3, 0 to 255."""
    return torch.stack([(packed >> shift).int() & 255 for shift in SHIFTS], dim=-1)


def packed_pixel(channels: Sequence[int]) -> int:
    """Pack three values below 2**20."""
    return sum(int(channel) << shift for channel, shift in zip(channels, SHIFTS, strict=True))


def pixels_at(packed: Tensor, ys: list[Tensor], xs: list[Tensor], border: int, fill: int) -> list[list[Tensor]]:
    """Gather pixels of `packed`, N x H x W. result[i][j] holds those at ys[i], xs[j]: int32 coordinates, which broadcast to
    N x h x w and may lie outside the image, where `border` (of OpenCV) and `fill` apply."""
    count, height, width = packed.shape
    offsets = torch.arange(count, device=packed.device, dtype=torch.int32)[:, None, None] * (height * width)
    rows = [(y, _inside(y, height, border) * width + offsets) for y in ys]
    columns = [(x, _inside(x, width, border)) for x in xs]

    def gather(y: Tensor, row: Tensor, x: Tensor, column: Tensor) -> Tensor:
        indices = row + column
        pixels = packed.view(-1).index_select(0, indices.view(-1)).view(indices.shape)
        if border == cv2.BORDER_CONSTANT:
            pixels = torch.where((y >= 0) & (y < height) & (x >= 0) & (x < width), pixels, fill)
        return pixels

    return [[gather(*row, *column) for column in columns] for row in rows]


def _inside(index: Tensor, size: int, border: int) -> Tensor:
    """Map indices outside 0 to size - 1 to those inside that `border` takes; any, where the border is constant."""
    if border == cv2.BORDER_CONSTANT:
        return index.clamp(0, size - 1)
    if border == cv2.BORDER_REFLECT_101:  # the edge pixel is not repeated: 2 1 | 0 1 2 | 1 0
        return index.remainder(max(2 * size - 2, 1)).sub_(size - 1).abs_().neg_().add_(size - 1)
    index = index.remainder(2 * size)     # it is: 1 0 | 0 1 2 | 2 1
    return torch.minimum(index, 2 * size - 1 - index)


def grid(height: int, width: int, device: torch.device, dtype: torch.dtype = torch.int32) -> tuple[Tensor, Tensor]:
    """The coordinates of all pixels: y, 1 x height x 1, and x, 1 x 1 x width."""
    return (torch.arange(height, dtype=dtype, device=device)[None, :, None],
            torch.arange(width, dtype=dtype, device=device)[None, None, :])
