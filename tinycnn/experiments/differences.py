"""Differences between two runs: in settings, in the network, and in the code that they were made with."""

from collections.abc import Mapping
from typing import Any

from config import NOT_COMPARED, SETTINGS, SIDE
from tinycnn.runs.record import NAME_WEIGHTS, Record, digests
from tinycnn.sources import sources_of
from tinycnn.text import printable

# Settings without which others have no effect
DEPENDENTS = {"affine_p": ("shift", "scale", "rotate"), "coarse_dropout_p": ("coarse_dropout_size",),
              "teacher": ("teacher_share", "temperature")}
FIGURES = {"parameters": "parameters", "multiply_adds": "multiply-adds", "receptive_field": "receptive field"}
# Of model.py as it is shipped, with ten classes. Records have no identity of the network any more
COMMITTED_NETWORK = {"parameters": 155_434, "multiply_adds": 7_551_488, "receptive_field": 79, "identity": "28a9690f33e3d473"}
DEFAULTS = {name: field.default for name, field in SETTINGS.items()}


def effective_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of `config` that have an effect. It may be an older version's: settings added since then have their
    defaults; a removed one counts if it was in use. A teacher or an init is known by its weights, whatever its run is
    called."""
    known: dict[str, Any] = DEFAULTS | {name: value for name, value in config.items() if name in DEFAULTS or value}
    idle = {name for setting, names in DEPENDENTS.items() if not known[setting] for name in names}
    if known["schedule"] in ("step", "constant"):
        idle.add("min_lr")
    whole = round(known["whole_images_share"] * known["epochs"])
    if whole == known["epochs"] or (not known["crop_padding"] and known["crop_size"] == SIDE):  # no image is cropped
        known |= {name: DEFAULTS[name] for name in ("crop_padding", "crop_size", "whole_images_share")}
    elif not whole:  # every image is cropped
        known["whole_images_share"] = DEFAULTS["whole_images_share"]
    known |= {name: digests(known[name]) for name in NAME_WEIGHTS}
    return {name: value for name, value in known.items() if name not in (*NOT_COMPARED, "seed", *idle)}


def identity_of(record: Record) -> str | None:
    """The hash that earlier versions recorded of what a network computes. Later runs of the committed network have its."""
    network = record["network"]
    committed = (all(network[name] == COMMITTED_NETWORK[name] for name in FIGURES) and not record["config"].get("dropout")
                 and "model.py" not in sources_of(record))
    return network.get("identity", COMMITTED_NETWORK["identity"] if committed else None)


def alike(record: Record, other: Record) -> bool:
    """Whether two runs have the same settings, network and code: they differ in seed, images and machine only."""
    identities = identity_of(record), identity_of(other)
    figures = ([each["network"][name] for name in FIGURES] for each in (record, other))
    same_network = identities[0] == identities[1] if all(identities) else next(figures) == next(figures)
    return (same_network and sources_of(record) == sources_of(other)
            and effective_settings(record["config"]) == effective_settings(other["config"]))


def differences(record: Record, reference: Record) -> dict[str, str]:
    """In what the settings, the network and the code of a run differ from those of the `reference` run, by name."""
    ours = effective_settings(record["config"])
    theirs = DEFAULTS | reference["config"] | effective_settings(reference["config"])  # also those without effect there
    found = {name: str(value) for name, value in ours.items() if value != theirs.get(name)}
    found |= {name: record["config"].get(name, "") for name in NAME_WEIGHTS if name in found}  # people know them by their runs
    classes, their_classes = (len(each["dataset"]["class_names"]) for each in (record, reference))
    resized = "width" in found or classes != their_classes  # which changes a network's figures and its identity
    network, their_network = record["network"], reference["network"]
    for name, words in FIGURES.items():
        if network[name] != their_network[name] and (name == "receptive_field" or not resized):
            found[words] = f"{network[name]:,}" if network[name] is not None else "?"
    identity, their_identity = identity_of(record), identity_of(reference)
    if identity and their_identity and identity != their_identity and not (resized or "dropout" in found):
        found["network"] = str(identity)[:8]
    sources, their_sources = sources_of(record), sources_of(reference)
    found |= {name: "edited" if name.endswith(".py") and name in sources else sources.get(name, "as shipped")
              for name in sources | their_sources if sources.get(name) != their_sources.get(name)}
    return {printable(name): printable(value) for name, value in found.items()}


def hashes(record: Record) -> dict[str, str]:
    """What tells two runs apart whose `differences` read the same: the first digits of the hashes of what was edited."""
    edited = {name: f"edited {value[:8]}" for name, value in sources_of(record).items() if name.endswith(".py")}
    network = {"network": str(record["network"]["identity"])[:8]} if "identity" in record["network"] else {}
    return {printable(name): printable(value) for name, value in (network | edited).items()}
