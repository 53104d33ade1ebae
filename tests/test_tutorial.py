"""The program in forty lines: train, stop, resume, compare, test, predict, export. Read this first."""

import signal

from conftest import SMALL, at_epoch, one_line, only_run

from tinycnn.runs.record import read_run


def test_tutorial(command, pictures, tmp_path, monkeypatch):
    logs = ("--log-dir", tmp_path / "logs")
    settings = (*logs, "--dataset", "folder", "--data-dir", pictures, "--epochs", 2, *SMALL)

    # Train. Someone presses Ctrl-C in epoch 1: epoch 0 is kept, and one line says how to resume.
    at_epoch(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGINT))
    status, out, err = command(*settings, "--seed", 0)
    assert status == 130
    assert "stopped by SIGINT; epoch 0 is safe; resume with: python main.py --resume" in one_line(err)

    # Resume: the run goes on with epoch 1, and ends with its summary.
    status, out, err = command("--resume", *logs)
    assert (status, err) == (0, "")
    run = read_run(only_run(tmp_path))
    assert [row["epoch"] for row in run.rows] == [0, 1]
    assert run.summary["epochs"] == 2

    # Compare: one more run with another learning rate, beside the first one.
    assert command(*settings, "--lr", 0.05, "--name", "faster")[0] == 0
    status, out, err = command("compare", *logs)
    assert "lr 0.05" in out

    # Use the newest run: test it, classify an image, write a file for torch.export.load.
    assert "accuracy" in command("test", *logs, "--device", "cpu")[1]
    assert command("predict", pictures / "test" / "disc" / "0.png", *logs, "--device", "cpu")[1].count("%") == 3
    assert "model.pt2" in command("export", "--to", "torch", *logs)[1]
