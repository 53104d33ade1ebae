"""A trained network as one HTML file that classifies pictures in a browser."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import fx, nn

from config import UserError
from tinycnn.cores import available_cores
from tinycnn.data.dataset import Split
from tinycnn.inference.classifier import Classifier

TEMPLATE = Path(__file__).with_name("page.html")
MAX_BYTES = 1_500_000  # of the file, so that it can be sent by mail
EXAMPLES = 10  # images to try
CONVOLUTION, RELU, AVERAGE, NOTHING, FLATTEN = "cra-f"
OPERATIONS: dict[Any, str] = {
    nn.Conv2d: CONVOLUTION, nn.ReLU: RELU, nn.functional.relu: RELU, torch.relu: RELU, "relu": RELU,
    nn.AdaptiveAvgPool2d: AVERAGE, nn.Dropout: NOTHING, nn.Identity: NOTHING, nn.Flatten: FLATTEN, torch.flatten: FLATTEN,
    "flatten": FLATTEN}
LAYERS = ("it runs nn.Conv2d, dense or depthwise, and nn.ReLU, one after the other, then nn.AdaptiveAvgPool2d(1), a 1x1 "
          "nn.Conv2d and flatten(1), as in model.py; use --to onnx")
CHECK = """
const images = require("fs").readFileSync(0), size = SIDE * SIDE * 3, logits = [];
for (let at = 0; at < images.length; at += size) logits.push(...classify(images.subarray(at, at + size)).logits);
process.stdout.write(new Uint8Array(Float32Array.from(logits).buffer));
"""


def as_page(folded: Classifier, class_names: Sequence[str], test: Split) -> bytes:
    """Write the page of a classifier whose BatchNorm is folded, with some of the images of `test` to try. Raises UserError for
    a network that the page can't run, or that is too large to send."""
    layers, weights = [], []
    for convolution, relu in convolutions(folded.net):  # type: ignore[arg-type]  # fold() makes an fx.GraphModule
        depthwise = convolution.groups > 1
        kernel = convolution.weight.detach().permute((2, 3, 0, 1) if depthwise else (0, 2, 3, 1))  # as page.html reads it
        bias = torch.zeros(convolution.out_channels) if convolution.bias is None else convolution.bias.detach()
        weights += [kernel.flatten(), bias]
        layers.append({"inputs": convolution.in_channels, "outputs": convolution.out_channels, "depthwise": depthwise,
                       "kernel": convolution.kernel_size, "stride": convolution.stride, "padding": convolution.padding,
                       "dilation": convolution.dilation, "relu": relu})
    model = {"classes": class_names, "mean": (folded.mean[:, 0, 0] / 255).tolist(),
             "std": (1 / (255 * folded.scale[:, 0, 0])).tolist(), "layers": layers,
             "examples": example_images(test, class_names),
             "weights": base64.b64encode(torch.cat(weights).numpy().astype("<f4").tobytes()).decode()}
    text = json.dumps(model).replace("<", "\\u003c")  # a class may be called </script>
    page = TEMPLATE.read_text(encoding="utf-8").replace("{{model}}", text).encode()
    if len(page) > MAX_BYTES:
        raise UserError(f"the page would have {len(page):,} bytes, more than {MAX_BYTES:,}: export a narrower network, or use "
                        "--to onnx")
    return page


def convolutions(net: fx.GraphModule) -> list[tuple[nn.Conv2d, bool]]:
    """The convolutions of a network, in order, and whether a ReLU follows each. The last one is the classifier: the logits are
    the average of its outputs, as it may come before the average instead of after it. Raises UserError for a network that has
    other layers."""
    found: list[tuple[nn.Conv2d, bool]] = []
    order = ""
    previous: Any = None
    for node in net.graph.nodes:
        if node.op not in ("placeholder", "output"):
            layer: Any = net.get_submodule(node.target) if node.op == "call_module" else node.target
            operation = OPERATIONS.get(type(layer) if node.op == "call_module" else layer, "?")
            if operation == "?" or not _can_run(layer) or len(previous.users) > 1:
                raise UserError(f"the page can't run {node.name} ({layer}): {LAYERS}")
            if operation == CONVOLUTION:
                found.append((layer, False))
            elif operation == RELU and found:
                found[-1] = found[-1][0], True
            order += operation.replace(NOTHING, "")
        previous = node
    if not re.fullmatch("(cr?)+acf", order) or (found[-1][0].kernel_size, found[-1][0].padding) != ((1, 1), (0, 0)):
        raise UserError(f"the page can't run layers in this order: {LAYERS}")
    return found


def _can_run(layer: Any) -> bool:
    if isinstance(layer, nn.Conv2d):
        depthwise = layer.groups == layer.in_channels == layer.out_channels
        return (layer.groups == 1 or depthwise) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return not isinstance(layer, nn.AdaptiveAvgPool2d) or layer.output_size in (1, (1, 1))


def example_images(test: Split, class_names: Sequence[str]) -> list[dict[str, str]]:
    """The first image of each of the first classes, as a data URL, and the name of its class."""
    examples = []
    for label in np.unique(test.labels)[:EXAMPLES]:
        file = io.BytesIO()
        Image.fromarray(test.images[np.flatnonzero(test.labels == label)[0]]).save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        examples.append({"name": class_names[label], "url": url})
    return examples


def node_logits(page: bytes, images: np.ndarray) -> np.ndarray | None:
    """Compute the logits of images, uint8 N x 32 x 32 x 3, by the page's own script in Node.js: float32 N x classes, or None
    without `node` on PATH."""
    node = shutil.which("node")
    if node is None:
        return None
    script = re.search('<script id="network">(.*?)</script>', page.decode(), re.DOTALL)
    assert script
    if len(images) > 1000:  # 10 ms each
        print(f"running the page on {len(images):,} images in Node.js ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        program = Path(folder) / "check.js"
        program.write_text(script[1] + CHECK, encoding="utf-8")

        def run(part: np.ndarray) -> bytes:
            return subprocess.run([node, program], input=part.tobytes(), capture_output=True, check=True).stdout

        try:
            outputs = b"".join(pool.map(run, np.array_split(images, available_cores())))
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"{node} can't run the page ({error}): update Node.js, or take it off PATH to export without a "
                            "check") from error
    return np.frombuffer(outputs, "<f4").reshape(len(images), -1)
