"""Second streams of a GPU. How the program uses them: tests/training/test_fake_cuda.py."""

import pytest
import torch

from tinycnn import streams
from tinycnn.streams import after_this, side_stream, wait_for


def test_a_device_has_one_side_stream_for_each_kind_of_work(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda index: object())
    assert side_stream(torch.device("cuda")) is side_stream(torch.device("cuda", 0))  # tensors name the second
    assert len({side_stream(torch.device("cuda", index), work) for index in (0, 1) for work in ("steps", "batches")}) == 4
    assert side_stream(torch.device("cpu")) is None
    streams._stream.cache_clear()


def test_without_a_second_stream_cuda_is_not_started(monkeypatch):
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: pytest.fail("which asks for the current device"))
    with after_this(side_stream(torch.device("cpu"))):
        wait_for(None)
