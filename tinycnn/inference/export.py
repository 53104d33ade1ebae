"""Export a trained network as one file that runs without this program: for ONNX Runtime, in float32 or int8, for
torch.export, or for a browser."""

import contextlib
import copy
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

from config import SIDE, UserError
from tinycnn.data.dataset import Split
from tinycnn.errors import as_user_errors
from tinycnn.inference.classifier import Classifier
from tinycnn.inference.onnx_session import LogitsFunction, compute_in_batches, make_session, session_logits
from tinycnn.inference.web import as_page, node_logits
from tinycnn.packages import require

EXPORT_SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "int8": ".int8.onnx", "web": ".html"}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18  # of ONNX: the lowest that torch's exporter writes
LOGITS_TOLERANCE = 1e-4  # for the logits of an exported float network
INT8_TOLERANCE = 0.5  # percentage points of accuracy that int8 may lose
CALIBRATION_IMAGES = 1000  # of the training images, for the ranges of int8's activations


def check_packages(to: str) -> None:
    """Raise UserError where a package that the export needs is missing or broken."""
    if to in ("onnx", "int8"):
        with quiet():
            require(f"--to {to}", *ONNX_PACKAGES)


def export_network(to: str, classifier: Classifier, class_names: Sequence[str], train: Split, test: Split,
                   logits: Tensor) -> tuple[bytes, str]:
    """Export a network, load the file back, and compare it with the network on the test images. `to` is a key of
    EXPORT_SUFFIXES; int8 is calibrated on some of `train`; `logits` are the network's for `test`, float32 N x classes, on the
    CPU. Returns the file's content, and a line with the comparison. A page is run by Node.js, or not compared without it."""
    with exporting(to):
        folded = fold(classifier)
        if to == "web":
            data = as_page(folded, class_names, test)
            page_logits = node_logits(data, test.images)
            return data, ("not checked, for want of Node.js (node on PATH)" if page_logits is None else
                          compare_logits(to, page_logits, logits.numpy(), test.labels))
        data = as_torch(folded, class_names) if to == "torch" else as_onnx(folded, class_names)
        if to == "int8":
            data = as_int8(data, calibration_images(train, CALIBRATION_IMAGES))
        exported = torch_logits(data) if to == "torch" else session_logits(make_session(data))
        exported_logits = compute_in_batches(exported, test.images)
    return data, compare_logits(to, exported_logits, logits.numpy(), test.labels)


def compare_logits(to: str, exported: np.ndarray, logits: np.ndarray, labels: np.ndarray) -> str:
    """Compare the logits of an exported network with those of the network itself, float32 N x classes, in one line. Raises
    UserError where they are further apart than a file of the kind `to` may be."""
    difference = float(np.abs(exported - logits).max())
    before, after = (100 * float((values.argmax(1) == labels).mean()) for values in (logits, exported))
    comparison = (f"accuracy {after:.2f} % on {len(labels):,} test images, of the network itself {before:.2f} %; "
                  f"logits differ by at most {difference:.2g}")
    if to == "int8" and not after >= before - INT8_TOLERANCE:
        raise UserError(f"int8 loses more than {INT8_TOLERANCE} points: {comparison}; no file was written, use --to onnx")
    if to != "int8" and not difference <= LOGITS_TOLERANCE:
        raise UserError(f"the exported network's logits differ from the network's by more than {LOGITS_TOLERANCE}: "
                        f"{comparison}; no file was written")
    return comparison


