"""Runs made up for it, compared: groups, differences, what is significant, and what is left out."""

import dataclasses
import functools
import json
import math
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
from conftest import REFERENCE, one_line
from made_up_runs import NOISE, compared, group_of, make_finished
from scipy import stats

from tinycnn.experiments.comparison import Difference, SettingGroup, compare_groups, make_tables, read_finished
from tinycnn.experiments.differences import COMMITTED_NETWORK, effective_settings
from tinycnn.experiments.report import as_csv, as_text
from tinycnn.runs.files import write
from tinycnn.runs.finding import find_runs
from tinycnn.runs.log import ACCURACY_LOG
from tinycnn.runs.record import CONFIG, SUMMARY, as_json, read_run


@pytest.fixture
def make(tmp_path):
    """make(accuracy, seed, lr=0.1) -> the folder of a finished run in tmp_path/runs."""
    return functools.partial(make_finished, tmp_path)


def edit(folder: Path, **parts: dict) -> None:
    """Change config.json in a run's folder: edit(folder, config={"seed": 1})."""
    record = json.loads((folder / CONFIG).read_text())
    write(folder / CONFIG, as_json(record | {part: record[part] | changes for part, changes in parts.items()}))


# ---------------------------------------------------------------- groups

def test_runs_that_differ_in_their_seed_are_one_group(make, tmp_path):
    for seed in range(3):
        make(88 + NOISE[seed], seed, lr=0.05)
        make(86 + NOISE[seed], seed + 1, name=f"again{seed}", workers=4, device="cpu", threads=1, capture="off",
             deterministic=True, instruction_set="avx2")
    [table] = compared(tmp_path)
    faster, same = group_of(table, lr="0.05"), group_of(table)
    assert [len(group.runs) for group in (faster, same)] == [3, 4]  # the reference is the fourth of its group
    assert (faster.is_reference, same.is_reference) == (False, True)
    assert faster.mean("test_acc") == pytest.approx(88)
    assert faster.seeds == [0, 1, 2]
    assert faster.standard_error == pytest.approx(table.stds[80].value / math.sqrt(3))


def test_a_repeated_seed_counts_once_and_the_newest(make, tmp_path):
    make(80, 5, lr=0.05, stem="2026-02-01_00-00-00")
    make(90, 5, lr=0.05, stem="2026-01-01_00-00-00")  # made last, after a clock was set back
    [table] = compared(tmp_path)
    assert group_of(table, lr="0.05").values("test_acc") == [90]


@pytest.mark.parametrize("edits", [None, {}])  # as runs record them from before and from after the reference
def test_a_newer_run_of_the_reference_settings_stands_for_the_reference(make, tmp_path, edits):
    make(89, 0)
    make(91, 0, edits=edits)
    make(90, 0, lr=0.05)
    [table] = compared(tmp_path)
    assert group_of(table).is_reference
    assert group_of(table).values("test_acc") == [91]
    assert group_of(table, lr="0.05").difference.points == pytest.approx(-1)


def test_settings_without_effect_tell_no_runs_apart(make, tmp_path):
    for seed, shift in enumerate((0.1, 0.2)):
        make(88, seed, affine_p=0.0, shift=shift)
    make(88, coarse_dropout_size=8)
    make(88, teacher="wide:12345678", temperature=4.0)
    for seed, share in enumerate((0.0, 0.2, 1.0), 1):
        make(88, seed, dropout=0.1, whole_images_share=share)  # where no image is cropped
    for seed, share in enumerate((0.999, 1.0), 4):  # of 80 epochs, all
        make(88, seed, dropout=0.1, whole_images_share=share, crop_padding=2, crop_size=24)
    make(88, whole_images_share=0.2, crop_size=24)
    for seed, share in enumerate((0.0, 0.001)):  # of 80 epochs, none
        make(88, seed, whole_images_share=share, crop_size=20)
    [table] = compared(tmp_path)
    assert len(group_of(table, affine_p="0.0").runs) == 2
    group_of(table, coarse_dropout_size="8")
    group_of(table, teacher="wide:12345678")  # and not the temperature, which is the default
    assert len(group_of(table, dropout="0.1").runs) == 5
    group_of(table, whole_images_share="0.2", crop_size="24")
    assert len(group_of(table, crop_size="20").runs) == 2


