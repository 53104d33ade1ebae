"""python main.py find-lr: the range test of the learning rate."""

import copy
import math
import shlex
from functools import partial

import pytest
import torch
from conftest import SMALL, one_line, only_run, weights_of
from torch import nn
from torch.nn import functional as F

from main import train_step
from tinycnn.commands.parser import parse
from tinycnn.errors import Diverged
from tinycnn.experiments.range_test import HIGHEST, LOWEST, READ_EVERY, draw, range_test, smooth, suggest
from tinycnn.runs.finding import find_runs
from tinycnn.training.capture import CapturedStep
from tinycnn.training.optimizer import SGD


@pytest.fixture
def find_lr(command, pictures, tmp_path):
    """find_lr("--epochs", "1") -> (status, stdout, stderr): a range test on the small folder; logs in tmp_path/my logs."""
    return partial(command, "find-lr", "--dataset", "folder", "--data-dir", pictures, "--log-dir", tmp_path / "my logs", *SMALL)


def test_it_changes_no_bit_of_a_run_after_it_and_leaves_a_picture(run, find_lr, tmp_path, saved):
    line = ("--epochs", "1", "--batch-size", "1", "--dropout", "0.2", "--seed", "1")
    assert run(*line)[0] == 0
    alone, logs = only_run(tmp_path), tmp_path / "my logs"
    status, out, err = find_lr(*line)
    assert (status, err) == (0, "")
    assert [path.name for path in logs.iterdir()] == ["find_lr.png"]
    [axes] = saved[-1].axes
    assert axes.get_xscale() == "log"
    assert "0.01" in [label.get_text() for label in axes.get_xticklabels()]
    assert 30 < len(axes.lines[0].get_xdata()) == len(axes.lines[1].get_xdata()) <= 48
    command = shlex.split(out.split("\n    python main.py ")[1])
    config = parse(command).config
    assert f"Suggestion: --lr {config.lr:g};" in out
    assert (config.log_dir, config.batch_size, config.dropout) == (str(logs), 1, 0.2)
    assert axes.lines[2].get_xdata()[0] == config.lr
    assert run(*line, "--log-dir", logs)[0] == 0
    assert weights_of(find_runs(logs)[0]) == weights_of(alone)


def test_an_epoch_of_few_batches_is_refused(find_lr, tmp_path):
    status, _, err = find_lr()
    assert status == 2
    assert "an epoch has 3 batches, but a range test needs 30: lower --batch-size" in one_line(err)
    assert not (tmp_path / "my logs").exists()


def test_captured_steps_see_every_rate():
    """By the CPU's stand-in for CUDA graphs."""
    torch.manual_seed(0)
    batches = [(torch.randn(8, 3, 6, 6), torch.randint(0, 4, (8,))) for _ in range(40)]
    first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    found = []
    for captured in (False, True):
        net, notes, rates = copy.deepcopy(first), [], []
        optimizer = SGD(net.parameters(), lr=0.5, momentum=0.9)
        step = partial(train_step, net, optimizer, lambda images, logits, labels: F.cross_entropy(logits, labels))
        if captured:
            step = CapturedStep(step, net, optimizer, note=notes.append)
        found.append(range_test(step, optimizer, batches, len(batches)))
        assert [note.startswith("captured;") for note in notes] == [True] * captured
    for rates, losses in found:
        assert rates[0] == LOWEST
        assert rates[-1] == pytest.approx(HIGHEST * (LOWEST / HIGHEST) ** ((40 - len(rates)) / 39))
        assert len(rates) == len(losses)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4)


@pytest.mark.parametrize("end", [math.nan, math.inf, 1e4])
def test_it_ends_where_the_loss_blows_up(end):
    batches = [(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64))] * 100
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1)
    losses = [2.3 - 0.02 * number for number in range(52)] + [end] * 48
    given = iter(losses)
    rates, found = range_test(lambda images, labels: torch.tensor([2 * next(given), 0]), optimizer, batches, 100)
    assert len(rates) == len(found) == 50 + READ_EVERY
    assert found[:52] == pytest.approx(losses[:52])
    assert 0.01 < suggest(rates, found) < rates[52]
    assert draw(rates, found).axes[0].get_ylim()[1] < 20
    with pytest.raises(Diverged, match="the loss of the first batch is nan"):
        range_test(lambda images, labels: torch.tensor([math.nan, 0]), optimizer, batches, 100)


def test_the_suggestion_is_where_the_loss_stops_falling():
    """Wherever on the flat part it happens to be lowest."""
    rates = [LOWEST * (HIGHEST / LOWEST) ** (number / 999) for number in range(1000)]
    losses = [max(2.3 - max(0, math.log10(rate / 1e-3)), 0.3) - 0.001 * (rate > 1) + (rate > 5) for rate in rates]
    assert suggest(rates, losses) == 0.1
    assert suggest(rates, [2.3 - 0.04 * math.sin(rate) for rate in rates]) is None  # it hardly falls


def test_nothing_is_suggested_where_nothing_was_learned(find_lr, monkeypatch, saved):
    monkeypatch.setattr("tinycnn.experiments.range_test.range_test", lambda *_: ([1e-4, 1e-3, 1e-2], [0.1, 0.2, 0.3]))
    status, out, err = find_lr("--batch-size", "1")
    assert (status, err) == (0, "")
    assert out.splitlines()[-1].startswith("No suggestion: the loss fell by less than 2 %.")
    assert len(saved[-1].axes[0].lines) == 2


def test_the_mean_is_not_drawn_to_zero():
    assert smooth([2.0] * 5) == pytest.approx([2.0] * 5)
    assert smooth([1.0, 2.0])[1] == pytest.approx((0.95 * 1 + 2) / 1.95)
