"""What tells two runs apart: the settings with an effect, and the network."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from config import Config
from training.records import PLACES, Run

# What changes no result, or only as another seed does, tells no two runs apart.
SAME = (*PLACES, "seed", "name", "workers", "threads", "device", "batches", "capture", "pictures", "tensorboard", "dataset")
SWITCHES = {"affine_p": ("shift", "scale", "rotate"), "coarse_dropout_p": ("coarse_dropout_size",),
            "teacher": ("teacher_share", "temperature")}  # settings without which others have no effect
NETWORK = {"parameters": "parameters", "multiply_adds": "multiply-adds", "receptive_field": "receptive field"}


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of an earlier version of the program, with the defaults of the settings that came since."""
    return {field.name: field.default for field in dataclasses.fields(Config)} | dict(config)


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a config, the settings that tell runs apart: those with an effect."""
    every = complete(config)
    idle = {name for switch, names in SWITCHES.items() if not every[switch] for name in names}
    return {key: value for key, value in every.items() if key not in SAME and key not in idle}


def differences(run: Run, reference: Run) -> dict[str, str]:
    """What differs in the settings and the network of `run` from those of `reference`."""
    ours, theirs = settings(run.record["config"]), complete(reference.record["config"])
    network, their_network = run.record["network"], reference.record["network"]
    found = {key: str(value) for key, value in ours.items() if value != theirs.get(key)}
    for key, words in NETWORK.items():
        if network[key] != their_network[key]:
            found[words] = f"{network[key]:,}" if network[key] is not None else "?"
    if network["model_sha256"] != their_network["model_sha256"]:
        found["model.py"] = network["model_sha256"][:8]
    return found
