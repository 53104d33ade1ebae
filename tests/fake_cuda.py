"""CUDA without a GPU: tensors whose device is cuda:0 and that have a shape, strides and a dtype, but no data.

Nothing is computed. What would be launched is counted, and so are the bytes that it would move at the least; what would make
the host wait for the GPU, or bring tensors of two devices together, is named; so are races of two streams. Whether a capture
is legal, numerics and speed can't be seen.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinycnn import device as device_module
from tinycnn.device import memory_format

CUDA = torch.device("cuda:0")
# Operations that launch nothing: other views of the same memory, and memory that is not filled
NO_KERNEL = {"view", "_unsafe_view", "_reshape_alias", "alias", "as_strided", "detach", "t", "transpose", "permute", "expand",
             "unbind", "split", "split_with_sizes", "slice", "select", "unsqueeze", "squeeze", "lift_fresh", "device",
             "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# Operations that launch two kernels: sums and their use; gradients of the input and of the weight
TWO_KERNELS = {"convolution_backward", "native_batch_norm", "native_batch_norm_backward"}
COPIES = {"_to_copy", "copy_"}
WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2"}


def _is_blocking_copy(name: str, args: tuple, kwargs: dict[str, Any], target: Tensor) -> bool:
    """Whether the host waits for a copy from one device to another; that its memory is pinned can't be seen."""
    source = args[1] if name == "copy_" else args[0]
    asynchronous = kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
    return not asynchronous and source.device.type != target.device.type


class Launches(TorchDispatchMode):
    """Counts kernels and bytes by operation, with the dtypes that come out, and names those that the host waits for, and those
    on tensors of two devices (scalars may lie anywhere)."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.dtypes: dict[str, set[torch.dtype]] = {}
        self.waits: list[str] = []
        self.mixed: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        inputs = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        if name in WAITING or (name == "index" and any(tensor.dtype == torch.bool for tensor in inputs[1:])):
            self.waits.append(name)
        result = operation(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        tensors = inputs + outputs
        if name in COPIES and _is_blocking_copy(name, args, kwargs or {}, outputs[0]):
            self.waits.append(name)
        if name in NO_KERNEL or not any(tensor.is_cuda for tensor in tensors):
            return result
        if len({tensor.device.type for tensor in tensors if tensor.dim()}) > 1:
            self.mixed.append(name)
        evaluating = name == "native_batch_norm" and not args[5]
        self.kernels[name] += 2 if name in TWO_KERNELS and not evaluating else 1
        self.dtypes.setdefault(name, set()).update(tensor.dtype for tensor in outputs)
        if name in ("index", "index_select"):  # reads as much of the first as it writes
            inputs = [*outputs, *inputs[1:]]
        self.bytes[name] += sum(map(size, outputs)) + sum(map(size, inputs))
        return result

    @property
    def total(self) -> tuple[int, float]:
        """Kernels, and bytes in MB."""
        return sum(self.kernels.values()), sum(self.bytes.values()) / 1e6


class Stream:
    """Stands for a CUDA stream."""

    device = CUDA

    def __init__(self) -> None:
        self.done: Counter[Stream] = Counter()  # of each stream, how many launches are done before the next one here begins

    def wait_stream(self, other: "Stream") -> None:
        self.done |= other.done

    @property
    def launched(self) -> int:
        return self.done[self]


@dataclass
class Memory:
    """What a tensor lies in. When freed, it is for later launches in `owner`, the stream that it was made in."""

    owner: Stream
    storage: StorageWeakRef
    written: Counter[Stream] = field(default_factory=Counter)  # by which launch of each stream, last
    used: Counter[Stream] = field(default_factory=Counter)


class Streams(TorchDispatchMode):
    """Stand-ins for the main stream and the second ones, and what races there: launches on the same memory in two of them, of
    which the later one doesn't wait for the other."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.steps, self.batches = Stream(), Stream(), Stream()
        self.current = self.main
        self.memory: dict[int, Memory] = {}
        self.races: list[str] = []

    @contextmanager
    def switch(self, stream: Stream | None) -> Iterator[None]:
        """Stands for torch.cuda.stream."""
        before, self.current = self.current, stream or self.current
        try:
            yield
        finally:
            self.current = before

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self._reuse()
        result, name = operation(*args, **(kwargs or {})), operation.overloadpacket.__name__
        if name in NO_KERNEL:
            return result
        read, written = ({memory.storage.cdata: memory for memory in map(self._of, tree_leaves(part)) if memory}
                         for part in ((args, kwargs or {}), result))
        done = self.current.done
        self.races += [f"{name} reads" for memory in read.values() if not memory.written <= done]
        self.races += [f"{name} writes" for memory in written.values() if not memory.used <= done]
        done[self.current] += 1
        for memory in written.values():
            memory.written[self.current] = self.current.launched
        for memory in (read | written).values():
            memory.used[self.current] = self.current.launched
        return result

    def _of(self, leaf: object) -> Memory | None:
        if not isinstance(leaf, Tensor) or not leaf.is_cuda:
            return None
        storage = StorageWeakRef(leaf.untyped_storage())
        return self.memory.setdefault(storage.cdata, Memory(self.current, storage))

    def _reuse(self) -> None:
        """Give what is freed to the launches that follow in its stream."""
        for key, memory in list(self.memory.items()):
            if memory.owner is self.current and memory.storage.expired():
                del self.memory[key]
                if not memory.used <= self.current.done:
                    self.races.append("freed")


