"""Batches made by worker processes: the policy on one image after another, in a Dataset and a DataLoader."""

import multiprocessing
import random
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training.images import Split

if TYPE_CHECKING:
    import albumentations as A

ORDER, AUGMENTATION, WHOLE_BATCHES = 0, 1, 2  # what a random stream is for


def random_stream(seed: int, purpose: int, epoch: int, image: int = 0) -> np.random.Generator:
    """The random numbers of one image in one epoch, or of a whole epoch: a function of these four and of nothing else.

    Philox is a counter hashed under a key (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), so
    streams that differ in any of the four never overlap, and one is made in microseconds.
    """
    return np.random.Generator(np.random.Philox(
        key=np.array([seed, purpose], dtype=np.uint64), counter=np.array([0, 0, image, epoch], dtype=np.uint64)))


class BatchDataset(Dataset):
    """Item (split, epoch, indices) is a whole batch of `splits[split]`, made by `policies[split]`: images float32,
    N x 3 x 32 x 32 in channels_last memory, and labels int64, N. `shared` puts the images
    into shared memory, for workers that are not forked."""

    def __init__(self, splits: dict[str, Split], policies: "dict[str, A.Compose]", seed: int, shared: bool) -> None:
        self.images = {name: torch.from_numpy(split.images) for name, split in splits.items()}
        self.labels = {name: torch.from_numpy(split.labels) for name, split in splits.items()}
        self.policies, self.seed = policies, seed
        if shared:
            for tensor in (*self.images.values(), *self.labels.values()):
                tensor.share_memory_()

    def __getitem__(self, request: tuple[str, int, np.ndarray]) -> tuple[Tensor, Tensor]:
        split, epoch, indices = request
        images, policy, py_random = self.images[split].numpy(), self.policies[split], random.Random()
        batch = np.empty((len(indices), *images.shape[1:]), dtype=np.float32)
        for position, index in enumerate(indices.tolist()):
            py_random.seed(self.seed << 64 | epoch << 32 | index)
            policy.set_random_state(random_stream(self.seed, AUGMENTATION, epoch, index), py_random)
            image = policy(image=images[index])["image"]
            batch[position] = image.permute(1, 2, 0) if isinstance(image, Tensor) else image  # ToTensorV2 was in the policy
        return torch.from_numpy(batch).permute(0, 3, 1, 2), self.labels[split][torch.from_numpy(indices)]


class Batches:
    """All batches of a run, from one set of workers that live as long as the run and serve every split."""

    def __init__(self, splits: dict[str, Split], policies: "dict[str, A.Compose]", batch_size: int, seed: int,
                 workers: int, pin_memory: bool = False) -> None:
        """`splits` and `policies` have the same keys; `pin_memory` is for copies to a GPU."""
        cv2.setNumThreads(0)
        self.sizes, self.batch_size, self.seed = {name: len(split) for name, split in splits.items()}, batch_size, seed
        # A forked worker has the images already; one that was spawned would get them pickled, a copy each.
        shared = workers > 0 and multiprocessing.get_start_method() != "fork"
        self.requests: list[tuple[str, int, np.ndarray]] = []  # the items that the next pass asks for
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: the user's choice
        self.loader = DataLoader(
            BatchDataset(splits, policies, seed, shared), batch_size=None, sampler=self.requests, num_workers=workers,
            worker_init_fn=_start_worker, persistent_workers=workers > 0, pin_memory=pin_memory,
            generator=torch.Generator())  # its own, or each pass would draw from torch's, which dropout draws from

    def shuffled(self, split: str, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch of training: every image once, in an order drawn from (seed, epoch)."""
        return self._run(split, epoch, random_stream(self.seed, ORDER, epoch).permutation(self.sizes[split]))

    def in_order(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of a test."""
        return self._run(split, 0, np.arange(self.sizes[split]))

    def close(self) -> None:
        """End the workers, also in the middle of an epoch."""
        if self.loader._iterator is not None and self.loader.num_workers:
            self.loader._iterator._shutdown_workers()  # type: ignore[attr-defined]

    def _run(self, split: str, epoch: int, order: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        self.requests[:] = [(split, epoch, order[start:start + self.batch_size])
                            for start in range(0, len(order), self.batch_size)]
        return iter(self.loader)


def _start_worker(_: int) -> None:
    """One core a worker. Signals that reach the whole process group are the parent's to answer; it ends its workers, and
    they end by themselves when it is gone."""
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Only the thread that hands batches over would use it, when whom they are for has gone
    sys.excepthook = lambda *_: None
