"""Run ONNX models with ONNX Runtime on the CPU. Needs no torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BATCH_SIZE = 500
LogitsFunction = Callable[[np.ndarray], np.ndarray]  # uint8 images N x 32 x 32 x 3 to float32 logits N x classes


def make_session(model: bytes | Path, threads: int = 0) -> Any:
    """Make an onnxruntime.InferenceSession of an ONNX model or of its path. `threads` 0 uses one for each core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def session_logits(session: Any) -> LogitsFunction:
    """Return the function that a session computes."""
    return lambda images: session.run(["logits"], {"image": images})[0]


def compute_in_batches(logits: LogitsFunction, images: np.ndarray) -> np.ndarray:
    """Compute the logits of many images, BATCH_SIZE at a time."""
    return np.concatenate([logits(images[start:start + BATCH_SIZE]) for start in range(0, len(images), BATCH_SIZE)])