def test_teachers_are_known_by_their_weights(make, tmp_path):
    for seed, teacher in enumerate(("seed-0:12345678,x:0000000a", "a,b:12345678,c:0000000a")):
        make(88, seed, teacher=teacher)
    make(88, teacher="x:12345678")
    make(88, teacher="x:0000000a,x:12345678")
    [table] = compared(tmp_path)
    assert len(group_of(table, teacher="a,b:12345678,c:0000000a").runs) == 2
    group_of(table, teacher="x:12345678")
    group_of(table, teacher="x:0000000a,x:12345678")


def test_a_setting_that_is_gone_counts_where_it_was_in_use(make, tmp_path):
    make(88, 1, cutmix=0.0)
    make(88, 2, cutmix=5.0)
    [table] = compared(tmp_path)
    assert len(group_of(table).runs) == 2
    assert len(group_of(table, cutmix="5.0").runs) == 1
    assert effective_settings({"warmup": 0.0}) == effective_settings({}) != effective_settings({"warmup": 5.0})


def test_an_edited_network_is_known_by_its_file_and_its_figures(make, tmp_path):
    figures = {"parameters": 200_000, "multiply_adds": 8_000_000, "receptive_field": None}
    make(85, nesterov=True, network=figures, edits={"model.py": "0123456789abcdef"})
    [table] = compared(tmp_path)
    assert group_of(table, nesterov="True", parameters="200,000", multiply_adds="8,000,000", receptive_field="?",
                    **{"model.py": "edited"})


def test_runs_from_before_sources_are_known_by_what_they_recorded(make, tmp_path):
    """As the reference: those whose network had its identity, or, of before that, its figures."""
    identity = COMMITTED_NETWORK["identity"]
    make(85, 1, network={"identity": identity, "model_sha256": "another"})
    make(85, 2, network={"identity": "absent", "model_sha256": "a third"})
    make(85, 3, network={"identity": "fedcba9876543210"})
    make(85, 4, network={"identity": "absent", "receptive_field": 63})
    make(85, 5, edits={})
    old = make(85, 6, name="old")
    record = json.loads((old / CONFIG).read_text()) | {"procedure": {"schedule": "1a2b3c4d5e6f7890"}}
    (old / CONFIG).write_text(as_json(record))
    [table] = compared(tmp_path)
    assert group_of(table).seeds == [0, 1, 2, 5]
    assert group_of(table, network="fedcba98").seeds == [3]
    assert group_of(table, receptive_field="63").seeds == [4]
    assert group_of(table, schedule_of_an_earlier_version="1a2b3c4d").seeds == [6]


@pytest.mark.parametrize("name", ["main.py", "tinycnn/data/device_policy.py", "tinycnn/training/distillation.py"])
def test_an_edit_is_named_by_its_file(make, tmp_path, name):
    """Every second batch skipped, images upside down, another loss: fingerprints of behaviour called them the same."""
    make(85, 1, edits={})
    make(86, 2, edits={name: "0123456789abcdef"})
    [table] = compared(tmp_path)
    assert group_of(table).seeds == [0, 1]
    assert group_of(table, **{name: "edited"}).seeds == [2]
    make(87, 3, edits={name: "fedcba9876543210"})  # only now hashes are needed
    make(88, 4, edits={name: "fedcba9876543210", "augmentation.py": "00"})
    [table] = compared(tmp_path)
    assert group_of(table, **{name: "edited 01234567"}).seeds == [2]
    assert group_of(table, **{name: "edited fedcba98"}).seeds == [3]
    assert group_of(table, **{name: "edited", "augmentation.py": "edited"}).seeds == [4]


def test_what_the_reference_has_edited_is_told_of_the_others(make, tmp_path):
    reference = read_run(REFERENCE)
    reference.record["sources"] = {"version": 1, "edited": {"main.py": "0123456789abcdef"}}
    make(85, 1, edits={})
    [table] = make_tables(read_finished(find_runs(tmp_path))[0], reference)
    assert group_of(table, **{"main.py": "as shipped"}).seeds == [1]


