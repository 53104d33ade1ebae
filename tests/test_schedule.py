"""The learning rates: torch's own, and as config.py says."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import main
from config import Config, UserError

# by epoch, as the design fixes them
PUBLISHED = {0: "0.010000", 10: "0.009619", 20: "0.008536", 30: "0.006914", 40: "0.005001", 50: "0.003087", 60: "0.001465",
             70: "0.000382", 79: "0.000005"}


def rates(make, steps: int) -> list[float]:
    """The rates of so many steps of the scheduler that make(optimizer) returns."""
    optimizer = main.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def scheduled(epochs: int, **settings) -> list[float]:
    """The rate of each epoch, or, of one-cycle, of each of its five steps."""
    config = Config(lr=0.1, epochs=epochs, **settings)
    steps = epochs * (5 if config.schedule == "one-cycle" else 1)
    return rates(lambda optimizer: main.make_scheduler(optimizer, config, 5), steps)


def test_the_published_rates():
    optimizer = main.SGD([nn.Parameter(torch.zeros(1))], lr=Config.lr)
    scheduler, found = main.make_scheduler(optimizer, Config(), 391), []
    for _ in range(80):
        found.append(f"{optimizer.param_groups[0]['lr']:.6f}")
        optimizer.step()
        scheduler.step()
    assert {epoch: found[epoch] for epoch in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize("settings", [{}, {"min_lr": 0.0}, {"min_lr": 0.05}])
def test_cosine_is_torchs_to_the_bit_and_ends_at_min_lr_after_the_last_epoch(settings):
    low = settings.get("min_lr", Config.min_lr)
    found = scheduled(7, **settings)
    assert found == rates(lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 7, low), 7)
    assert found[0] == 0.1
    assert scheduled(8, **settings)[4] == pytest.approx((0.1 + low) / 2)
    assert all(one > other > low for one, other in pairwise(found))


@pytest.mark.parametrize("low", [0.0, 1e-6, 0.01])  # the last one above where the cycle begins
def test_one_cycle_goes_up_to_lr_for_three_tenths_of_the_steps_and_down_to_min_lr(low):
    found = scheduled(4, schedule="one-cycle", min_lr=low)
    assert found == pytest.approx(rates(lambda optimizer: lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=20, cycle_momentum=False, final_div_factor=0.1 / 25 / max(low, 1e-10)), 20))
    assert found[0] == pytest.approx(0.1 / 25)
    assert max(found) == found[5] == pytest.approx(0.1)  # of 0 to 19
    assert found[-1] == pytest.approx(low, abs=1e-9)


def test_one_cycle_leaves_the_momentum_as_it_is():
    optimizer = main.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.7)
    main.make_scheduler(optimizer, Config(schedule="one-cycle", epochs=2), 5)
    assert optimizer.param_groups[0]["momentum"] == 0.7


@pytest.mark.parametrize(("epochs", "tenths"), [(1, [0]), (2, [0, 1]), (3, [0, 0, 1]), (4, [0, 0, 1, 2]),
                                                (8, [0, 0, 0, 0, 1, 1, 2, 2])])
def test_step_is_a_tenth_after_half_and_after_three_quarters(epochs, tenths):
    assert scheduled(epochs, schedule="step") == pytest.approx([0.1 ** (1 + power) for power in tenths])


def test_constant():
    assert scheduled(9, schedule="constant") == [0.1] * 9


@pytest.mark.parametrize(("schedule", "torchs"), [
    ("cosine", lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 5, 1e-6)),
    ("step", lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [3, 4])), ("constant", None)])
def test_warmup_grows_linearly_to_lr_and_the_schedule_has_the_epochs_that_are_left(schedule, torchs, recwarn):
    found = scheduled(8, schedule=schedule, warmup=3)
    assert found[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert found[3:] == pytest.approx(rates(torchs, 5) if torchs else [0.1] * 5)
    assert not list(recwarn)


@pytest.mark.parametrize("settings", [{"warmup": 4, "epochs": 4}, {"warmup": 1, "schedule": "one-cycle"}, {"warmup": 1.5},
                                      {"schedule": "cosin"}, {"min_lr": 0.2, "lr": 0.1}, {"min_lr": math.nan}])
def test_settings_that_do_not_fit_are_named(settings):
    with pytest.raises(UserError, match=r"--(warmup|schedule|min-lr) is "):
        Config(**settings)


def test_min_lr_that_has_no_effect_is_told(capsys):
    from tinycnn.commands.train import parse

    for line, told in ((["--min-lr", "0", "--schedule", "step"], "--min-lr has no effect with --schedule step\n"),
                       (["--min-lr", "0", "--schedule", "constant"], "--min-lr has no effect with --schedule constant\n"),
                       (["--min-lr", "0"], ""), (["--min-lr", "0", "--schedule", "one-cycle"], ""),
                       (["--schedule", "step"], ""), (["--recipe", "fast", "--schedule", "step"], "")):
        parse(line)
        assert capsys.readouterr().err == told
