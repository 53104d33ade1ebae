"""Batches made by worker processes: the policy on one image after another, in a Dataset and a DataLoader."""

import multiprocessing
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator

import albumentations as A
import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tinycnn.data.dataset import Split
from tinycnn.data.randomness import AUGMENTATION, ORDER, random_stream
from tinycnn.data.tensors import as_array, as_tensors


class BatchDataset(Dataset):
    """Item (name, epoch, indices) is a whole batch of `splits[name]`, made by `policies[name]`: images float32,
    N x 3 x H x W in channels_last memory, and labels int64, N. `shared` moves images and labels into shared memory."""

    def __init__(self, splits: dict[str, Split], policies: dict[str, A.Compose], seed: int, shared: bool) -> None:
        self.images, self.labels = as_tensors(splits)
        self.policies, self.seed = policies, seed
        if shared:
            for tensor in (*self.images.values(), *self.labels.values()):
                tensor.share_memory_()

    def __getitem__(self, item: tuple[str, int, np.ndarray]) -> tuple[Tensor, Tensor]:
        name, epoch, indices = item
        images, policy, py_random = self.images[name].numpy(), self.policies[name], random.Random()
        batch = []
        for index in indices.tolist():
            py_random.seed(self.seed << 64 | epoch << 32 | index)
            policy.set_random_state(random_stream(self.seed, AUGMENTATION, epoch, index), py_random)
            batch.append(as_array(policy(image=images[index])["image"]))
        # a process's part of a short batch may be empty
        pixels = np.stack(batch).astype(np.float32, copy=False) if batch else np.empty((0, *images.shape[1:]), np.float32)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2), self.labels[name][torch.from_numpy(indices)]


class WorkerBatches:
    """All batches of a run, from one set of workers that serves every split and lives as long as the run."""

    def __init__(self, splits: dict[str, Split], policies: dict[str, A.Compose], batch_size: int, seed: int,
                 workers: int, pin_memory: bool = False, share_of: Callable[[int], slice] = slice) -> None:
        """`splits` and `policies` have the same keys; `pin_memory` is for copies to a GPU; `share_of(n)` is the
        slice of a batch of n images that this process makes."""
        cv2.setNumThreads(0)
        self.sizes, self.batch_size, self.seed = {name: len(split) for name, split in splits.items()}, batch_size, seed
        method = _start_method() if workers else None
        if method == "forkserver":  # imported once, not by every worker
            multiprocessing.set_forkserver_preload(["torch", "albumentations"])
        self.share_of = share_of
        self.requests: list[tuple[str, int, np.ndarray]] = []  # the items of the next pass
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: the user's choice
        # A forked worker has the images already; another would get them pickled, a copy each, unless they are shared.
        dataset = BatchDataset(splits, policies, seed, shared=method not in (None, "fork"))
        self.loader = DataLoader(
            dataset, batch_size=None, sampler=self.requests, num_workers=workers, multiprocessing_context=method,
            worker_init_fn=_start_worker, persistent_workers=workers > 0, pin_memory=pin_memory,
            generator=torch.Generator())  # its own: each pass would draw from torch's, which dropout draws from

    def shuffled(self, name: str, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch of training, by a policy: every image once, in an order drawn from (seed, epoch). Images
        float32 N x 3 x H x W in channels_last order, labels int64 N, on the CPU."""
        return self._run(name, epoch, random_stream(self.seed, ORDER, epoch).permutation(self.sizes[name]))

    def in_order(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of a split in its own order, for evaluation."""
        return self._run(name, 0, np.arange(self.sizes[name]))

    def close(self) -> None:
        """End the workers, also in the middle of an epoch."""
        if self.loader._iterator is not None:
            self.loader._iterator._shutdown_workers()  # type: ignore[attr-defined]

    def _run(self, name: str, epoch: int, order: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        whole = [order[start:start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        self.requests[:] = [(name, epoch, indices[self.share_of(len(indices))]) for indices in whole]
        return iter(self.loader)


def _start_method() -> str:
    """How workers start. From Python 3.12 on, forking a process that has threads, as any with torch has, warns and may
    deadlock; Python 3.14 starts a fork server by itself."""
    method = multiprocessing.get_start_method()
    return "forkserver" if method == "fork" and sys.version_info >= (3, 12) else method


def _start_worker(_: int) -> None:
    """Compute on one core. Leave the signals that reach the whole process group to the parent: it ends its workers, and they
    end by themselves when it is gone."""
    cv2.setNumThreads(0)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    sys.excepthook = lambda *_: None  # for the thread that hands batches over, when the parent has gone
