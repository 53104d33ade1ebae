"""Compare two runs image by image: how far their accuracies differ, and the standard error from the images.

    python benchmarks/paired_images.py RUN RUN --data-dir ~/data

On the held-out images, or on the test images of runs without any. The error is that of these two networks only: another seed
changes the difference by as much again, or more, so a single pair can't tell which settings are better.
"""

import argparse
import math
import sys
from argparse import Namespace
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from config import Config, UserError
from tinycnn.commands.start import report
from tinycnn.inference.loading import load_trained


def predicted(arguments: Namespace) -> tuple[Tensor, Tensor]:
    """Whether the run classifies each image correctly, N bool; and the labels, N int64."""
    trained = load_trained(arguments)
    logits, labels = trained.predict("validation" if trained.config.validation else "test")
    return logits.argmax(1).eq(labels), labels


def compared(first: Tensor, second: Tensor) -> str:
    """The difference of the accuracies in percentage points ± its standard error, that of paired proportions (McNemar, "Note on
    the sampling error of the difference between correlated proportions or percentages", Psychometrika 12, 1947)."""
    number, only_first, only_second = len(first), int((first & ~second).sum()), int((second & ~first).sum())
    difference = (only_first - only_second) / number
    error = math.sqrt((only_first + only_second) / number - difference**2) / math.sqrt(number)
    return (f"{100 * first.double().mean():.2f} and {100 * second.double().mean():.2f} % of {number:,} images: "
            f"{only_first} by the first only, {only_second} by the second only, {100 * difference:+.2f} ± {100 * error:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs=2, metavar="RUN")
    parser.add_argument("--data-dir", help="default: where the runs had their images")
    parser.add_argument("--log-dir", default=Config.log_dir)
    options = parser.parse_args()
    common = {"log_dir": options.log_dir, "data_dir": options.data_dir, "device": "auto", "model": None}
    try:
        (first, labels), (second, other_labels) = (predicted(Namespace(run=run, **common)) for run in options.run)
        if not labels.equal(other_labels):
            raise UserError("the two runs were not judged by the same images: name runs with the same --validation")
    except UserError as error:
        sys.exit(report(error))
    print(compared(first, second))


if __name__ == "__main__":
    main()
