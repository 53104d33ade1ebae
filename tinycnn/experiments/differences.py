"""Differences between runs in settings, network and training procedure."""

from collections.abc import Mapping
from typing import Any

from config import MACHINE_SETTINGS, SETTINGS, SIDE, uncropped_epochs
from tinycnn.runs.record import Record, teacher_digests
from tinycnn.text import printable

# Settings without which others have no effect
DEPENDENTS = {"affine_p": ("shift", "scale", "rotate"), "coarse_dropout_p": ("coarse_dropout_size",),
              "teacher": ("teacher_share", "temperature")}
# The training procedure of the committed runs, and of all others that are older than its fingerprints. It stays as it is: a
# change of the procedure makes other runs
COMMITTED_PROCEDURE = {"initialization": "dee36ace772e1ed7", "augmentation": "fdbb5182d8595cd2",
                       "schedule": "cfd86dc10173ec42", "training step": "a0d7b821c05a6740"}
FIGURES = {"parameters": "parameters", "multiply_adds": "multiply-adds", "receptive_field": "receptive field"}
DEFAULTS = {name: field.default for name, field in SETTINGS.items()}


def effective_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of `config` that have an effect. It may be an older version's: settings added since then have their
    defaults; a removed one counts if it was in use. A teacher is known by its weights, whatever its run is called."""
    known: dict[str, Any] = DEFAULTS | {name: value for name, value in config.items() if name in DEFAULTS or value}
    idle = {name for setting, names in DEPENDENTS.items() if not known[setting] for name in names}
    uncropped = uncropped_epochs(known)
    if uncropped == known["epochs"] or (not known["crop_padding"] and known["crop_size"] == SIDE):  # no image is cropped
        known |= {name: DEFAULTS[name] for name in ("crop_padding", "crop_size", "uncropped_share")}
    elif not uncropped:  # every image is cropped
        known["uncropped_share"] = DEFAULTS["uncropped_share"]
    known["teacher"] = teacher_digests(known["teacher"])
    return {name: value for name, value in known.items() if name not in (*MACHINE_SETTINGS, "seed", *idle)}


def same_network(network: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two records of networks are those of the same one: by identity, or by their figures where one of them is from
    before identities were recorded."""
    if "identity" in network and "identity" in other:
        return network["identity"] == other["identity"]
    return all(network[name] == other[name] for name in FIGURES)


def procedure_of(record: Record) -> dict[str, str]:
    """The fingerprints of a run's training procedure, as tinycnn.training.procedure.describe_procedure gives them."""
    return COMMITTED_PROCEDURE | record.get("procedure", {})


def differences(record: Record, reference: Record) -> dict[str, str]:
    """What differs in the settings, the network and the training procedure of a run from those of the `reference` run, by
    name."""
    ours = effective_settings(record["config"])
    theirs = DEFAULTS | reference["config"] | effective_settings(reference["config"])  # also those without effect there
    found = {name: printable(str(value)) for name, value in ours.items() if value != theirs.get(name)}
    if "teacher" in found:  # people know it by its run
        found["teacher"] = printable(record["config"]["teacher"])
    classes, their_classes = (len(each["dataset"]["class_names"]) for each in (record, reference))
    resized = "width" in found or classes != their_classes  # which changes a network's figures and its identity
    network, their_network = record["network"], reference["network"]
    for name, words in FIGURES.items():
        if network[name] != their_network[name] and (name == "receptive_field" or not resized):
            found[words] = f"{network[name]:,}" if network[name] is not None else "?"
    recorded = "identity" in network and "identity" in their_network
    if recorded and network["identity"] != their_network["identity"] and not (resized or "dropout" in found):
        found["network"] = short_identity(network)
    procedure = procedure_of(reference)
    return found | {name: printable(value[:8]) for name, value in procedure_of(record).items() if value != procedure.get(name)}


def short_identity(network: Mapping[str, Any]) -> str:
    """The first digits of a network's identity, for people."""
    return printable(str(network.get("identity", "unknown"))[:8])
