"""Second streams of a GPU. How the program uses them: tests/training/test_fake_cuda.py."""

import torch

from batches import streams
from batches.streams import side_stream


def test_a_device_has_one_side_stream_for_each_kind_of_work(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda index: object())
    assert side_stream(torch.device("cuda")) is side_stream(torch.device("cuda", 0))  # tensors name the second
    assert len({side_stream(torch.device("cuda", index), work) for index in (0, 1) for work in ("steps", "batches")}) == 4
    assert side_stream(torch.device("cpu")) is None
    streams._stream.cache_clear()