def test_the_reference_has_several_seeds_where_they_are_committed(make, tmp_path):
    """Then a group of one seed is compared with the spread of the reference's."""
    reference, others = read_run(REFERENCE), [read_run(make(accuracy, seed, edits={})) for seed, accuracy in ((1, 88), (2, 89))]
    runs = [read_run(make(90, lr=0.05, edits={})), others[1]]  # one of them is named, too
    [table] = make_tables(runs, reference, *others)
    assert [(group.is_reference, group.seeds) for group in table.groups] == [(False, [0]), (True, [0, 1, 2])]
    assert table.groups[1].name == "reference"
    assert table.groups[0].difference.verdict != "unknown"


def test_the_commands_that_show_the_edits_are_told(make, tmp_path, monkeypatch):
    one = make(85, 1, edits={}, epochs=8, name="one", files={"main.py": "1", "model.py": "1"})
    two = make(86, 2, edits={"main.py": "12"}, epochs=8, name="two", files={"main.py": "2", "model.py": "1"})
    make(87, 3, edits={"tinycnn/data/batches.py": "12"}, epochs=8, name="three", files={"main.py": "1"})
    make(88, 4, edits={"main.py": "13"}, epochs=8, name="four")  # its copy is lost
    monkeypatch.chdir(tmp_path)
    told = f"To see what was edited:\n  diff runs/{one.name}/main.py runs/{two.name}/main.py\n\n"
    assert as_text(compared(tmp_path)).count("  diff ") == 1
    assert told in as_text(compared(tmp_path)).replace("\\", "/") + "\n"
    monkeypatch.chdir(one)
    assert f"  diff main.py {two.resolve() / 'main.py'}\n" in as_text(compared(tmp_path))


def test_another_number_of_classes_explains_another_network(make, tmp_path):
    make(90, dataset={"sha256": "pets", "kind": "folder", "class_names": ["cat", "dog"]},
         edits={}, network={"parameters": 153_378, "multiply_adds": 7_549_440})
    table = compared(tmp_path)[1]
    assert group_of(table).label == "as the reference"


def test_runs_on_other_images_are_never_compared(make, tmp_path):
    for seed in (0, 1):
        make(95, seed, lr=0.05, dataset={"sha256": "others", "kind": "folder"})
        make(88, seed, lr=0.05)
    own, others = compared(tmp_path)
    assert others.dataset.startswith("folder")
    assert [group.difference for group in others.groups] == [None]
    assert group_of(own, lr="0.05").difference.points == pytest.approx(88 - read_run(REFERENCE).rows[-1]["test_acc"])
    assert "nothing to compare" in as_text([others])


# ---------------------------------------------------------------- differences

def test_differences_have_the_pooled_error_and_holms_correction(make, tmp_path):
    """Against the same computed another way: scipy's analysis of all values."""
    accuracies = {0.01: (86.0, 86.3, 86.1), 0.02: (86.4, 86.6, 86.8), 0.05: (88.0, 88.1, 88.3), 0.1: (86.2,)}
    for lr, values in accuracies.items():
        for seed, value in enumerate(values):
            make(value, seed, lr=lr, dataset={"sha256": "another"}, epochs=8)
    table = compared(tmp_path)[1]
    std = math.sqrt(sum(2 * statistics.variance(values) for values in accuracies.values() if len(values) > 1) / 6)
    assert table.stds == {8: (pytest.approx(std), 6)}
    base = statistics.fmean(accuracies[0.01])
    raw, found = {}, {}
    for lr in (0.02, 0.05, 0.1):
        found[lr] = difference = group_of(table, epochs="8", lr=str(lr)).difference
        error = std * math.sqrt(1 / 3 + 1 / len(accuracies[lr]))
        assert difference.points == pytest.approx(statistics.fmean(accuracies[lr]) - base)
        assert difference.error == pytest.approx(error)
        raw[lr] = 2 * stats.t.sf(abs(difference.points) / error, 6)
        assert difference.p == pytest.approx(raw[lr])
        found_by_chance = stats.nct.cdf(stats.t.isf(0.05 / 3 / 2, 6), 6, difference.detectable / error)
        assert found_by_chance == pytest.approx(0.2, abs=1e-4)
    assert found[0.05].corrected_p == pytest.approx(3 * raw[0.05])
    assert found[0.02].corrected_p == pytest.approx(2 * raw[0.02])
    assert found[0.1].corrected_p == pytest.approx(max(raw[0.1], 2 * raw[0.02]))
    assert [found[lr].verdict for lr in (0.02, 0.05, 0.1)] == ["significant", "significant", "not significant"]


