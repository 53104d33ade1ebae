"""Read and check what describes a run: config.json, the log, the summary."""

import importlib.metadata
import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import UnionType
from typing import Any

from config import SETTINGS, Config, UserError, check_setting
from tinycnn.data.dataset import Images
from tinycnn.runs.log import ACCURACY_LOG, Row, read_log

CONFIG, SUMMARY, MODEL = "config.json", "summary.json", "model.py"  # files in a run's folder
FINAL, BEST = "final.safetensors", "best.safetensors"
PATHS = ("data_dir", "log_dir")  # paths on this machine, left out of a run's records
PACKAGES = {"torch": "torch", "torchvision": "torchvision", "cv2": "opencv-python-headless", "numpy": "numpy",
            "albumentations": "albumentations"}
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
class Run:
    """A run: `record` is the content of config.json, `summary` that of summary.json, or None while the run isn't finished."""

    folder: Path
    record: Record
    comments: list[str]
    rows: list[Row]
    summary: dict[str, Any] | None


def make_record(config: Config, network: Mapping[str, Any], procedure: Mapping[str, str], images: Images,
                machine: Mapping[str, Any], number: int, teacher: str) -> Record:
    """The content of config.json. `network` is that of tinycnn.network.identity.describe_network, `procedure` that of
    tinycnn.training.procedure.describe_procedure, `machine` has the device, the instruction set, and the number of processes where
    there are several, `number` counts the runs of a log folder, `teacher` names the teacher's weights wherever they lie."""
    mean, std = images.statistics
    return {
        "number": number,
        "config": {key: value for key, value in asdict(config).items() if key not in PATHS} | {"teacher": teacher},
        "network": dict(network),
        "procedure": dict(procedure),
        "dataset": {"kind": images.kind, "class_names": list(images.class_names), "sha256": images.fingerprint,
                    "train": len(images.train), "validation": len(images.validation), "test": len(images.test),
                    "mean": list(mean), "deviation": list(std)},
        "machine": {**machine, "system": platform.system()},
        "versions": {"python": platform.python_version()} | {
            name: version for name, package in PACKAGES.items() if (version := _installed(package))},
        "notes": [],
    }


def _installed(package: str) -> str | None:
    """The version in the package's metadata: importing torchvision fails where it doesn't fit torch."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def teacher_digests(teacher: str) -> str:
    """A record's teachers, RUN:DIGEST,RUN:DIGEST, without the names of the runs: weights are the same whatever their folder is
    called."""
    return re.sub(r"[^:]*:([0-9a-f]{8})(,|$)", r"\1\2", teacher)


def summarize(rows: Sequence[Row]) -> dict[str, float | int]:
    """The content of summary.json: the last epoch's figures, and the seconds of all epochs."""
    last = {name: value for name, value in rows[-1].items() if name not in ("epoch", "lr", "seconds")}
    return {"epochs": len(rows)} | {k: v for k, v in last.items() if not math.isnan(v)} | {
        "seconds": round(math.fsum(row["seconds"] for row in rows), 2)}


def as_json(content: Mapping[str, Any]) -> str:
    """How JSON is written into a run's folder."""
    return json.dumps(content, indent=1) + "\n"


def read_run(folder: Path) -> Run:
    """Everything in a run's folder but weights and checkpoints."""
    comments, rows = read_log(folder / ACCURACY_LOG)
    return Run(folder, read_record(folder), comments, rows, read_summary(folder) if (folder / SUMMARY).exists() else None)


def read_record(folder: Path) -> Record:
    """The content of a run's config.json."""
    record = _read_json(folder / CONFIG)
    check_record(record, folder / CONFIG)
    return record


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
    procedure = record.get("procedure", {})  # older records have none
    keys = [*record["config"], *record["machine"], *record["versions"]]
    scalars = [*record["config"].values(), *record["machine"].values(), *record["versions"].values()]
    valid = (all(isinstance(key, str) for key in keys) and all(type(value) in SCALAR for value in scalars)
             and isinstance(procedure, dict) and all(isinstance(text, str) for text in (*procedure, *procedure.values())))
    if not valid or not len(record["dataset"]["mean"]) == 3 == len(record["dataset"]["deviation"]):
        raise UserError(f"{path} is damaged, or not a config.json of this program")
    for name, value in record["config"].items():
        if name in SETTINGS and not (name == "capture" and isinstance(value, bool)):  # as it once was
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
