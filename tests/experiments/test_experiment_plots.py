"""experiments.png."""

import itertools
import math
import statistics
from dataclasses import dataclass, field

import pytest
from matplotlib.collections import PathCollection
from matplotlib.text import Text
from PIL import Image

from tinycnn.experiments.plots import draw_experiments


@dataclass
class Group:
    """What is drawn of a SettingGroup."""

    label: str
    accuracies: list[float]
    standard_error: float = math.nan
    is_reference: bool = False

    def values(self, name: str) -> list[float]:
        assert name == "val_acc"
        return self.accuracies

    def mean(self, name: str) -> float:
        return statistics.fmean(self.values(name))


@dataclass
class Comparison:
    """What is drawn of a Table."""

    groups: list[Group]
    dataset: str = "cifar10, 45,000 training, 5,000 validation and 10,000 test images"
    metric: str = "val_acc"
    judged_by: str = "validation"
    shared: dict[str, str] = field(default_factory=dict)


@pytest.fixture
def axes(saved):
    """The axes of the figure that is saved, after the drawing: axes() -> Axes."""
    return lambda: saved[-1].axes[0]


def test_a_row_a_setting_the_best_on_top(tmp_path, axes):
    groups = [Group("lr 0.1", [85.0, 86.0, 87.0], 0.5), Group("reference", [88.54], is_reference=True), Group("lr 0.2", [89.0])]
    draw_experiments(Comparison(groups), tmp_path / "it.png")
    assert [text.get_text() for text in axes().get_yticklabels()] == ["lr 0.1", "reference", "lr 0.2"]  # upwards
    right = axes().child_axes[0]
    assert [text.get_text() for text in right.get_yticklabels()] == ["86.00 ± 0.50", "88.54", "89.00"]
    (seeds,) = [drawn for drawn in axes().collections if isinstance(drawn, PathCollection)]
    assert seeds.get_offsets().tolist() == [[85, 0], [86, 0], [87, 0]]
    means = [container.lines[0].get_xydata().tolist()[0] for container in axes().containers]
    assert means == [[86, 0], [88.54, 1], [89, 2]]
    (bar,) = axes().containers[0].lines[2]
    assert bar.get_segments()[0].tolist() == [[85.5, 0], [86.5, 0]]
    vertical = [line for line in axes().lines if list(line.get_xdata()) == [88.54, 88.54]]
    assert len(vertical) == 1
    assert axes().get_xlabel() == "validation accuracy, %"
    assert Image.open(tmp_path / "it.png").info["dpi"] == pytest.approx((150, 150), abs=0.1)


def test_sixty_rows_have_labels_that_keep_apart(tmp_path, axes):
    long = "lr 0.05, label_smoothing 0.1, epochs 8, coarse_dropout_p 0.5, batch_size 512, weight_decay 0.0001, $x_{"
    groups = [Group(f"{long}{number}", [80 + number / 20], 0.1) for number in range(60)]
    draw_experiments(Comparison(groups), tmp_path / "it.png")
    axes().figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes().get_yticklabels()]
    assert len(boxes) == 60
    assert all(lower.y1 <= upper.y0 for lower, upper in itertools.pairwise(boxes))
    height = Image.open(tmp_path / "it.png").height
    assert height < 6000


def test_one_failure_does_not_squeeze_the_others(tmp_path, axes):
    groups = [Group(f"lr {number}", [accuracy, accuracy + 0.4], 0.2) for number, accuracy in enumerate((10, 85, 86, 87, 87.5))]
    draw_experiments(Comparison(groups), tmp_path / "it.png")
    assert axes().get_xlim()[0] > 80
    assert any("out of the picture" in text.get_text() for text in axes().figure.findobj(Text))


def test_a_lone_reference_is_drawn(tmp_path, axes):
    draw_experiments(Comparison([Group("reference", [88.54], is_reference=True)]), tmp_path / "it.png")
    assert [text.get_text() for text in axes().get_yticklabels()] == ["reference"]
    assert not any("out of the picture" in text.get_text() for text in axes().figure.findobj(Text))
