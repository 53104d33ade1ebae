"""Which run is meant, and in what state it is."""

from pathlib import Path

import pytest

from config import UserError
from tinycnn.runs.files import write
from tinycnn.runs.finding import (
    REFERENCE,
    RunState,
    find_finished,
    find_job_run,
    find_runs,
    find_unfinished,
    named_runs,
    next_number,
    refuse_run_folder,
    run_state,
)
from tinycnn.runs.record import as_json


@pytest.fixture
def make(tmp_path):
    """make("2026-01-01", name="mine", number=3, state=FINISHED) -> the folder of a run."""
    marks = {RunState.FINISHED: ("summary.json", "final.safetensors"), RunState.DIVERGED: (".diverged", "checkpoint.pt"),
             RunState.UNFINISHED: ("checkpoint.pt",), RunState.FOREIGN: ()}

    def make(folder: str, name: str = "", number: int | None = None, state: RunState = RunState.FINISHED) -> Path:
        path = tmp_path / "runs" / folder
        path.mkdir(parents=True)
        write(path / "config.json", as_json({"config": {"name": name}} | ({} if number is None else {"number": number})))
        for mark in marks[state]:
            write(path / mark, "{}")
        return path

    return make


def test_a_run_is_known_by_its_folder_its_path_and_its_name(tmp_path, make, monkeypatch):
    older, newer, other = (make("2026-01-01_00-00-00-mine", "mine"), make("2026-02-01_00-00-00-mine-2", "mine"),
                           make("2026-03-01_00-00-00-not-mine", "not-mine"))
    (tmp_path / "runs" / "2026-04-01_00-00-00-mine").mkdir()  # no run
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()  # a name has no slash, a path may have one
    assert named_runs(tmp_path, "mine") == [newer, older]
    assert named_runs(tmp_path, "./mine") == [tmp_path / "mine"]
    assert named_runs(tmp_path, older.name) == named_runs(tmp_path, str(older)) == [older]
    assert named_runs(tmp_path, "not-mine") == [other]
    for name in ("yours", ""):
        with pytest.raises(UserError, match=f"there is no run '{name}'"):
            named_runs(tmp_path, name)


def test_a_run_whose_record_is_damaged_keeps_its_name(tmp_path, make):
    folder = make("2026-01-01_00-00-00-mine", "mine", state=RunState.UNFINISHED)
    write(folder / "config.json", "{")
    assert named_runs(tmp_path, "mine") == [folder]


def test_the_committed_runs_are_found_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert named_runs(tmp_path, "logs/reference") == [REFERENCE]


def test_the_newest_run_is_that_of_the_highest_number_whatever_the_clock_said(tmp_path, make):
    before_numbers = make("2027-01-01_00-00-00")
    first = make("2026-05-01_00-00-00", number=1)
    set_back = make("2026-01-01_00-00-00", number=2)
    assert find_runs(tmp_path) == [set_back, first, before_numbers]
    assert next_number(tmp_path) == 3


def test_the_tenth_run_of_a_second_is_newer_than_the_second(tmp_path, make):
    folders = [make(f"2026-01-01_00-00-00-x{'' if n == 1 else f'-{n}'}") for n in range(1, 12)]
    assert find_runs(tmp_path) == folders[::-1]


@pytest.mark.parametrize("content", ["", "[]", '{"number": "9"}', '{"config": 1}', "[" * 100_000])
def test_foreign_folders_are_passed_over(tmp_path, make, content):
    mine = make("2026-01-01-mine", number=1, name="mine")
    foreign = make("2027-01-01")
    (foreign / "config.json").write_text(content)
    assert find_runs(tmp_path) == [mine, foreign]
    assert named_runs(tmp_path, "mine") == [mine]


def test_a_folder_whose_name_has_digits_of_another_kind_is_no_error(tmp_path, make):
    assert find_runs(tmp_path) == []
    folder = make("²")
    assert find_runs(tmp_path) == [folder]


@pytest.mark.parametrize("state", RunState)
def test_the_state_of_a_run(make, state):
    assert run_state(make("x", state=state)) is state


def test_finding_a_run_by_state(tmp_path, make):
    finished = make("1-a", "a", 1)
    unfinished = make("2-a", "a", 2, RunState.UNFINISHED)
    diverged = make("3-b", "b", 3, RunState.DIVERGED)
    assert find_finished(tmp_path, None) == find_finished(tmp_path, "a") == finished
    assert find_unfinished(tmp_path, "") == find_unfinished(tmp_path, "a") == unfinished
    assert find_unfinished(tmp_path, "b") == diverged  # only by its name: it would diverge again
    for name, words in (("2-a", "is not finished: resume it"), ("b", r"no finished run \(diverged\)")):
        with pytest.raises(UserError, match=words):
            find_finished(tmp_path, name)
    with pytest.raises(UserError, match=r"runs is a folder of runs: name one of them, 1-a$"):
        find_finished(tmp_path, str(tmp_path / "runs"))
    with pytest.raises(UserError, match="there is nothing to resume"):
        find_unfinished(tmp_path, "1-a")


def test_a_log_folder_that_is_a_run_is_refused(tmp_path, make):
    refuse_run_folder(tmp_path)
    for state in RunState:
        with pytest.raises(UserError, match="is the folder of a run, whose log would be overwritten"):
            refuse_run_folder(make(state.name, state=state))
    (tmp_path / "config.json").write_text('{"name": "of another program"}')
    refuse_run_folder(tmp_path)


def test_a_job_that_begins_takes_its_name_from_earlier_ones(tmp_path, make, monkeypatch):
    """torchrun's --rdzv-id may be used again."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    for name, job in (("1", "job"), ("2", "another")):
        write(make(name) / ".job", job)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert find_job_run(tmp_path) == (RunState.FINISHED, tmp_path / "runs" / "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert find_job_run(tmp_path)[0] is RunState.FOREIGN
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert find_job_run(tmp_path)[0] is RunState.FOREIGN
    assert (tmp_path / "runs" / "2" / ".job").exists()
