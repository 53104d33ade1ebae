"""python main.py plot: draw the pictures of a finished run."""

from argparse import Namespace

from config import UserError
from tinycnn.commands.parser import Parser, check_settings

HELP = """Draw the pictures of a finished run into its folder: accuracy.png, confusion_matrix.png, mistakes.png,
augmentation.png, receptive_field.png and filters.png.

    python main.py plot                         the newest finished run
    python main.py plot RUN                     its --name, its folder's name under logs/runs, or a path
"""


def parse(line: list[str]) -> Namespace:
    """Parse the arguments of `plot`."""
    parser = Parser("plot", HELP)
    parser.add_run("log_dir", "data_dir", "device")
    return check_settings(parser.parse(line))


def run(arguments: Namespace) -> None:
    """Draw the pictures of the run into its folder, from its weights and its images."""
    from tinycnn.inference.loading import load_trained
    from tinycnn.inference.pictures import draw_pictures

    if arguments.run and arguments.run.endswith(".safetensors"):
        raise UserError(f"{arguments.run} holds weights, but pictures are drawn of a run: name its folder")
    draw_pictures(load_trained(arguments))
