"""A trained network as one file that runs without this program: for ONNX Runtime, in float32 or int8, or for torch.export."""

import contextlib
import copy
import importlib.util
import io
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import UserError
from inference.classifier import Classifier
from inference.onnx_session import Run, in_batches, session, session_runner
from training.dilated import plain
from training.images import Split
from training.shapes import SIDE

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "int8": ".int8.onnx"}
ONNX = ("onnx", "onnxscript", "onnxruntime")
INSTALL = f"python -m pip install {' '.join(ONNX)}"
OPSET = 18  # of ONNX: the lowest that torch's exporter writes
LOGITS_BOUND = 1e-4  # by how much an exported float network's logits may differ
INT8_BOUND = 0.5  # points of accuracy that int8 may lose
CALIBRATION = 1000  # training images that show the quantizer the ranges of the activations


def check_packages(to: str) -> None:
    """Raise UserError where a package that the export needs is missing."""
    missing = [name for name in ONNX if to != "torch" and importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--to {to} needs the package {' and '.join(missing)}: {INSTALL}")


def export(to: str, classifier: Classifier, class_names: Sequence[str], train: Split, test: Split,
           logits: Tensor) -> tuple[bytes, str]:
    """The file that `to` names, after it was loaded back and compared, on the test images, with the `logits` (float32
    N x classes, on the CPU) that the network itself gives; and a line on how near it is. Raises UserError where the network
    can't be exported, or the comparison fails."""
    try:
        with quiet():
            folded = fold(classifier)
            data = as_torch(folded, class_names) if to == "torch" else as_onnx(folded, class_names)
            if to == "int8":
                data = as_int8(data, calibration(train, CALIBRATION))
            run = torch_runner(data) if to == "torch" else session_runner(session(data))
            found = in_batches(run, test.images)
    except OSError:  # a full disk
        raise
    except ImportError as error:
        raise UserError(f"a package that --to {to} needs can't be loaded ({error}): {INSTALL}") from error
    except Exception as error:  # the exporters raise nearly anything on a network they can't follow
        raise UserError(f"the network in model.py can't be exported ({_reason(error)}): undo the edits that made it so, or use "
                        "it from Python") from error
    apart = float(np.abs(found - logits.numpy()).max())
    before, after = (100 * float((each.argmax(1) == test.labels).mean()) for each in (logits.numpy(), found))
    said = (f"accuracy {after:.2f} % on {len(test):,} test images, of the network itself {before:.2f} %; "
            f"logits differ by at most {apart:.2g}")
    if to == "int8" and not after >= before - INT8_BOUND:
        raise UserError(f"int8 loses more than {INT8_BOUND} points: {said}; no file was written, use --to onnx")
    if to != "int8" and not apart <= LOGITS_BOUND:
        raise UserError(f"the exported network is not the same, its logits should differ by at most {LOGITS_BOUND}: {said}; "
                        "no file was written")
    return data, said


def _reason(error: BaseException) -> str:
    """What an exporter stumbled on: the first line of the error behind all others, without colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return (said.splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what the exporters would tell developers from the user; errors pass."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def fold(classifier: Classifier) -> Classifier:
    """A copy, on the CPU, with each BatchNorm folded into the convolution before it."""
    from torch.fx.experimental.optimization import fuse

    folded = copy.deepcopy(classifier).cpu()
    plain(folded.net)  # `fuse` knows PyTorch's own layers only
    folded.net = fuse(folded.net)
    return folded


def _example() -> tuple[tuple[Tensor], Any]:
    """An input, of two images, and which of its sizes vary: torch takes a size of one for a constant."""
    return (torch.zeros(2, SIDE, SIDE, 3, dtype=torch.uint8),), ({0: torch.export.Dim("N")},)


def as_torch(folded: Classifier, class_names: Sequence[str]) -> bytes:
    """For torch.export.load, with class_names.json among its extra files."""
    example, varying = _example()
    program, file = torch.export.export(folded, example, dynamic_shapes=varying), io.BytesIO()
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # where in this program, by its paths, each came from
    torch.export.save(program, file, extra_files={"class_names.json": json.dumps(list(class_names))})
    return file.getvalue()


def as_onnx(folded: Classifier, class_names: Sequence[str]) -> bytes:
    """For ONNX Runtime: input `image`, output `logits`; class_names, as JSON, in the model's metadata."""
    from onnxscript import opset18

    def average(image: Any, output_size: Sequence[int]) -> Any:
        if any(side != 1 for side in output_size):
            raise ValueError("an adaptive average to more than one pixel")
        return opset18.GlobalAveragePool(image)

    example, varying = _example()
    program = torch.onnx.export(
        folded, example, dynamo=True, dynamic_shapes=varying, input_names=["image"], output_names=["logits"],
        opset_version=OPSET, external_data=False, verbose=False,
        # torch's own translation is a mean and a gather that costs more than the last convolution
        custom_translation_table={torch.ops.aten.adaptive_avg_pool2d.default: average})
    model = program.model_proto  # type: ignore[union-attr]
    graph = model.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]  # where in this program, by its paths, each came from
    model.metadata_props.add(key="class_names", value=json.dumps(list(class_names)))
    return model.SerializeToString(deterministic=True)


def calibration(train: Split, count: int) -> np.ndarray:
    """The first images of each class, equally many: uint8, about `count` x 32 x 32 x 3."""
    classes = np.unique(train.labels)
    share = max(1, count // len(classes))
    return train.images[np.concatenate([np.flatnonzero(train.labels == label)[:share] for label in classes])]


def as_int8(model: bytes, images: np.ndarray) -> bytes:
    """The ONNX model with weights and activations in int8, by ONNX Runtime's own quantizer: a scale for each channel of the
    weights, and one for each activation from its least and greatest value on `images` (uint8 N x 32 x 32 x 3).

    Weights take 7 bits: processors without VNNI instructions add two products of 8 bits in 16, which overflows (ONNX Runtime's
    documentation on quantization, "reduce_range").
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.chunks = iter(np.array_split(images, max(1, len(images) // 100)))

        def get_next(self) -> dict[str, np.ndarray] | None:
            chunk = next(self.chunks, None)
            return None if chunk is None else {"image": chunk}

    with tempfile.TemporaryDirectory() as folder:
        given, prepared, made = (Path(folder) / f"{name}.onnx" for name in ("given", "prepared", "made"))
        given.write_bytes(model)
        quant_pre_process(given, prepared, skip_symbolic_shape=True, skip_optimization=True)
        normalization = [node.name for node in onnx.load(prepared).graph.node if {"mean", "scale"} & {*node.input}]
        quantize_static(prepared, made, Reader(), calibrate_method=CalibrationMethod.MinMax, per_channel=True,
                        reduce_range=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                        nodes_to_exclude=normalization)  # the network's input is rounded once, after it
        return made.read_bytes()


def torch_runner(program: bytes) -> Run:
    """The torch.export program, on the CPU."""
    module = torch.export.load(io.BytesIO(program)).module()

    @torch.no_grad()
    def run(images: np.ndarray) -> np.ndarray:
        return module(torch.from_numpy(images)).numpy()

    return run
