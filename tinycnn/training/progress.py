"""A progress bar for an epoch."""

import time
from collections.abc import Iterator

from torch import Tensor
from tqdm import tqdm

from tinycnn import startup
from tinycnn.data.tensors import Batch, Epoch
from tinycnn.processes import world

BAR = "{desc} |{bar:20}| {remaining} left, {rate_noinv_fmt}{postfix}"


def progress(batches: Epoch, sums: Tensor | None = None) -> Iterator[Batch]:
    """The batches of an epoch, and a bar on stderr while they are taken, where that is a terminal. Once a second it shows the
    `sums` so far, of losses and of correct predictions: float32, 2, on the device."""
    count, shown = 0, time.monotonic()
    with tqdm(total=batches.images, desc="training", bar_format=BAR, unit=" images", mininterval=1, leave=False,
              dynamic_ncols=True, disable=None if world.is_first else True) as bar:
        for images, labels in batches:
            yield images, labels
            startup.end()
            count += len(labels)
            bar.update(len(labels) * world.size)
            if sums is not None and not bar.disable and time.monotonic() - shown > 1:
                shown = time.monotonic()
                loss, correct = sums.tolist()
                bar.set_postfix_str(f"loss {loss / count:.4f}, accuracy {100 * correct / count:.2f} %", refresh=False)
