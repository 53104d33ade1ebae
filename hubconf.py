"""The trained networks for torch.hub.

    net = torch.hub.load("OWNER/NAME", "tiny_cifar10", weights="best")
    net = torch.hub.load("FOLDER", "tiny_cifar10", weights="best", source="local")
    net.classes[net(np.asarray(Image.open("cat.jpg").convert("RGB"))).argmax(1)]
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinycnn.inference.classifier import AnySizeClassifier

dependencies = ["torch", "numpy", "cv2", "PIL", "filelock", "safetensors"]
HERE = Path(__file__).resolve().parent
REFERENCE = HERE / "logs" / "reference"
COMMITTED = {"baseline": REFERENCE} | {path.parents[1].name: path.parent
                                       for path in sorted(REFERENCE.glob("*/seed-0/final.safetensors"))}


def tiny_cifar10(weights: str = "best", model_file: str | None = None) -> "AnySizeClassifier":
    """A trained network, in evaluation mode, on the CPU. It takes a uint8 tensor or array of images of any size, N x H x W x 3
    or H x W x 3, RGB, resizes and normalizes them, and returns logits, float32 N x 10; `.classes` has the name of each.

    `weights`: the name of a committed run, or the path of a run's folder or of a .safetensors file. `model_file`: a model.py to
    run, for weights of another network than this folder's. Raises ValueError where there are no such weights.
    """
    if weights not in COMMITTED and not Path(weights).exists():
        raise ValueError(f"weights is {weights!r}, but must be one of {', '.join(COMMITTED)}, or a path")
    with _own_modules():
        from tinycnn.inference.classifier import AnySizeClassifier
        from tinycnn.runs.weights import find_weights, read_weights

        path = find_weights(HERE / "logs", str(COMMITTED.get(weights, weights)))
        return AnySizeClassifier(read_weights(path), model_file)


@contextmanager
def _own_modules() -> Iterator[None]:
    """In the body, import finds this folder's modules first. Afterwards none of their names is taken: a program may have a
    `config` or a `model` of its own, loaded before or later."""
    def loaded() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] in names]

    names = {path.stem for path in HERE.glob("*.py")} | {"tinycnn"}
    others = {name: sys.modules.pop(name) for name in loaded()}
    sys.path.insert(0, str(HERE))
    try:
        yield
    finally:
        sys.path.remove(str(HERE))
        for name in loaded():
            del sys.modules[name]
        sys.modules.update(others)
