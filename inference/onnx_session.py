"""ONNX models run by ONNX Runtime on the CPU. Needs no torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

AT_ONCE = 500  # images
Run = Callable[[np.ndarray], np.ndarray]  # uint8 N x 32 x 32 x 3 -> float32 logits N x classes


def session(model: bytes | Path, threads: int = 0, profile: str = "") -> Any:
    """An onnxruntime.InferenceSession; `threads` 0 is as many as there are cores. With `profile`, the beginning of the name of
    a file for the figures, it measures each node."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def session_runner(ready: Any) -> Run:
    return lambda images: ready.run(["logits"], {"image": images})[0]


def in_batches(run: Run, images: np.ndarray) -> np.ndarray:
    """The logits of many images, as `run` gives them."""
    return np.concatenate([run(images[start:start + AT_ONCE]) for start in range(0, len(images), AT_ONCE)])
