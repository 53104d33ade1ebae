"""Read and check what describes a run: config.json, the log, the summary."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

from config import ALIASES, SETTINGS, UserError, check_setting
from tinycnn.runs.log import ACCURACY_LOG, Row, read_log
from tinycnn.sources import check_sources

CONFIG, SUMMARY, MODEL = "config.json", "summary.json", "model.py"  # files in a run's folder
NAME_WEIGHTS = ("init", "teacher")  # settings that name trained weights; in records by name and digest
FINAL, BEST = "final.safetensors", "best.safetensors"
Record = dict[str, Any]  # what config.json holds

SCALAR = (str, int, float, bool)
SCHEMA = {  # the keys and types that every config.json has
    "config": {"seed": int, "epochs": int, "validation": int},
    "network": {"parameters": int, "multiply_adds": int, "receptive_field": int | None},
    "dataset": {"kind": str, "class_names": [str], "sha256": str, "train": int, "validation": int, "test": int,
                "mean": [float], "deviation": [float]},
    "machine": {"device": str}, "versions": {}, "notes": [str],
}


@dataclass(frozen=True)
class SavedRun:
    """A run, read from its folder: `record` is the content of config.json, `summary` that of summary.json, or None while the
    run isn't finished."""

    folder: Path
    record: Record
    comments: list[str]
    rows: list[Row]
    summary: dict[str, Any] | None


def digests(names: str) -> str:
    """A record's teachers or init, RUN:DIGEST,RUN:DIGEST, without the names of the runs: weights are the same whatever their
    folder is called."""
    return re.sub(r"[^:]*:([0-9a-f]{8})(,|$)", r"\1\2", names)


def summarize(rows: Sequence[Row]) -> dict[str, float | int]:
    """The content of summary.json: the last epoch's figures, and the seconds of all epochs."""
    last = {name: value for name, value in rows[-1].items() if name not in ("epoch", "lr", "seconds")}
    return {"epochs": len(rows)} | {k: v for k, v in last.items() if not math.isnan(v)} | {
        "seconds": round(math.fsum(row["seconds"] for row in rows), 2)}


def as_json(content: Mapping[str, Any]) -> str:
    """How JSON is written into a run's folder."""
    return json.dumps(content, indent=1) + "\n"


def read_run(folder: Path) -> SavedRun:
    """Everything in a run's folder but weights and checkpoints."""
    comments, rows = read_log(folder / ACCURACY_LOG)
    return SavedRun(folder, read_record(folder), comments, rows, read_summary(folder) if (folder / SUMMARY).exists() else None)


def read_record(folder: Path) -> Record:
    """The content of a run's config.json, its settings by their present names."""
    record = _read_json(folder / CONFIG)
    check_record(record, folder / CONFIG)
    return record | {"config": present_names(record["config"])}


def present_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an earlier version by their present names and values."""
    known = {ALIASES.get(name, name): value for name, value in settings.items()}
    if isinstance(known.get("capture"), bool):  # as it once was
        known["capture"] = "on" if known["capture"] else "off"
    if isinstance(known.get("warmup"), float):
        known["warmup"] = round(known["warmup"])
    return known


def read_summary(folder: Path) -> dict[str, Any]:
    """The content of a run's summary.json."""
    summary = _read_json(folder / SUMMARY)
    needed = {"epochs", "train_loss", "train_acc", "test_loss", "test_acc", "seconds"}
    if not needed <= summary.keys() or not all(_matches(value, (int, float)) for value in summary.values()):
        raise UserError(f"{folder / SUMMARY} is damaged: it is no summary of a run")
    return summary


def check_record(record: object, path: Path) -> None:
    """Raise UserError unless `record`, read from `path`, is the content of a config.json of this program."""
    if not _matches(record, SCHEMA):
        raise UserError(f"{path} is damaged, or not a config.json of this program")
    assert isinstance(record, dict)
    procedure = record.get("procedure", {})  # older runs have that
    valid = isinstance(procedure, dict) and all(isinstance(value, str) for value in procedure.values())
    valid = valid and all(type(each) in SCALAR for name in ("config", "machine", "versions") for each in record[name].values())
    if not valid or not check_sources(record.get("sources")) or not (
            len(record["dataset"]["mean"]) == 3 == len(record["dataset"]["deviation"])):
        raise UserError(f"{path} is damaged, or not a config.json of this program")
    for name, value in present_names(record["config"]).items():
        if name in SETTINGS:
            try:
                check_setting(SETTINGS[name], value)
            except UserError as error:
                raise UserError(f"{path} is damaged, or was made with another config.py: {error}") from error


def _matches(value: object, shape: Any) -> bool:
    """Whether a JSON value has a shape: a type, several, a list of a shape, or a dict of shapes that may have more keys."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(key in value and _matches(value[key], inner) for key, inner in shape.items())
    if isinstance(shape, list):
        return isinstance(value, list) and all(_matches(item, shape[0]) for item in value)
    types = shape if isinstance(shape, tuple | UnionType) else (shape,)
    return isinstance(value, types) and (not isinstance(value, bool) or shape is bool)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        raise UserError(f"{path} can't be read ({getattr(error, 'strerror', None) or error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return content
