"""Checkpoints: written atomically, checked by SHA-256, and read without running code from the file."""

import contextlib
import copy
import hashlib
import io
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from config import UserError
from tinycnn.runs.files import TEMPORARY, sync_folder, unwritable, write
from tinycnn.runs.finding import CHECKPOINT, PREVIOUS_CHECKPOINT
from tinycnn.runs.log import Row, check_rows
from tinycnn.runs.record import Record, check_record

State = dict[str, Any]
KEYS = {"net", "optimizer", "rows", "record", "places"}  # what every checkpoint has; `best` where images are held out
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
          torch.uint8, torch.bool)
DIGEST = hashlib.sha256().digest_size


class CheckpointCorrupt(UserError):
    """A checkpoint that is missing, damaged, or not one of this program."""


def make_state(net: nn.Module, optimizer: torch.optim.Optimizer, rows: list[Row], record: Record,
               places: Mapping[str, str]) -> State:
    """Return the content of a checkpoint. The tensors are the network's own, not copies."""
    return {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "rows": rows, "record": record,
            "places": dict(places)}


def copy_state(state: State) -> State:
    """A copy of what make_state returns; of its rows the list only. A GPU copies the tensors by a few kernels."""
    learned = [value for values in state["optimizer"]["state"].values() for value in values.values()]
    tensors = [value for value in (*state["net"].values(), *learned) if isinstance(value, torch.Tensor)]
    places = [(tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in tensors]
    copies = dict(zip(places, map(torch.empty_like, tensors), strict=True))  # shared weights stay shared
    for dtype in {tensor.dtype for tensor in tensors}:  # of several at once, it would copy each tensor by itself
        alike = [(place, tensor) for place, tensor in zip(places, tensors, strict=True) if tensor.dtype == dtype]
        torch._foreach_copy_([copies[place] for place, _ in alike], [tensor for _, tensor in alike])
    copied = {id(tensor): copies[place] for tensor, place in zip(tensors, places, strict=True)}
    return copy.deepcopy(state, copied | {id(row): row for row in state["rows"]})


def pack(state: Mapping[str, Any]) -> bytes:
    """`state` as a file that torch.load also reads, followed by its SHA-256."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    return content + hashlib.sha256(content).digest()


def write_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Make `state` the newest checkpoint in a run's folder, and the newest so far the previous one."""
    newest, fresh = folder / CHECKPOINT, folder / f"{TEMPORARY}{CHECKPOINT}"
    write(fresh, pack(state), durable=True)
    try:
        # A crash between the two renames leaves the previous checkpoint only, and resuming finds it.
        if newest.exists():
            os.replace(newest, folder / PREVIOUS_CHECKPOINT)
        os.replace(fresh, newest)
        sync_folder(folder)
    except OSError as error:
        raise unwritable(newest, error) from error


def unpack(path: Path) -> State:
    """The state in the file `path`, its tensors on the CPU. Raises CheckpointCorrupt."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointCorrupt(f"{path.name} can't be read ({error.strerror})") from error
    content, digest = data[:-DIGEST], data[-DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        raise CheckpointCorrupt(f"{path.name} is damaged (its checksum is wrong)")
    try:  # the checksum doesn't protect against a malicious file: load tensors and plain values only
        with warnings.catch_warnings(action="ignore"):  # of foreign content, about which the error says enough
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on foreign content
        raise CheckpointCorrupt(f"{path.name} holds no checkpoint that is safe to load") from error
    try:
        _check_state(state, path)
    except UserError as error:
        raise CheckpointCorrupt(f"{path.name} is no checkpoint of this program") from error
    return state


def _check_state(state: Any, path: Path) -> None:
    """Raise UserError unless `state` has the parts of a checkpoint, each of its type, and no tensor with a NaN."""
    if not isinstance(state, dict) or not state.keys() >= KEYS:
        raise UserError("a part is missing")
    best, optimizer, places = state.get("best"), state["optimizer"], state["places"]
    valid = _is_net(state["net"]) and isinstance(optimizer, dict) and isinstance(optimizer.get("state"), dict)
    valid = valid and all(isinstance(values, dict) and all(value is None or _is_tensor(value) for value in values.values())
                          for values in optimizer["state"].values())
    valid = valid and isinstance(places, dict) and all(isinstance(place, str) for place in places.values())
    if best is not None:
        valid = valid and isinstance(best, dict) and type(best.get("epoch")) is int and _is_net(best.get("net"))
        valid = valid and {name: tensor.shape for name, tensor in best["net"].items()} == {
            name: tensor.shape for name, tensor in state["net"].items()}
    if not valid:
        raise UserError("a part has the wrong type")
    check_rows(state["rows"], path)
    check_record(state["record"], path)


def _is_net(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) and _is_tensor(item) for name, item in value.items())


def _is_tensor(value: Any) -> bool:
    plain = isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_nested and value.dtype in DTYPES
    return plain and not value.isnan().any()  # infinity may stand in a buffer, such as a mask


def read_newest(folder: Path) -> tuple[State, list[str]]:
    """The newest valid state in a run's folder, and a list with a note if the newest checkpoint is damaged. Raises UserError
    where no checkpoint is valid."""
    try:
        return unpack(folder / CHECKPOINT), []
    except CheckpointCorrupt as newest:
        try:
            return unpack(folder / PREVIOUS_CHECKPOINT), [f"{newest}: went on from {PREVIOUS_CHECKPOINT}"]
        except CheckpointCorrupt as previous:
            raise UserError(f"run {folder.name} can't be resumed: {newest}, and {previous}; start a new run") from previous


def read_places(folder: Path) -> dict[str, str]:
    """Where the run in `folder` had its images, its logs and its teacher: data_dir, log_dir and teacher, by its newest valid
    checkpoint. Empty where it has none."""
    for name in (CHECKPOINT, PREVIOUS_CHECKPOINT):
        with contextlib.suppress(CheckpointCorrupt):
            return unpack(folder / name)["places"]
    return {}