def test_a_group_is_compared_with_as_many_epochs_and_that_with_the_reference(make, tmp_path):
    for seed in (0, 1):
        make(88.5 + NOISE[seed], seed)
        make(80 + NOISE[seed], seed, epochs=8, name="base")
        make(82 + NOISE[seed], seed, epochs=8, lr=0.05)
    [table] = compared(tmp_path)
    base, faster, reference = group_of(table, epochs="8"), group_of(table, epochs="8", lr="0.05"), group_of(table)
    assert faster.difference.points == pytest.approx(2)
    assert faster.difference.base is base
    assert base.difference.points == pytest.approx(-8.5)
    assert base.difference.base is reference
    assert reference.difference is None
    # Between lengths each has its own standard deviation: that of the 8 epochs from two groups
    variance = {8: statistics.variance([80.1, 79.8]), 80: statistics.variance([88.6, 88.3])}
    assert base.difference.error == pytest.approx(math.sqrt(variance[8] / 2 + variance[80] / 2))


def made_up(groups: list[tuple[int, np.ndarray]]) -> list[SettingGroup]:
    """Groups of runs of these epochs and accuracies."""
    run, made = read_run(REFERENCE), []
    for number, (epochs, accuracies) in enumerate(groups):
        record = {"config": {"epochs": epochs, "validation": 0}}
        made.append(SettingGroup([dataclasses.replace(run, record=record, rows=[{"test_acc": accuracy}])
                                  for accuracy in accuracies], {"lr": "0.1"} if number else {}))
    return made


def test_of_rows_that_differ_as_little_the_oldest_is_the_base(make, tmp_path):
    for lr in (0.05, 0.1, 0.2):
        for seed in range(2):
            make(80 + 10 * lr + NOISE[seed], seed, epochs=8, lr=lr)
    [table] = compared(tmp_path)
    base = group_of(table, epochs="8", lr="0.05")
    for lr in ("0.1", "0.2"):
        assert group_of(table, epochs="8", lr=lr).difference.base is base


def test_what_cannot_be_tested_makes_no_difference_harder_to_detect(make, tmp_path):
    """Of the two comparisons that of the base with the reference, of one seed, is unknown."""
    for seed in range(3):
        make(80 + NOISE[seed], seed, epochs=8)
        make(85 + NOISE[seed], seed, epochs=8, lr=0.05)
    [table] = compared(tmp_path)
    difference = group_of(table, epochs="8", lr="0.05").difference
    missed = stats.nct.cdf(stats.t.isf(0.05 / 2, 4), 4, difference.detectable / difference.error)
    assert missed == pytest.approx(0.2, abs=1e-4)
    assert difference.corrected_p == difference.p


@pytest.mark.parametrize(("p", "verdict"), [(0.0499, "significant"), (0.05, "significant"), (0.0501, "not significant"),
                                            (math.nan, "unknown")])
def test_the_level_is_5_percent_of_the_corrected_p_values(p, verdict):
    [group] = made_up([(80, np.array([87.0]))])
    assert Difference(group, points=1.0, error=0.1, p=0.5, corrected_p=p, detectable=1.0).verdict == verdict


