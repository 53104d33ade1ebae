"""experiments.png."""

import itertools
import math
import statistics
from dataclasses import dataclass, field

from matplotlib.figure import Figure
from matplotlib.text import Text

from tinycnn.experiments.plots import experiments


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


def rows(figure: Figure) -> list[str]:
    """The labels of the rows, upwards."""
    return [text.get_text() for text in figure.axes[0].get_yticklabels()]


def legend(figure: Figure) -> str:
    return next(text.get_text() for text in figure.findobj(Text) if text.get_text().startswith("circles: seeds"))


def test_a_row_a_setting_the_best_on_top():
    groups = [Group("lr 0.2", [89.0]), Group("reference", [88.54], is_reference=True), Group("lr 0.1", [85.0, 86.0, 87.0], 0.5)]
    figure = experiments(Comparison(groups))
    (axes,) = figure.axes
    assert rows(figure) == ["lr 0.1", "reference", "lr 0.2"]
    assert [text.get_text() for text in axes.child_axes[0].get_yticklabels()] == ["86.00 ± 0.50", "88.54", "89.00"]
    (seeds,) = [line for line in axes.lines if line.get_fillstyle() == "none"]
    assert seeds.get_xydata().tolist() == [[85, 0], [86, 0], [87, 0]]
    means = [container.lines[0].get_xydata().tolist()[0] for container in axes.containers]
    assert means == [[86, 0], [88.54, 1], [89, 2]]
    (bar,) = axes.containers[0].lines[2]
    assert bar.get_segments()[0].tolist() == [[85.5, 0], [86.5, 0]]
    assert len([line for line in axes.lines if list(line.get_xdata()) == [88.54, 88.54]]) == 1
    assert "dashed: the reference" in legend(figure)
    assert axes.get_xlabel() == "validation accuracy, %"


def test_sixty_rows_have_labels_that_keep_apart():
    long = "lr 0.05, label_smoothing 0.1, epochs 8, coarse_dropout_p 0.5, batch_size 512, weight_decay 0.0001, $x_{"
    figure = experiments(Comparison([Group(f"{long}{number}", [90 - number / 20], 0.1) for number in range(60)]))
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].get_yticklabels()]
    assert len(boxes) == 60
    assert all(lower.y1 <= upper.y0 for lower, upper in itertools.pairwise(boxes))
    assert figure.get_figheight() * 150 < 6000


def test_a_legend_names_what_is_drawn():
    groups = [Group(f"lr {number}", [accuracy, accuracy + 0.4], 0.2) for number, accuracy in enumerate((87.5, 87, 86, 85, 10))]
    figure = experiments(Comparison(groups))
    assert figure.axes[0].get_xlim()[0] > 80  # one failure does not squeeze the others
    assert legend(figure) == "circles: seeds; dots: means with standard errors; ◂: out of the picture"
    alone = experiments(Comparison([Group("reference", [88.54], is_reference=True)]))
    assert rows(alone) == ["reference"]
    assert legend(alone) == "circles: seeds; dots: means with standard errors; dashed: the reference"