@contextlib.contextmanager
def exporting(to: str) -> Iterator[None]:
    """Keep the exporters quiet. Raise UserError in place of what they raise on a network that they can't follow: nearly
    anything. A full disk and exhausted memory keep their own errors."""
    try:
        with quiet():
            yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the exporters wrap the errors that they meet
            cause = cause.__cause__
        if "bad_alloc" in str(cause) or "Failed to allocate memory" in str(cause):  # ONNX Runtime's, of no class of its own
            cause = MemoryError(str(cause))
        try:
            with as_user_errors():
                raise cause from None
        except (UserError, OSError):
            raise
        except Exception:
            lines = re.sub(r"\x1b\[[0-9;]*m", "", str(cause)).strip().splitlines()  # without colors
            reason = lines[0][:200] if lines else type(cause).__name__
            packages = "torch" if to in ("torch", "web") else " ".join(("torch", *ONNX_PACKAGES))
            raise UserError(f"the network can't be exported ({reason}): undo the edits of model.py that made it so; if there "
                            f"are none, reinstall {packages}") from cause


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the exporters' logs, warnings and output, which are for developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def fold(classifier: Classifier) -> Classifier:
    """Copy `classifier` to the CPU, and fold each BatchNorm into the convolution before it."""
    from torch.fx.experimental.optimization import fuse

    folded = copy.deepcopy(classifier).cpu()
    folded.net = fuse(folded.net)
    return folded


def _example() -> tuple[tuple[Tensor], Any]:
    """Two images as input, as torch takes a size of one for a constant, and which of the sizes vary."""
    return (torch.zeros(2, SIDE, SIDE, 3, dtype=torch.uint8),), ({0: torch.export.Dim("N")},)


def as_torch(folded: Classifier, class_names: Sequence[str]) -> bytes:
    """Export for torch.export.load, with class_names.json among the extra files."""
    example, dynamic_shapes = _example()
    program, file = torch.export.export(folded, example, dynamic_shapes=dynamic_shapes), io.BytesIO()
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # holds paths of this machine
    torch.export.save(program, file, extra_files={"class_names.json": json.dumps(list(class_names))})
    return file.getvalue()


def as_onnx(folded: Classifier, class_names: Sequence[str]) -> bytes:
    """Export for ONNX Runtime: input `image`, output `logits`; class_names, as JSON, in the model's metadata."""
    from onnxscript import opset18

    def average(image: Any, output_size: Sequence[int]) -> Any:
        if any(side != 1 for side in output_size):
            raise ValueError("an adaptive average to more than one pixel")
        return opset18.GlobalAveragePool(image)

    example, dynamic_shapes = _example()
    program = torch.onnx.export(
        folded, example, dynamo=True, dynamic_shapes=dynamic_shapes, input_names=["image"], output_names=["logits"],
        opset_version=OPSET, external_data=False, verbose=False,
        # torch's own translation is a mean and a gather that costs more than the last convolution
        custom_translation_table={torch.ops.aten.adaptive_avg_pool2d.default: average})
    model = program.model_proto  # type: ignore[union-attr]
    graph = model.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]  # hold paths of this machine
    model.metadata_props.add(key="class_names", value=json.dumps(list(class_names)))
    return model.SerializeToString(deterministic=True)


def calibration_images(train: Split, count: int) -> np.ndarray:
    """The first images of each class, equally many: uint8, about `count` x 32 x 32 x 3."""
    classes = np.unique(train.labels)
    per_class = max(1, count // len(classes))
    return train.images[np.concatenate([np.flatnonzero(train.labels == label)[:per_class] for label in classes])]


def as_int8(model: bytes, images: np.ndarray) -> bytes:
    """Quantize an ONNX model's weights and activations to int8 with ONNX Runtime's quantizer: a scale for each channel of the
    weights, and one for each activation, by its minimum and maximum on `images` (uint8 N x 32 x 32 x 3).

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
        original, prepared, quantized = (Path(folder) / f"{name}.onnx" for name in ("original", "prepared", "quantized"))
        original.write_bytes(model)
        quant_pre_process(original, prepared, skip_symbolic_shape=True, skip_optimization=True)
        normalization = [node.name for node in onnx.load(prepared).graph.node if {"mean", "scale"} & {*node.input}]
        quantize_static(prepared, quantized, Reader(), calibrate_method=CalibrationMethod.MinMax, per_channel=True,
                        reduce_range=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                        nodes_to_exclude=normalization)  # so that the network's input is rounded once, after it
        return quantized.read_bytes()


def torch_logits(program: bytes) -> LogitsFunction:
    """Return the function that a torch.export program computes, on the CPU."""
    module = torch.export.load(io.BytesIO(program)).module()

    @torch.no_grad()
    def logits(images: np.ndarray) -> np.ndarray:
        return module(torch.from_numpy(images)).numpy()

    return logits