def test_no_difference_is_seldom_called_significant():
    """Where there is none, the level holds for all comparisons of a table together."""
    rng, false_alarms = np.random.default_rng(0), 0
    for _ in range(400):
        groups = made_up([(80, accuracies) for accuracies in rng.normal(87, 0.3, (8, 2))])
        compare_groups(groups)
        false_alarms += any(group.difference and group.difference.verdict == "significant" for group in groups)
    assert 6 <= false_alarms <= 28


def test_quiet_long_runs_make_no_short_ones_significant():
    """Five-epoch runs vary more than 40-epoch ones. Pooled with eight such groups, a third of tables had a false alarm."""
    rng, false_alarms, p_values = np.random.default_rng(0), 0, []
    for _ in range(300):
        short = made_up([(5, accuracies) for accuracies in rng.normal(70, 0.9, (3, 2))])
        groups = [*made_up([(40, accuracies) for accuracies in rng.normal(88, 0.2, (8, 2))]), *short]
        compare_groups(groups)
        found = [group.difference for group in short if group.difference]
        p_values += [difference.p for difference in found]
        false_alarms += any(difference.verdict == "significant" for difference in found)
    assert len(p_values) == 600
    assert np.mean(np.array(p_values) <= 0.05) == pytest.approx(0.05, abs=0.025)
    assert false_alarms <= 20


def test_one_seed_each_says_that_it_is_unknown(make, tmp_path):
    make(88, lr=0.05)
    [table] = compared(tmp_path)
    difference = group_of(table, lr="0.05").difference
    assert difference.verdict == "unknown"
    assert math.isnan(difference.error)
    assert math.isnan(difference.detectable)
    assert math.isnan(group_of(table, lr="0.05").standard_error)
    assert "run more seeds (sweep --seeds 3)" in " ".join(as_text([table]).split())


def test_a_group_whose_length_has_one_seed_leaves_the_others_judged(make, tmp_path):
    for seed in range(3):
        make(80 + NOISE[seed], seed, epochs=8)
        make(85 + NOISE[seed], seed, epochs=8, lr=0.05)
    [table] = compared(tmp_path)
    assert group_of(table, epochs="8", lr="0.05").difference.verdict == "significant"
    assert group_of(table, epochs="8").difference.verdict == "unknown"  # the reference has one seed


def test_equal_accuracies_prove_nothing(make, tmp_path):
    """Of a small test set, where the standard deviation over seeds comes out as 0."""
    for seed in (0, 1):
        make(80, seed, lr=0.05)
        make(85, seed, lr=0.1)
    [table] = compared(tmp_path)
    assert group_of(table, lr="0.05").difference.verdict == "unknown"


def test_with_validation_it_chooses_by_that(make, tmp_path):
    for seed in (0, 1):
        make(80 + NOISE[seed], seed, validation=5000, epochs=8)
        make(82 + NOISE[seed], seed, validation=5000, epochs=8, lr=0.05)
    table = compared(tmp_path)[1]
    group = group_of(table, validation="5000", epochs="8", lr="0.05")
    assert (table.metric, table.judged_by) == ("val_acc", "validation")
    assert group.difference.points == pytest.approx(2)
    assert group.difference.base is group_of(table, validation="5000", epochs="8")
    assert "points of validation accuracy" in " ".join(as_text([table]).split())
    assert re.search(r"lr 0\.05 +2 +82\.95 +81\.95 +\+2\.00", as_text([table]))


# ---------------------------------------------------------------- python main.py compare

def test_what_is_no_finished_run_is_named_and_left_out(make, tmp_path, command):
    whole, damaged, unfinished, foreign, diverged, short = (make(88, lr=lr) for lr in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5))
    (damaged / ACCURACY_LOG).write_bytes(b"\xff\xfe")
    for folder, mark in ((unfinished, "checkpoint.pt"), (diverged, ".diverged")):
        (folder / SUMMARY).unlink()
        (folder / mark).touch()
    (foreign / CONFIG).write_text(json.dumps({"config": {"seed": 1}}))
    edit(short, config={"epochs": 90})
    (tmp_path / "runs" / "holiday").mkdir()
    status, out, err = command("compare", "--log-dir", tmp_path)
    assert (status, err) == (0, "")
    left_out = [line for line in out.splitlines() if line.startswith("left out: ")]
    assert len(left_out) == 6
    for folder, words in ((damaged, "can't be read"), (unfinished, ": unfinished"), (foreign, "not a config.json"),
                          (diverged, "diverged"), (short, "a finished run of 90 epochs"),
                          (tmp_path / "runs" / "holiday", "no run of this program")):
        assert any(folder.name in line and words in line for line in left_out)
    assert re.search(r"^lr 0\.05 ", out, re.MULTILINE)
    assert whole.name in (tmp_path / "experiments.csv").read_text()


