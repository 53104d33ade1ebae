"""--tensorboard: event files with the figures of the log."""

import contextlib
import sys

import pytest
from conftest import at_epoch, one_line, only_run

from tinycnn.runs.finding import find_runs
from tinycnn.runs.record import read_run
from tinycnn.runs.tensorboard import Events

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator",
                                  reason="requirements-test.txt is not installed")


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    found = accumulator.EventAccumulator(str(folder))
    found.Reload()
    return {name: [(each.step, each.value) for each in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_event_files_hold_the_rows_while_a_run_trains_and_after_it_was_resumed(run, tmp_path, monkeypatch):
    during = []

    def look():
        during.append(scalars(only_run(tmp_path))["accuracy/val"])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        at_epoch(patch, 2, look)
        assert run("--epochs", "3", "--validation", "9", "--tensorboard")[0] == 130
    assert [step for step, _ in during[0]] == [0, 1]
    assert run("--resume")[0] == 0
    rows = read_run(only_run(tmp_path)).rows
    found = scalars(only_run(tmp_path))
    assert set(found) == {"lr", "seconds", *(f"{figure}/{split}" for figure in ("loss", "accuracy")
                                             for split in ("train", "val", "test"))}
    assert found["accuracy/val"] == [(row["epoch"], pytest.approx(row["val_acc"], abs=0.005)) for row in rows]
    assert found["loss/test"] == [(2, pytest.approx(rows[2]["test_loss"], abs=5e-5))]  # looked at once, at the end


def test_an_epoch_that_is_repeated_after_a_crash_counts_once(tmp_path):
    """And one whose events the crash has lost is written again; a column of main.py's has its own name."""
    for rows, epochs, value in (([], (0, 2), 1.0), ([{"epoch": 0, "lr": 5.0}, {"epoch": 1, "lr": 1.5}], (2, 3), 2.0)):
        events, flushed = Events(True, tmp_path, rows), []
        flush, events.writer.flush = events.writer.flush, lambda flushed=flushed: flushed.append(1)
        for epoch in epochs:
            events.write({"epoch": epoch, "lr": value} | ({"grad_norm": 7.0} if epoch == 3 else {}))
        assert len(flushed) == len(epochs)  # so that a kill loses none
        events.writer.flush = flush
        events.close()
    assert scalars(tmp_path) == {"lr": [(0, 1.0), (1, 1.5), (2, 2.0), (3, 2.0)], "grad_norm": [(3, 7.0)]}


def test_a_full_disk_is_one_error_without_a_traceback(tmp_path, monkeypatch, capfd):
    def full(*_):
        raise OSError(28, "No space left on device")

    events = Events(True, tmp_path, [])
    monkeypatch.setattr(events.writer._get_file_writer().event_writer._async_writer._writer, "write", full)
    with pytest.raises(OSError, match="No space left"):  # noqa: PT012
        for epoch in range(3):
            events.write({"epoch": epoch, "lr": 0.1})
    with contextlib.suppress(OSError):
        events.close()
    assert capfd.readouterr().err == ""


def test_without_the_package_one_line_says_so(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    status, _, err = run("--epochs", "1", "--tensorboard")
    assert status == 2
    assert "--tensorboard needs the package tensorboard: python -m pip install tensorboard" in one_line(err)
    assert not find_runs(tmp_path / "logs")
    Events(False, tmp_path, []).write({"epoch": 0, "lr": 0.1})
    assert not list(tmp_path.glob("events*"))
