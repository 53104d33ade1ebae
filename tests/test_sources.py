"""What code a run was made with: what counts as an edit, what this version ships, and what records say."""

import pytest
from conftest import ROOT, only_run

from tinycnn import sources
from tinycnn.runs.log import ACCURACY_LOG, read_log
from tinycnn.runs.record import read_record
from tinycnn.sources import (
    CODE_FILES,
    COMMITTED_PROCEDURE,
    COPIED_FILES,
    check_sources,
    code_hash,
    edits_between,
    is_known_model,
    present_sources,
    resumed_sources,
    sources_of,
)

CODE = b'''"""What it does."""

import os  # a comment


def speak(name: str) -> str:
    """Say it."""
    if name:
        # another
        return f"{name!r:>{len(name)}} says {os.sep}" + """two
lines"""
    return ""
'''


# ---------------------------------------------------------------- what counts as an edit

@pytest.mark.parametrize(("old", "new"), [
    (b"# another", b"# a third"), (b"  # a comment", b""), (b"        # another\n", b"\n\n"),
    (b'"""Say it."""', b"'It is said.'"), (b'    """Say it."""\n', b""), (b'"""What it does."""\n', b""), (b"\n", b"\r\n"),
    (b"name: str", b"\n    name: str  # whose\n"), (b'"""What', b'\xef\xbb\xbf"""What')])
def test_comments_docstrings_and_layout_are_no_edit(old, new):
    assert old in CODE
    assert code_hash(CODE.replace(old, new)) == code_hash(CODE)


@pytest.mark.parametrize(("old", "new"), [
    (b"name", b"title"), (b'return ""', b'return "."'), (b"two\nlines", b"two lines"), (b"says", b"said"), (b"!r", b"!s"),
    (b"import os", b"import sys as os"), (b"len(name)", b"len( name)"), (b"    return \"\"", b"        return \"\""),
    (b'"""Say it."""', b'f"""Say it."""'), (b"two\n", b"# two\n")])
def test_everything_else_is(old, new):
    assert old in CODE
    assert code_hash(CODE.replace(old, new)) != code_hash(CODE)


def test_the_hash_is_the_same_on_every_python():
    """From 3.12 on, an f-string is several tokens. This was computed by 3.11, 3.12 and 3.13."""
    assert code_hash(CODE) == "7c7154c78be11f5f"


def test_a_file_that_is_no_python_has_a_hash_too():
    assert len({code_hash(source) for source in (b"def (", b"def [", b"\xff\xff", b"  x\n y")}) == 4


# ---------------------------------------------------------------- what is shipped

def test_the_shipped_hashes_are_those_of_the_files():
    """Where this fails, read the docstring of tinycnn/sources.py."""
    assert not present_sources()["edited"], "run python -m tinycnn.sources, and see test_first_epochs_are_those_of_version"
    assert is_known_model((ROOT / "model.py").read_bytes())


# Losses of training and testing after each of two epochs, by TRAINING_VERSION. Add a line for a new version; change none
FIRST_EPOCHS = {1: {"device": [(1.2333, 1.0988), (1.1895, 1.0993)], "workers": [(1.2321, 1.0987), (1.1717, 1.1001)]}}
SETTINGS = ["--epochs", "2", "--nesterov", "--label-smoothing", "0.1", "--crop-padding", "2", "--crop-size", "24",
            "--uncropped-share", "0.5", "--lr", "0.1", "--weight-decay", "0.1"]


@pytest.mark.parametrize("batches", ["device", "workers"])
def test_first_epochs_are_those_of_the_version(run, tmp_path, batches):
    """What trains otherwise has another TRAINING_VERSION. It can't tell about CUDA."""
    assert run(*SETTINGS, "--batches", batches)[0] == 0
    rows = read_log(only_run(tmp_path) / ACCURACY_LOG)[1]
    assert max(FIRST_EPOCHS) == sources.TRAINING_VERSION
    for row, losses in zip(rows, FIRST_EPOCHS[sources.TRAINING_VERSION][batches], strict=True):
        assert (row["train_loss"], row["test_loss"]) == pytest.approx(losses, abs=5e-4)


# ---------------------------------------------------------------- what a run records

LOSS = next(name for name, source in CODE_FILES.items() if b"cross_entropy" in source)
EDITS = {  # fingerprints of what code does called the first three no edits
    "every second batch": ("main.py", r"(batches\.\w+\([^()]*(\([^()]*\)[^()]*)?\))", r"list(\1)[::2]"),
    "upside down": ("tinycnn/data/device_policy.py", r"return (.*permute.*)", r"return \1.flip(-2)"),
    "another loss": (LOSS, "cross_entropy", "multi_margin_loss"),
    "a rename": ("model.py", "features", "maps"),
}


