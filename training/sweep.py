"""A sweep's runs: which of them have been made already."""

import hashlib
from dataclasses import replace
from pathlib import Path

from config import Config, UserError
from training.checkpoint import resumable
from training.differences import settings
from training.records import SUMMARY, find_runs, read_record
from training.weights import find, read

MODEL = Path(__file__).parents[1] / "model.py"


def made(config: Config, fingerprint: str) -> Path | None:
    """The newest run of this config on the images with this fingerprint and with model.py as it is: a finished one, or else
    one that can be resumed. Raises UserError for a teacher that can't be had."""
    if config.teacher:
        config = replace(config, teacher=read(find(Path(config.log_dir), config.teacher)).name)
    network = hashlib.sha256(MODEL.read_bytes()).hexdigest()
    same = [folder for folder in find_runs(Path(config.log_dir)) if _is_run_of(folder, config, fingerprint, network)]
    finished = [folder for folder in same if (folder / SUMMARY).exists()]
    return next(iter([*finished, *filter(resumable, same)]), None)


def _is_run_of(folder: Path, config: Config, fingerprint: str, network: str) -> bool:
    try:
        record = read_record(folder)
        return (settings(record["config"]) == settings(vars(config)) and record["config"]["seed"] == config.seed
                and record["dataset"]["sha256"] == fingerprint and record["network"]["model_sha256"] == network)
    except (UserError, KeyError, TypeError):  # a foreign folder
        return False
