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
from torch.utils import data

from config import Config, UserError
from tinycnn.data.dataset import Dataset
from tinycnn.data.randomness import AUGMENTATION, ORDER, random_stream
from tinycnn.data.tensors import Batch, Epoch, as_array, split_tensors
from tinycnn.device import memory_format
from tinycnn.errors import STOP_SIGNALS
from tinycnn.processes import world
from tinycnn.sources import COPIED_FILES, ROOT

Item = tuple[str, int, np.ndarray]  # a batch: the name of a split, an epoch, and indices


class BatchDataset(data.Dataset):
    """An item is a whole batch: images float32 N x 3 x H x W in channels_last memory, and labels int64 N, on the CPU. `shared`
    moves images and labels into shared memory."""

    def __init__(self, dataset: Dataset, train_policy: Callable[[int], A.Compose], test_policy: A.Compose, seed: int,
                 shared: bool) -> None:
        self.splits = split_tensors(dataset)
        self.train_policy, self.test_policy, self.seed = train_policy, test_policy, seed
        self.epoch_policy: tuple[int, A.Compose] | None = None  # made last
        if shared:
            for tensor in (each for pair in self.splits.values() for each in pair):
                tensor.share_memory_()

    def __getitem__(self, item: Item) -> tuple[Tensor, Tensor]:
        name, epoch, indices = item
        (images, labels), policy, py_random = self.splits[name], self._policy(name, epoch), random.Random()
        batch = []
        for index in indices.tolist():
            py_random.seed(self.seed << 64 | epoch << 32 | index)
            policy.set_random_state(random_stream(self.seed, AUGMENTATION, epoch, index), py_random)
            batch.append(as_array(policy(image=images[index].numpy())["image"]))
        # a process's part of a short batch may be empty
        pixels = np.stack(batch).astype(np.float32, copy=False) if batch else np.empty((0, *images.shape[1:]), np.float32)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2), labels[torch.from_numpy(indices)]

    def _policy(self, name: str, epoch: int) -> A.Compose:
        if name != "train":
            return self.test_policy
        if self.epoch_policy is None or self.epoch_policy[0] != epoch:
            self.epoch_policy = epoch, self.train_policy(epoch)
        return self.epoch_policy[1]


class WorkerBatches:
    """All batches of a run, from one set of workers that serves every split and lives as long as the run. The same calls as
    DeviceBatches."""

    def __init__(self, dataset: Dataset, train_policy: Callable[[int], A.Compose], test_policy: A.Compose, config: Config,
                 device: torch.device, workers: int = 0) -> None:
        """`train_policy` is a function of the epoch."""
        cv2.setNumThreads(0)
        self.dataset, self.config, self.device = dataset, config, device
        self.per_epoch = -(-len(dataset.train) // config.batch_size)
        method = _start_method() if workers else None
        if method not in (None, "fork") and (ROOT / "augmentation.py").read_bytes() != COPIED_FILES["augmentation.py"]:
            raise UserError("augmentation.py was edited after the program began, and new workers would load it: start it again")
        if method == "forkserver":  # imported once, not by every worker
            multiprocessing.set_forkserver_preload(["torch", "albumentations"])
        self.requests: list[Item] = []  # the items of the next pass
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: the user's choice
        # A forked worker has the images already; another would get them pickled, a copy each, unless they are shared.
        batches = BatchDataset(dataset, train_policy, test_policy, config.seed, shared=method not in (None, "fork"))
        self.loader = data.DataLoader(
            batches, batch_size=None, sampler=self.requests, num_workers=workers, multiprocessing_context=method,
            worker_init_fn=_start_worker, persistent_workers=workers > 0, pin_memory=device.type == "cuda",
            generator=torch.Generator())  # its own: each pass would draw from torch's, which dropout draws from

    def __enter__(self) -> "WorkerBatches":
        return self

    def __exit__(self, *_: object) -> None:
        """End the workers, also in the middle of an epoch."""
        if self.loader._iterator is not None:
            self.loader._iterator._shutdown_workers()  # type: ignore[attr-defined]

    def train(self, epoch: int) -> Epoch:
        """The batches of an epoch of training: every image once, in an order drawn from (seed, epoch). Images float32
        N x 3 x H x W in channels_last memory, labels int64 N, on the device."""
        order = random_stream(self.config.seed, ORDER, epoch).permutation(len(self.dataset.train))
        return self._run("train", epoch, order)

    def validation(self) -> Epoch:
        """The batches of the images held out, normalized, in their own order."""
        return self._run("validation", 0, np.arange(len(self.dataset.validation)))

    def test(self) -> Epoch:
        """The batches of the test images, normalized, in their own order."""
        return self._run("test", 0, np.arange(len(self.dataset.test)))

    def _run(self, name: str, epoch: int, order: np.ndarray) -> Epoch:
        return Epoch(self._batches(name, epoch, order), len(order))

    def _batches(self, name: str, epoch: int, order: np.ndarray) -> Iterator[Batch]:
        size = self.config.batch_size
        whole = [order[start:start + size] for start in range(0, len(order), size)]
        self.requests[:] = [(name, epoch, indices[world.share_of(len(indices))]) for indices in whole]
        for images, labels in self.loader:  # pinned, so that copies to a GPU needn't be waited for
            yield (images.to(self.device, non_blocking=True, memory_format=memory_format(self.device)),
                   labels.to(self.device, non_blocking=True))


def _start_method() -> str:
    """How workers start. From Python 3.12 on, forking a process that has threads, as any with torch has, warns and may
    deadlock; Python 3.14 starts a fork server by itself."""
    method = multiprocessing.get_start_method()
    return "forkserver" if method == "fork" and sys.version_info >= (3, 12) else method


def _start_worker(_: int) -> None:
    """Compute on one core. Leave the signals that reach the whole process group to the parent: it ends its workers, and they
    end by themselves when it is gone."""
    cv2.setNumThreads(0)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = lambda *_: None  # for the thread that hands batches over, when the parent has gone
