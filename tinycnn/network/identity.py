"""What a network computes, as a fingerprint and in figures for config.json."""

import ast
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from tinycnn.network.receptive_field import convolutions, in_mode


def describe_network(net: nn.Module) -> dict[str, Any]:
    """What config.json says of `net`: its trainable parameters; the multiply-adds of its convolutions for one image; the
    receptive field, in pixels, of the last convolution that slides over a map (None where it can't be followed); and its
    identity."""
    layers = convolutions(net)
    sliding = [layer for layer in layers if layer.output[1:] != (1, 1)] or layers
    return {
        "parameters": sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad),
        "multiply_adds": sum(layer.multiply_adds for layer in layers),
        "receptive_field": sliding[-1].receptive_field if sliding else None,
        "identity": network_identity(net),
    }


def network_identity(net: nn.Module) -> str:
    """Hash what `net` computes, to 16 hex digits.

    The hash covers the name, shape and dtype of every parameter and buffer, whether a parameter is trained, and what torch.fx
    records of a forward pass, in training and in evaluation mode: each operation, its settings, and which results it takes. It
    covers neither the text of the source nor the values of the weights, the device and the memory format.

    Where torch.fx can't follow the code (an `if` on the values or the size of a tensor), the hash covers all layers with
    their settings, and the source files of their classes without comments, docstrings and layout. Then a renamed variable or
    a change elsewhere in the file gives another hash, and a change in a file from which only functions are imported is missed.

    `net` and the random generators are left as they were.
    """
    try:
        structure: list[Any] = [operation for mode in (True, False) for operation in _trace(net, mode)]
    except Exception:  # the network's code meets stand-ins for tensors, and may raise anything
        structure = [_describe_layer(net), *_sources(net)]
    return fingerprint([_describe_tensors(net), structure])


def fingerprint(content: Any) -> str:
    """Hash what JSON can hold, to 16 hex digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def plain_source(path: Path) -> str:
    """A Python file's source without comments, docstrings and layout."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
            node.body[0] = ast.Pass()
    return ast.unparse(tree)


def _trace(net: nn.Module, training: bool) -> Iterator[list[Any]]:
    """The operations of a forward pass, in order; each refers to earlier ones by their numbers."""
    with in_mode(net, training), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # a draw may decide which way the code goes
        graph = fx.Tracer().trace(net)
    numbers = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        operation: Any = node.target
        if node.op == "call_module":
            operation = _describe_layer(net.get_submodule(node.target), node.target)
        elif node.op == "get_attr":
            operation = _describe_constant(net, node.target)
        elif node.op == "placeholder":
            operation = "input"
        elif callable(operation):
            operation = operation.__name__
        yield [operation, _describe_value(node.args, numbers), _describe_value(node.kwargs, numbers)]


def _describe_tensors(net: nn.Module) -> dict[str, list[Any]]:
    """Shape and dtype of each parameter and buffer by name, the first name of the same tensor where it has several, and whether
    it is a parameter that isn't trained."""
    first: dict[int, str] = {}
    tensors = {**dict(net.named_parameters(remove_duplicate=False)), **dict(net.named_buffers(remove_duplicate=False))}
    return {name: [list(tensor.shape), str(tensor.dtype), first.setdefault(id(tensor), name),
                   *(["frozen"] if isinstance(tensor, nn.Parameter) and not tensor.requires_grad else [])]
            for name, tensor in sorted(tensors.items())}


def _describe_layer(layer: nn.Module, name: str = "") -> list[Any]:
    """The class of a layer, its settings, and the same of the layers inside; its name only where it has weights, by which
    they are told apart."""
    settings = {key: _describe_value(value) for key, value in vars(layer).items() if key[0] != "_" and key != "training"}
    inside = [_describe_layer(child, key) for key, child in layer.named_children()]
    weighted = any(True for _ in chain(layer.parameters(), layer.buffers()))
    return [type(layer).__name__, name if weighted else "", settings, inside]


def _describe_constant(net: nn.Module, name: str) -> Any:
    """A tensor that the code takes by itself: by its name, or by its values where it is no parameter or buffer."""
    if name in dict(net.named_parameters(remove_duplicate=False)) or name in dict(net.named_buffers(remove_duplicate=False)):
        return name
    value: Any = net
    for part in name.split("."):
        value = getattr(value, part)
    return _describe_value(value)


def _describe_value(value: Any, numbers: dict[fx.Node, int] | None = None) -> Any:
    """A setting or an argument as JSON has it, without addresses. `numbers` are those of a trace's operations."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, fx.Node):
        return {"result": (numbers or {})[value]}
    if isinstance(value, list | tuple):
        return [_describe_value(item, numbers) for item in value]
    if isinstance(value, dict):
        return {str(key): _describe_value(item, numbers) for key, item in value.items()}
    if isinstance(value, slice):
        return {"slice": _describe_value([value.start, value.stop, value.step], numbers)}
    if isinstance(value, torch.Tensor):
        return {"tensor": value.detach().tolist(), "dtype": str(value.dtype)}
    if isinstance(value, torch.dtype | torch.device | torch.memory_format):
        return str(value)
    return value.__name__ if isinstance(value, type | Callable) and hasattr(value, "__name__") else type(value).__name__


def _sources(net: nn.Module) -> list[str]:
    """The source files of the modules' classes, sorted, without comments, docstrings and layout. Torch's own are left out,
    and so is a class whose source can't be found."""
    files = set()
    for module in net.modules():
        if not type(module).__module__.startswith("torch."):
            files.add(inspect.unwrap(type(module).forward).__code__.co_filename)
    return sorted(plain_source(Path(file)) for file in files if Path(file).is_file())