@pytest.mark.parametrize("damage", [
    {"config": {"lr": ["0.1"]}}, {"config": {"seed": "0"}}, {"config": {"epochs": None}}, {"network": {"parameters": "many"}},
    {"network": {"multiply_adds": None}}, {"dataset": {"kind": 5}}, {"dataset": {"train": "all"}},
    {"dataset": {"class_names": "cats"}}])
def test_wrong_types_in_one_run_end_no_comparison(make, tmp_path, command, damage):
    folder = make(88, lr=0.05)
    make(89, lr=0.1)
    edit(folder, **damage)
    status, out, _ = command("compare", "--log-dir", tmp_path)
    assert status == 0
    assert f"left out: {folder.name}: " in out
    assert "lr 0.1" in out


def test_what_a_record_says_reaches_the_terminal_escaped(make, tmp_path):
    make(88, teacher="\x1b[31mred\n", network={"identity": "\x1b[2J\x1b[2J"})
    make(88, edits={"\x1b[2J.py": "\x1b[2J"})
    tables = compared(tmp_path)
    assert "teacher \\x1b[31mred\\n" in as_csv(tables)
    assert all(character.isprintable() or character == "\n" for character in as_text(tables) + as_csv(tables))


def test_named_runs_only_and_the_reference_with_them(make, tmp_path, command):
    one, other = make(88, epochs=8, name="one"), make(89, lr=0.1, name="other")
    assert command("compare", one.name, "--log-dir", tmp_path)[0] == 0
    csv = (tmp_path / "experiments.csv").read_text()
    assert one.name in csv
    assert read_run(REFERENCE).folder.name in csv
    assert other.name not in csv
    status, _, err = command("compare", "nothing", "--log-dir", tmp_path)
    assert status == 2
    assert "there is no run 'nothing'" in one_line(err)
    (other / SUMMARY).unlink()
    (other / "checkpoint.pt").touch()
    status, _, err = command("compare", "other", "--log-dir", tmp_path)
    assert status == 2
    assert f"there is nothing to compare: {other.name}: unfinished" in one_line(err)
    status, _, err = command("compare", "--log-dir", tmp_path / "typo")
    assert status == 2
    assert "there is no folder" in one_line(err)
    assert not (tmp_path / "typo").exists()


def test_a_name_that_several_runs_have_stands_for_all_of_them(make, tmp_path, command):
    for seed in range(2):
        make(88, seed, lr=0.05, name="mine")
    status, out, _ = command("compare", "mine", "--log-dir", tmp_path)
    assert status == 0
    assert re.search(r"^lr 0\.05 +2 ", out, re.MULTILINE)


def test_the_picture_is_that_of_the_table_with_the_newest_run(make, tmp_path, command, monkeypatch):
    from tinycnn.experiments import plots

    drawn, experiments = [], plots.experiments
    monkeypatch.setattr(plots, "experiments", lambda table: drawn.append(table.dataset.split(",")[0]) or experiments(table))
    folder = {"sha256": "others", "kind": "folder"}
    for dataset in ({}, folder, {}, folder):
        make(88, len(drawn), lr=0.05 + 0.1 * len(drawn), dataset=dataset, stem=f"2026-0{9 - len(drawn)}-01_00-00-00")
        command("compare", "--log-dir", tmp_path)
    # the second is alone on its images, where there is nothing to draw
    assert drawn == ["cifar10", "cifar10", "cifar10", "folder"]
    assert (tmp_path / "experiments.png").exists()
