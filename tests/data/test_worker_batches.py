"""Worker processes: the same batches however many there are and however they start, and none is left behind."""

import multiprocessing
import sys
import time
import warnings
from contextlib import nullcontext

import pytest
import torch
from test_batches import joined, make

from config import UserError
from tinycnn.data import worker_batches


def same(one, other) -> bool:
    return all(map(torch.equal, joined(one), joined(other)))


@pytest.mark.parametrize("method", [worker_batches._start_method(), "spawn"])
def test_workers_change_no_bit_and_none_is_left_behind(monkeypatch, method):
    """Nor a random number of torch, which dropout draws from. Started as here, and as on macOS and Windows."""
    monkeypatch.setattr(worker_batches, "_start_method", lambda: method)
    alone, before = make("workers", crop_size=24, whole_images_share=0.1), set(multiprocessing.active_children())
    state = torch.random.get_rng_state()
    with warnings.catch_warnings(), make("workers", crop_size=24, whole_images_share=0.1,
                                         workers=1 if method == "spawn" else 3) as many:
        warnings.filterwarnings("error", ".*fork")
        assert many.loader.multiprocessing_context.get_start_method() == method
        for epoch in (0, 79):
            assert same(alone.train(epoch), many.train(epoch))
        assert same(alone.test(), many.test())
        next(iter(many.train(1)))  # and no more
        workers = set(multiprocessing.active_children()) - before
        assert workers
    assert torch.equal(torch.random.get_rng_state(), state)
    deadline = time.monotonic() + 20
    while (left := [worker for worker in workers if worker.is_alive()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for worker in left:
        worker.kill()  # or the tests would never end
    assert not left


@pytest.mark.parametrize("method", [method for method in ("spawn", "forkserver")
                                    if method in multiprocessing.get_all_start_methods()])
def test_workers_that_are_not_forked_share_the_images(monkeypatch, method):
    """Otherwise each would get a copy of its own."""
    monkeypatch.setattr(worker_batches, "_start_method", lambda: method)
    splits = make("workers", workers=1).loader.dataset.splits
    assert all(tensor.is_shared() for pair in splits.values() for tensor in pair)


def test_workers_that_would_load_an_edited_policy_are_refused(monkeypatch):
    """Only forked ones have the policy that the program has."""
    monkeypatch.setitem(worker_batches.COPIED_FILES, "augmentation.py", b"of before")
    for method in ("spawn", "fork"):
        monkeypatch.setattr(worker_batches, "_start_method", lambda method=method: method)
        with nullcontext() if method == "fork" else pytest.raises(UserError, match=r"augmentation\.py was edited after"):
            make("workers", workers=1)


@pytest.mark.parametrize(("default", "version", "expected"), [
    ("fork", (3, 11), "fork"), ("fork", (3, 12), "forkserver"), ("forkserver", (3, 14), "forkserver"),
    ("spawn", (3, 13), "spawn")])
def test_workers_are_not_forked_from_python_3_12_on(monkeypatch, default, version, expected):
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda *_, **__: default)
    monkeypatch.setattr(sys, "version_info", version)
    method = worker_batches._start_method()
    monkeypatch.undo()
    assert method == expected