@contextmanager
def second_streams() -> Iterator[Streams]:
    """Within fake_cuda: there is a second stream for each kind of work, and what is launched in the body is looked at."""
    with ExitStack() as stack:
        streams = Streams()
        for place, name, stand_in in ((device_module, "_stream", lambda index, work: getattr(streams, work)),
                                      (torch.cuda, "current_stream", lambda device: streams.current),
                                      (torch.cuda, "stream", streams.switch)):
            stack.enter_context(mock.patch.object(place, name, stand_in))
        yield stack.enter_context(streams)


def size(tensor: Tensor) -> int:
    """Bytes of the elements that differ: an expanded dimension has one."""
    sides = [side for side, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return tensor.element_size() * int(np.prod(sides))


def to_fake_cuda(net: nn.Module) -> nn.Module:
    """Give `net` CUDA tensors of the same shapes and dtypes, in the memory format that the program would choose: Module.to
    can't swap fake parameters."""
    def like(tensor: Tensor) -> Tensor:
        order = memory_format(CUDA) if tensor.dim() == 4 else torch.contiguous_format
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA, memory_format=order)

    for module in net.modules():
        module._parameters |= {name: nn.Parameter(like(each)) for name, each in module._parameters.items() if each is not None}
        module._buffers |= {name: like(each) for name, each in module._buffers.items() if each is not None}
    return net


@torch.no_grad()
def backward(loss: Tensor) -> None:
    """The backward pass, node by node. Autograd's own engine asks the driver for a context."""
    waiting: Counter[Any] = Counter()
    todo, seen = [loss.grad_fn], {loss.grad_fn}
    while todo:
        for after, _ in todo.pop().next_functions:
            waiting[after] += 1
            if after is not None and after not in seen:
                seen.add(after)
                todo.append(after)
    gradients: dict[Any, dict[int, Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
    todo = [loss.grad_fn]
    while todo:
        node = todo.pop()
        inputs = gradients.pop(node)
        if hasattr(node, "variable"):
            accumulate(node.variable, inputs[0])
            continue
        results = node(*(inputs.get(place) for place in range(len(node._input_metadata) or 1)))
        results = results if isinstance(results, tuple) else (results,)
        for (after, place), result in zip(node.next_functions, results, strict=bool(node.next_functions)):
            if after is None:
                continue
            if result is not None:
                sums = gradients.setdefault(after, {})
                sums[place] = sums[place] + result if place in sums else result
            waiting[after] -= 1
            if not waiting[after]:
                todo.append(after)


def accumulate(parameter: Tensor, gradient: Tensor) -> None:
    """Hand a gradient to its parameter, as the engine does: without a copy where it lies in memory as the parameter does."""
    assert (gradient.shape, gradient.dtype, gradient.device) == (parameter.shape, parameter.dtype, parameter.device)
    if parameter.grad is not None:
        parameter.grad += gradient
    elif gradient.stride() == parameter.stride():
        parameter.grad = gradient
    else:
        parameter.grad = torch.empty_like(parameter).copy_(gradient)


def fused_sgd(parameters, gradients, momenta, *, lr, is_first_step, **_) -> None:
    """Stands for torch._fused_sgd_, which has no fake kernel: what its CUDA kernel asks of its tensors. One launch."""
    for group in zip(parameters, gradients, *([momenta] if momenta else []), strict=True):
        assert len({(each.device, each.dtype, each.shape) for each in group}) == 1, group
        for side, *strides in zip(group[0].shape, *(each.stride() for each in group), strict=True):
            assert side == 1 or len(set(strides)) == 1, group
    if isinstance(lr, Tensor):
        assert (lr.device, lr.dtype, lr.numel()) == (parameters[0].device, torch.float32, 1)
    torch._foreach_add_([*parameters, *momenta], 0)  # to be counted


@contextmanager
def fake_cuda(bfloat16: bool = True) -> Iterator[list[tuple]]:
    """Tensors made in the body are fake, and may lie on CUDA. Gives the shapes of tensors whose values the host reads, all of
    which are 1. `bfloat16`: whether the GPU has it."""
    reads: list[tuple] = []

    def read(tensor: Tensor) -> list:
        reads.append(tuple(tensor.shape))
        return np.ones(tensor.shape).tolist()  # a count to divide by; an error that is just allowed

    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for place, name, stand_in in (
                (torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16),
                (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),  # else autocast does nothing
                (torch, "_fused_sgd_", fused_sgd),
                (torch.Tensor, "backward", backward),
                (FakeTensor, "tolist", read),
                (torch.Tensor, "pin_memory", lambda tensor: tensor),
                (torch.random, "fork_rng", lambda *_: nullcontext()),
                (device_module, "_stream", lambda index, work: None)):  # see second_streams
            stack.enter_context(mock.patch.object(place, name, stand_in))
        yield reads
