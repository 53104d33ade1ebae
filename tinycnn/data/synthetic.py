"""The built-in set: ten kinds of drawn 32x32 shapes, so that the whole program runs anywhere."""

import numpy as np

from config import SIDE
from tinycnn.data.dataset import Dataset, Split, empty_split

# Whether the point (u, v), to the right and down, from -1 to 1, lies inside
SHAPES = {
    "disc": lambda u, v: np.hypot(u, v) < 1,
    "ring": lambda u, v: (np.hypot(u, v) < 1) & (np.hypot(u, v) > 0.6),
    "square": lambda u, v: _edge(u, v) < 0.85,
    "frame": lambda u, v: (_edge(u, v) < 0.9) & (_edge(u, v) > 0.5),
    "triangle": lambda u, v: (v < 0.8) & (v > 2 * abs(u) - 1),
    "plus": lambda u, v: (_edge(u, v) < 1) & (np.minimum(abs(u), abs(v)) < 0.25),
    "cross": lambda u, v: (_edge(u, v) < 1) & (np.minimum(abs(u + v), abs(u - v)) < 0.35),
    "horizontal stripes": lambda u, v: (_edge(u, v) < 1) & (np.floor(v * 2.5) % 2 == 0),
    "vertical stripes": lambda u, v: (_edge(u, v) < 1) & (np.floor(u * 2.5) % 2 == 0),
    "checkerboard": lambda u, v: (_edge(u, v) < 1) & ((np.floor(u * 2) + np.floor(v * 2)) % 2 == 0)}


def _edge(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(abs(u), abs(v))


def draw(count: int, key: int) -> Split:
    """Draw `count` shapes in random places, sizes and colours, with noise. The labels are indices into SHAPES. A function of
    `count` and `key`."""
    random = np.random.Generator(np.random.Philox(key=key))
    labels = np.arange(count) % len(SHAPES)

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return random.uniform(low, high, (count, *(shape or (1, 1))))

    # each image's own coordinates
    rows, columns = np.mgrid[-1:1:SIDE * 1j, -1:1:SIDE * 1j]
    x, y, size, angle = columns - uniform(-0.3, 0.3), rows - uniform(-0.3, 0.3), uniform(0.4, 0.8), uniform(-0.1, 0.1)
    u, v = (x * np.cos(angle) + y * np.sin(angle)) / size, (y * np.cos(angle) - x * np.sin(angle)) / size
    mask = np.empty((count, SIDE, SIDE, 1), bool)
    for label, inside in enumerate(SHAPES.values()):
        mask[label::len(SHAPES), ..., 0] = inside(u[label::len(SHAPES)], v[label::len(SHAPES)])
    ground = uniform(0, 255, 1, 1, 3)
    contrast = uniform(90, 160, 1, 1, 3) * np.where(ground < 128, 1, -1)
    pixels = ground + contrast * mask + random.normal(0, 10, (count, SIDE, SIDE, 3))
    order = random.permutation(count)
    return Split(pixels.clip(0, 255).astype(np.uint8)[order], labels.astype(np.int64)[order])


def synthetic() -> Dataset:
    """Draw 5,000 training and 1,000 test images, the same ones every time."""
    return Dataset("synthetic", tuple(SHAPES), draw(5000, key=1), draw(1000, key=2), empty_split())
