"""What does a network gain that begins with trained weights, --init, where there are few pictures of other classes?

    python benchmarks/fine_tuning.py > benchmarks/results/fine_tuning.txt

"One's own pictures" are drawn shapes of five kinds, 50 of each to train on and 50 to test, from tinycnn.data.synthetic: no
committed network was trained on them. Three seeds, 20 epochs on one thread: some minutes.
"""

import contextlib
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from tinycnn.data.synthetic import SHAPES, synthetic
from tinycnn.runs.finding import PROGRAM, find_runs
from tinycnn.runs.record import read_run

CLASSES, PICTURES = 5, 50
INIT = "logs/reference/best/seed-0"
LINE = ["sweep", "--init", f",{INIT}", "--seeds", "3", "--dataset", "folder", "--data-dir", "shapes", "--recipe", "fast",
        "--epochs", "20", "--batch-size", "32"]
HERE = ["--threads", "1", "--device", "cpu", "--no-pictures", "--log-dir", "fine_tuning"]


def write_pictures(folder: Path) -> None:
    """Write folder/train/<class>/*.png and folder/test/<class>/*.png."""
    images = synthetic()
    for name, split in (("train", images.train), ("test", images.test)):
        for label, shape in enumerate([*SHAPES][:CLASSES]):
            (folder / name / shape).mkdir(parents=True)
            for number, index in enumerate(np.flatnonzero(split.labels == label)[:PICTURES]):
                Image.fromarray(split.images[index]).save(folder / name / shape / f"{number}.png")


def main() -> None:
    """Write the pictures, make the sweep's six runs, print their test accuracies."""
    with tempfile.TemporaryDirectory() as temporary, contextlib.chdir(temporary):
        write_pictures(Path("shapes"))
        subprocess.run([sys.executable, str(PROGRAM / "main.py"), *LINE, *HERE], check=True, stdout=sys.stderr)
        runs = [read_run(folder) for folder in find_runs(Path("fine_tuning"))]
    print(f"Five classes of {PICTURES} pictures each: {', '.join([*SHAPES][:CLASSES])}\n")
    print(f"python main.py {' '.join(LINE[:9])} \\\n    {' '.join(LINE[9:] + HERE)}\n\n{'':33}  epoch   test %   of the seeds")
    for begun, words in ((False, "from nothing"), (True, f"--init {INIT}")):
        group = sorted((run for run in runs if bool(run.record["config"]["init"]) == begun),
                       key=lambda run: run.record["config"]["seed"])
        for epoch in (4, 19):
            values = [run.rows[epoch]["test_acc"] for run in group]
            print(f"{words * (epoch == 4):33}  {epoch:5}  {statistics.fmean(values):7.2f}   "
                  + " ".join(f"{value:.2f}" for value in values))


if __name__ == "__main__":
    main()
