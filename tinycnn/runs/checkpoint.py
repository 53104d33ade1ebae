"""Checkpoints: written atomically, checked by SHA-256, and read without running code from the file."""

import contextlib
import hashlib
import io
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from config import UserError
from tinycnn.runs.files import TEMPORARY, sync_folder, unwritable, write
from tinycnn.runs.finding import CHECKPOINT, PREVIOUS_CHECKPOINT
from tinycnn.runs.log import check_rows
from tinycnn.runs.record import check_record

# What a checkpoint holds: net, optimizer and scheduler (their state_dicts), rows (the log so far), record (config.json), places
# (paths on this machine: data_dir, log_dir, teacher), and best (the epoch and the network of the highest validation accuracy).
# Older ones have no scheduler
State = dict[str, Any]
KEYS = {"net", "optimizer", "rows", "record", "places"}
DIGEST = hashlib.sha256().digest_size


class CheckpointCorrupt(UserError):
    """A checkpoint that is missing, damaged, or not one of this program."""


def pack(state: State) -> bytes:
    """`state` as a file that torch.load also reads, followed by its SHA-256."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    return content + hashlib.sha256(content).digest()


def write_checkpoint(folder: Path, state: State) -> None:
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
        content, digest = data[:-DIGEST], data[-DIGEST:]
        if hashlib.sha256(content).digest() != digest:
            raise ValueError("its checksum is wrong")
        with warnings.catch_warnings(action="ignore"):  # of foreign content, about which the error says enough
            # the checksum doesn't protect against a malicious file: load tensors and plain values only
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        _check_state(state, path)
    except Exception as error:  # torch.load raises nearly anything on foreign content
        raise CheckpointCorrupt(f"{path.name} is damaged, or no checkpoint of this program "
                                f"({getattr(error, 'strerror', None) or ' '.join(str(error).split())[:100]})") from error
    return state


def _check_state(state: Any, path: Path) -> None:
    """Raise ValueError or UserError unless `state` is that of a checkpoint, with no tensor that holds a NaN."""
    if not isinstance(state, dict) or not state.keys() >= KEYS:
        raise ValueError("a part is missing")
    best, optimizer, places = state.get("best"), state["optimizer"], state["places"]
    nets = [state["net"], *([best["net"]] if best else [])]
    valid = all(isinstance(net, dict) and all(map(_is_tensor, net.values())) for net in nets)
    valid = valid and all(value is None or _is_tensor(value)
                          for values in optimizer["state"].values() for value in values.values())
    valid = valid and all(isinstance(place, str) for place in places.values())
    if not valid or (best and (type(best["epoch"]) is not int or {name: each.shape for name, each in nets[0].items()} != {
            name: each.shape for name, each in nets[1].items()})):
        raise ValueError("a part has the wrong type")
    check_rows(state["rows"], path)
    check_record(state["record"], path)


def _is_tensor(value: Any) -> bool:
    plain = isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_nested
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


def read_local_paths(folder: Path) -> dict[str, str]:
    """Where the run in `folder` had its images, its logs and its teacher: data_dir, log_dir and teacher, by its newest valid
    checkpoint. Empty where it has none."""
    for name in (CHECKPOINT, PREVIOUS_CHECKPOINT):
        with contextlib.suppress(CheckpointCorrupt):
            return unpack(folder / name)["places"]
    return {}


def load_states(state: State, net: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LRScheduler) -> None:
    """Load a checkpoint into what was built for the same config. Raises nearly anything where the state doesn't fit."""
    net.load_state_dict(state["net"])
    saved, current = state["optimizer"], optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    learned = {index: dict(values) for index, values in saved["state"].items()}
    for index, values in learned.items():
        for name, value in values.items():
            if value is None or name == "step":
                continue
            if name == "momentum_buffer" and value.shape != parameters[index].shape:
                raise ValueError(f"the momentum of parameter {index} has the shape {value.shape}")
            if value.shape == parameters[index].shape:  # the parameter's memory format: fused optimizers want no other
                values[name] = torch.empty_like(parameters[index], dtype=value.dtype).copy_(value)
    if "scheduler" in state:  # it may have changed the settings of the groups; how they are computed is the device's
        machine = ("fused", "foreach", "capturable")
        current = [before | {name: group[name] for name in machine if name in group}
                   for before, group in zip(saved["param_groups"], current, strict=True)]
    optimizer.load_state_dict({"state": learned, "param_groups": current})
    if "scheduler" in state:
        scheduler.load_state_dict(state["scheduler"])
        return
    with warnings.catch_warnings(action="ignore"):  # that no step of the optimizer came before
        for _ in state["rows"]:
            scheduler.step()