@pytest.mark.parametrize(("name", "old", "new"), EDITS.values(), ids=EDITS)
def test_an_edit_is_seen(edited, name, old, new):
    changed = edited(name, old, new)
    assert present_sources() == {"version": 1, "edited": {name: code_hash(changed)}}
    assert sources_of({"sources": present_sources()}) == {name: code_hash(changed)}


def test_a_comment_is_not(edited):
    edited("main.py", r"\Z", "# the end\n")
    assert not present_sources()["edited"]


def test_a_file_too_many_and_one_too_few_are_edits(monkeypatch, edited):
    monkeypatch.setitem(CODE_FILES, "tinycnn/training/mixup.py", b"x = 1")
    monkeypatch.delitem(CODE_FILES, "tinycnn/kernels/loss.py")
    sources._edited.cache_clear()
    assert present_sources()["edited"] == {"tinycnn/kernels/loss.py": "deleted",
                                           "tinycnn/training/mixup.py": code_hash(b"x = 1")}


def test_a_run_keeps_its_sources(run, tmp_path, edited):
    changed = edited("augmentation.py", r"p=config.flip_p\b", "p=0.5 * config.flip_p")
    assert run("--epochs", "1")[0] == 0
    folder = only_run(tmp_path)
    assert read_record(folder)["sources"] == {"version": 1, "edited": {"augmentation.py": code_hash(changed)}}
    assert (folder / "augmentation.py").read_bytes() == changed
    for name in ("config.py", "model.py", "main.py"):
        assert (folder / name).read_bytes() == (ROOT / name).read_bytes()


@pytest.mark.parametrize(("record", "expected"), [
    ({}, {}),
    ({"procedure": COMMITTED_PROCEDURE}, {}),
    ({"procedure": COMMITTED_PROCEDURE | {"schedule": "1a2b3c4d5e6f7890"}}, {"schedule of an earlier version": "1a2b3c4d"}),
    ({"sources": {"version": 1, "edited": {}}}, {}),
    ({"sources": {"version": 2, "edited": {}}}, {"training version": "2"}),
    ({"sources": {"version": 1, "edited": {"main.py": "1a"}, "resumed": [{"epoch": 7, "version": 1, "edited": {}}]}},
     {"main.py": "1a", "code of several versions, from epoch": "7"})])
def test_records_say_in_what_their_code_differs_from_as_shipped(record, expected):
    assert sources_of(record) == expected


@pytest.mark.parametrize("damaged", [
    [], {}, {"version": "1", "edited": {}}, {"version": 1, "edited": []}, {"version": 1, "edited": {"main.py": 7}},
    {"version": 1, "edited": {}, "resumed": 7}, {"version": 1, "edited": {}, "resumed": [{"version": 1, "edited": {}}]}])
def test_damaged_sources_are_told(damaged):
    assert not check_sources(damaged)


def test_edits_since_a_run_began(tmp_path, edited):
    edited("tinycnn/data/batches.py", "def make_batches", "def make_all_batches")
    record = {"sources": present_sources()}
    for name, source in COPIED_FILES.items():
        (tmp_path / name).write_bytes(source)
    assert not edits_between(tmp_path, record)
    edited("main.py", r"\Z", "x = 1\n")
    (tmp_path / "config.py").write_bytes(COPIED_FILES["config.py"] + b"# a comment\n")
    (tmp_path / "augmentation.py").unlink()  # as in an older run's folder
    assert edits_between(tmp_path, record) == ["main.py"]
    assert edits_between(tmp_path, {}) == ["main.py", "tinycnn/data/batches.py"]


def test_a_resumed_run_lists_what_held_from_which_epoch(edited):
    record = {"sources": present_sources()}
    assert resumed_sources(record, 3) == record["sources"] == resumed_sources({}, 3)
    edited("main.py", r"\Z", "x = 1\n")
    once = resumed_sources(record, 3)
    assert once == {"version": 1, "edited": {}, "resumed": [{"epoch": 3, **present_sources()}]}
    assert check_sources(once)
    assert resumed_sources({"sources": once}, 5) == once
    edited("main.py", r"\Z", "y = 1\n")
    assert [piece["epoch"] for piece in resumed_sources({"sources": once}, 5)["resumed"]] == [3, 5]


def test_models_of_earlier_versions_are_known():
    assert is_known_model((ROOT / "logs" / "reference" / "model.py").read_bytes())
    assert not is_known_model(COPIED_FILES["model.py"] + b"print('anything')\n")
