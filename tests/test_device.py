"""What depends on the device. How the program uses a GPU's second streams: tests/training/test_fake_cuda.py."""

import time

import pytest
import torch

from tinycnn import device
from tinycnn.device import after_this, milliseconds, side_stream, wait_for

CPU = torch.device("cpu")


def test_a_device_has_one_side_stream_for_each_kind_of_work(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda index: object())
    try:
        assert side_stream(torch.device("cuda")) is side_stream(torch.device("cuda", 0))  # tensors name the second
        assert len({side_stream(torch.device("cuda", index), work) for index in (0, 1) for work in ("steps", "batches")}) == 4
    finally:
        device._stream.cache_clear()


def test_without_a_second_stream_cuda_is_not_started(monkeypatch):
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: pytest.fail("which asks for the current device"))
    assert side_stream(CPU) is None
    with after_this(None):
        wait_for(None)


def test_the_time_of_a_call_is_a_median(monkeypatch):
    now = iter((0.0, 0.02, 10.0, 10.5, 20.0, 20.03))  # three rounds of ten calls, the second one disturbed
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    calls = []
    assert milliseconds(lambda: calls.append(1), CPU) == pytest.approx(3)
    assert len(calls) == 30
