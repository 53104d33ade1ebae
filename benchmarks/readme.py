"""Write the tables of README.md, LEARNINGS.md and docs/ from what they report: logs/reference, the network, the results of the
benchmarks, comparisons of runs. Draw benchmarks/results/inference.png.

    python benchmarks/readme.py

Each table stands between two comments that name it: <!-- log --> and <!-- end of log -->. A file NAME.txt in
benchmarks/results is the table NAME. A test fails when one is not what this would write.
"""

import ast
import csv
import re
import statistics
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.inference import FLOAT32, OURS
from benchmarks.inference_picture import Point, draw, make_points, read_rows
from benchmarks.peers import peers
from config import RECIPES, SIDE, SMALL_CROPS, Config, flag
from model import Net
from tinycnn.experiments.comparison import make_tables
from tinycnn.experiments.report import as_text, with_short_teachers
from tinycnn.experiments.statistics import LEVEL
from tinycnn.network.receptive_field import convolutions
from tinycnn.network.summary import describe_network
from tinycnn.runs.finding import PROGRAM, REFERENCE
from tinycnn.runs.record import CONFIG, SavedRun, read_run
from tinycnn.sources import ON_TOP
from tinycnn.text import plural

RESULTS = PROGRAM / "benchmarks" / "results"
PICTURE = RESULTS / "inference.png"
# The committed runs besides the recipes: a folder under logs/reference, and how it differs from a recipe of now
WHOLE_IMAGES = {"crop_size": 32, "whole_images_share": 0.0}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "baseline-cuda": ("baseline", {}),
    "fast-20": ("fast", {"epochs": 20} | WHOLE_IMAGES),
    "fast-taught": ("fast", {"epochs": 20} | WHOLE_IMAGES | {"teacher": "logs/reference/strong-80/seed-0"}),
    "strong-80": ("strong", {"epochs": 80} | WHOLE_IMAGES),
    "strong-crops": ("strong", {"epochs": 122} | SMALL_CROPS),
    "wide": ("strong", {"epochs": 61, "width": 4} | SMALL_CROPS),
    "best-160": ("best", {
        "epochs": 160, "teacher": "logs/reference/strong-crops/seed-0,logs/reference/strong-crops/seed-1"})}

# train and test accuracy of the published run of this network, by epoch
PUBLISHED = {0: (33.25, 44.40), 10: (71.84, 75.30), 20: (77.57, 81.73), 40: (83.18, 84.77), 60: (86.37, 86.55),
             79: (87.45, 87.20)}
# The stages of the network: name, and why it is there
STAGES = {"input_block": ("input", "reads the colours: the only full 3x3 convolution"),
          "conv_block1": ("block 1", "edges and colours; halves the map"),
          "conv_block2": ("block 2", "textures; halves the map, doubles the channels"),
          "conv_block3": ("block 3", "parts of objects; halves the map"),
          "conv_block4": ("block 4", "dilation 2 widens the receptive field from 63 to 79, at no more multiply-adds"),
          "head": ("head", "averages each map, then weighs the features")}


def log_table() -> str:
    """Selected epochs of the reference run beside the published one."""
    rows = read_run(REFERENCE).rows
    lines = ["| epoch | learning rate | train loss | train % | test loss | test % | published train % | published test % |",
             "|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for epoch, (train, test) in PUBLISHED.items():
        row = rows[epoch]
        lines.append(f"| {epoch} | {row['lr']:.6f} | {row['train_loss']:.4f} | {row['train_acc']:.2f} | {row['test_loss']:.4f} "
                     f"| {row['test_acc']:.2f} | {train:.2f} | {test:.2f} |")
    gap = rows[79]["test_acc"] - PUBLISHED[79][1]
    lines += ["", f"The final test accuracy is {rows[79]['test_acc']:.2f} %, {abs(gap):.2f} points "
              f"{'below' if gap < 0 else 'above'} the published run's. The run took "
              f"{sum(row['seconds'] for row in rows) / 3600:.1f} hours on one thread, beside two others."]
    return "\n".join(lines)


def first_rows() -> str:
    """The first lines of the reference run's table, as the terminal shows them."""
    lines = (REFERENCE / "model_accuracy.log").read_text().splitlines()
    return "```\n" + "\n".join([line for line in lines if not line.startswith("#")][:4]) + "\n```"


def stage_table() -> str:
    """The stages of the network: output size, receptive field, parameters, and why."""
    net, layers = Net(), convolutions(Net())
    lines = ["| stage | output | receptive field | parameters | |", "|---|---|---:|---:|---|"]
    for block, (name, why) in STAGES.items():
        last = [layer for layer in layers if layer.name.split(".")[0] == block][-1]
        parameters = sum(parameter.numel() for parameter in net.get_submodule(block).parameters())
        lines.append(f"| {name} | {' x '.join(map(str, last.output))} | {last.receptive_field} | {parameters:,} | {why} |")
    about = describe_network(net)
    return "\n".join([*lines, f"| all | | | {about['parameters']:,} | {about['multiply_adds']:,} multiply-adds an image |"])


def convolution_table() -> str:
    """Every convolution of the network: kernel, output size, receptive field, weights, multiply-adds."""
    layers = dict(Net().named_modules())
    lines = ["| stage | convolution | stride | dilation | output | receptive field | weights | multiply-adds |",
             "|---|---|---:|---:|---|---:|---:|---:|"]
    for found in convolutions(Net()):
        layer = layers[found.name]
        kind = "depthwise" if layer.groups > 1 else "pointwise" if found.kernel == (1, 1) else "full"
        size = " x ".join(map(str, found.output))
        stage = STAGES[found.name.split(".")[0]][0]
        lines.append(f"| {stage} | {kind} {found.kernel[0]}x{found.kernel[1]} | {found.stride[0]} | {found.dilation[0]} "
                     f"| {size} | {found.receptive_field} | {layer.weight.numel():,} | {found.multiply_adds:,} |")
    return "\n".join(lines)


def recipe_runs(recipe: str) -> list[SavedRun]:
    """The committed runs of a recipe, by seed."""
    folders = [path.parent for path in (REFERENCE / recipe).glob(f"*/{CONFIG}")] + [REFERENCE] * (recipe == "baseline")
    return sorted(map(read_run, folders), key=lambda run: run.record["config"]["seed"])


def accuracy(recipe: str) -> tuple[float, float, int]:
    """Of a recipe's test accuracies: the mean, their standard deviation (0 of one seed), and how many there are."""
    values = [run.rows[-1]["test_acc"] for run in recipe_runs(recipe)]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values)


def plus_minus(mean: float, std: float) -> str:
    """A mean with its standard deviation, where there is one."""
    return f"{mean:.2f}" + (f" ± {std:.2f}" if std else "")


def compute(settings: Mapping[str, Any]) -> float:
    """Multiply-adds of training with these settings, in multiples of the baseline's. They grow with the pixels of an image, and
    a backward pass costs two forward ones. Each teacher was trained, and predicts in every step."""
    whole = round(settings["whole_images_share"] * settings["epochs"])
    images = ((settings["epochs"] - whole) * (settings["crop_size"] / SIDE) ** 2 + whole) / Config().epochs
    total = images * multiply_adds(settings["width"])
    for name in filter(None, settings["teacher"].split(",")):
        teacher = vars(Config()) | read_run(PROGRAM / name).record["config"]
        total += compute(teacher) + images * multiply_adds(teacher["width"]) / 3
    return total


@cache
def multiply_adds(width: int) -> float:
    """Of a network of this width, in multiples of those of width 1."""
    wide, narrow = (describe_network(Net(width=each))["multiply_adds"] for each in (width, 1))
    return wide / narrow


def result_line() -> str:
    """What the network reaches, without a teacher and with one, what that costs, and the most accurate of its peers."""
    ours, latency = describe_network(Net()), latencies()
    name, peer = max(peers().items(), key=lambda item: (not item[1].required, item[1].accuracy))
    theirs = describe_network(peer.net)
    alone, taught = accuracy("strong"), accuracy("best")
    cost = compute(vars(Config(**RECIPES["best"]))) / compute(vars(Config(**RECIPES["strong"])))
    return (f"The network has **{ours['parameters']:,} parameters** and {ours['multiply_adds'] / 1e6:.2f} M multiply-adds. "
            f"Trained on the labels alone, it reaches **{plus_minus(*alone[:2])} %** test accuracy (`strong`, "
            f"{plural(alone[2], 'seed')}). With a teacher it reaches **{plus_minus(*taught[:2])} %** (`best`, "
            f"{plural(taught[2], 'seed')}), for {cost:.0f} times the compute, the teacher's included. An image takes "
            f"**{latency[OURS]} ms** (ONNX Runtime, float32, one thread of an AMD EPYC). {name}, the most accurate of the "
            f"[networks compared](docs/inference.md), reaches {peer.accuracy:.2f} % as published, with "
            f"{theirs['parameters']:,} parameters, {theirs['multiply_adds'] / 1e6:.2f} M multiply-adds and {latency[name]} ms.")


@cache
def latencies() -> dict[str, str]:
    """Milliseconds for one image on one thread in ONNX Runtime, by network, as benchmarks/inference.py printed them."""
    rows = read_rows((RESULTS / "inference.txt").read_text())
    return {row["network"]: row["ms"] for row in rows if row["runtime"] == FLOAT32}


def command(recipe: str, changes: dict[str, Any]) -> str:
    """The command that trains a recipe with these changes."""
    named = "" if recipe == "baseline" else f" --recipe {recipe}"
    return " ".join([f"python main.py{named}", *(f"{flag(name)} {value}" for name, value in changes.items())])


def duration(recipe: str) -> str:
    """How long the epochs of a recipe's runs took, on average, and on what."""
    runs = recipe_runs(recipe)
    minutes = statistics.fmean(sum(row["seconds"] for row in run.rows) for run in runs) / 60
    device = "H100" if "H100" in runs[0].record["machine"]["device"] else "CPU, one thread"
    return f"{minutes / 60:.1f} h ({device})" if minutes > 60 else f"{minutes:.0f} min ({device})"


def recipe_table() -> str:
    """Cost and final accuracies of the recipes: mean and standard deviation over seeds."""
    lines = ["| recipe | command | epochs | cost | time | test % | seeds |", "|---|---|---:|---:|---:|---:|---:|",
             f"| as published | | 80 | 1 | | {PUBLISHED[79][1]:.2f} | 1 |"]
    for recipe, changes in RECIPES.items():
        config, (mean, std, count) = Config(**changes), accuracy(recipe)
        lines.append(f"| `{recipe}` | `{command(recipe, {})}` | {config.epochs} | {compute(vars(config)):.2g} "
                     f"| {duration(recipe)} | {plus_minus(mean, std)} | {count} |")
    return "\n".join(lines)


def seeds_table() -> str:
    """Cost and accuracies of all committed runs, seed by seed."""
    lines = ["| folder | flags | epochs | cost | each seed | test % |", "|---|---|---:|---:|---:|---:|"]
    for folder in (*RECIPES, *OTHERS):
        recipe, changes = OTHERS.get(folder, (folder, {}))
        config = Config(**(RECIPES[recipe] | changes))
        each = ", ".join(f"{run.rows[-1]['test_acc']:.2f}" for run in recipe_runs(folder))
        flags = command(recipe, changes).removeprefix("python main.py").strip()
        lines.append(f"| `{folder}` | {flags and f'`{flags}`'} | {config.epochs} | {compute(vars(config)):.2g} | {each} "
                     f"| {plus_minus(*accuracy(folder)[:2])} |")
    return "\n".join(lines)


def peer_table() -> str:
    """What other networks cost and reach, beside ours."""
    lines = ["| network | parameters | multiply-adds | ms an image | test % |", "|---|---:|---:|---:|---:|"]
    figures = {f"this one, `{recipe}`": (OURS, Net(), plus_minus(*accuracy(recipe)[:2])) for recipe in ("best", "strong")} | {
        name: (name, peer.net, f"{'> ' if peer.required else ''}{peer.accuracy:.2f}") for name, peer in peers().items()}
    for label, (name, net, reached) in figures.items():
        about = describe_network(net)
        lines.append(f"| {label} | {about['parameters']:,} | {about['multiply_adds'] / 1e6:.2f} M | {latencies()[name]} "
                     f"| {reached} |")
    return "\n".join(lines)


def picture_points() -> list[Point]:
    """The networks in the picture."""
    reached = {recipe: accuracy(recipe)[:2] for recipe in RECIPES}
    points = make_points(read_rows((RESULTS / "inference.txt").read_text()), reached)
    ours = next(point for point in points if point.kind == "ours")
    return [*points, Point("this network,\nas published", "published", ours.latency, PUBLISHED[79][1])]


def comparison() -> str:
    """What `compare` prints of the committed runs."""
    runs = [run for folder in ("fast", "strong", "best", "wide", "strong-80", "fast-20", "fast-taught")
            for run in recipe_runs(folder)]
    return "```\n" + as_text(make_tables(runs, *recipe_runs("baseline"))).strip() + "\n```"


def first_sentence(path: Path) -> str:
    """The first sentence of a file's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.split(r"\.\s|\.$|\n\n", docstring, maxsplit=1)[0].replace("\n", " ")


def structure() -> str:
    """Every file of the program with the first sentence of its docstring, room by room."""
    package = PROGRAM / "tinycnn"
    lines = [f"{name:21} {first_sentence(PROGRAM / name)}" for name in (*ON_TOP, "hubconf.py") if (PROGRAM / name).exists()]
    for room in (package, *sorted(path.parent for path in package.glob("*/__init__.py"))):
        lines.append(f"{room.relative_to(PROGRAM)}/")
        lines += [f"  {path.name:19} {first_sentence(path)}" for path in sorted(room.glob("[!_]*.py"))]
    return "```\n" + "\n".join(lines) + "\n```"


def results() -> dict[str, str]:
    """The results of the benchmarks as they were printed, by name: "training speed" of training_speed.txt."""
    return {path.stem.replace("_", " "): "```\n" + path.read_text().rstrip() + "\n```" for path in RESULTS.glob("*.txt")}


def experiments(name: str) -> list[dict[str, str]]:
    """The rows of an experiments.csv that `compare` wrote."""
    with open(RESULTS / f"{name}.csv", newline="") as file:
        return [row | {"differs": row["differs"].replace("uncropped_share", "whole_images_share")}  # as it was called then
                for row in csv.DictReader(file)]


def runs_table(*names: str, which: str = "") -> str:
    """The rows of comparisons that are not the reference, of all or of those with one setting, the best first, with the
    settings that they don't share."""
    rows = [row for name in names for row in experiments(name) if row["differs"] != "-" and which in row["differs"]]
    shared = set.intersection(*(set(row["differs"].split(", ")) for row in rows))
    lines = ["| settings | seeds | train % | validation % |", "|---|---:|---:|---:|"]
    for row in sorted(rows, key=lambda row: -float(row["val_acc"])):
        own = ", ".join(part for part in row["differs"].split(", ") if part not in shared)
        lines.append(f"| {with_short_teachers(own) or 'nothing else'} | {row['count']} | {float(row['train_acc']):.2f} | "
                     f"{float(row['val_acc']):.2f} |")
    return "\n".join(lines)


def changes_table(name: str) -> str:
    """What a sweep with --one-at-a-time found, from the experiments.csv that its `compare` wrote: each row beside that of the
    unchanged settings."""
    rows = experiments(name)
    base = next(row for row in rows if any(other["compared_with"] == row["run"] for other in rows))
    common = set(base["differs"].split(", "))
    lines = ["| change | seeds | train % | validation % | difference | significant |", "|---|---:|---:|---:|---:|---|",
             f"| none | {base['count']} | {float(base['train_acc']):.2f} | {float(base['val_acc']):.2f} | | |"]
    found = [row for row in rows if row["compared_with"] == base["run"]]
    for row in sorted(found, key=lambda row: -float(row["difference"])):
        parts = [part for part in row["differs"].split(", ") if part not in common and not part.startswith("model.py")]
        verdict = "yes" if float(row["corrected_p"]) <= LEVEL else "no"
        lines.append(f"| {', '.join(parts)} | {row['count']} | {float(row['train_acc']):.2f} | {float(row['val_acc']):.2f} | "
                     f"{float(row['difference']):+.2f} ± {float(row['standard_error']):.2f} | {verdict} |")
    return "\n".join(lines)


@cache
def tables() -> dict[str, str]:
    """Every table by its name."""
    return results() | {
        "structure": structure(), "result": result_line(), "rows": first_rows(), "log": log_table(), "recipes": recipe_table(),
        "seeds": seeds_table(), "stages": stage_table(), "convolutions": convolution_table(), "peers": peer_table(),
        "cluster": (RESULTS / "cluster.md").read_text().strip(), "compare": comparison(),
        "single changes": changes_table("single_changes"), "fast changes": changes_table("fast_changes"),
        "recipe at length": runs_table("recipe_at_length"), "small crops": runs_table("small_crops"),
        "strong crops": runs_table("strong_changes", "strong_crops"), "strong padding": runs_table("strong_padding"),
        "wide teachers": runs_table("wide_teachers", which="epochs 30")}



def documents() -> list[Path]:
    """The texts that people read."""
    return [*sorted(PROGRAM.glob("*.md")), *sorted((PROGRAM / "docs").glob("*.md"))]


def updated(text: str) -> str:
    """The `text` of a document with every table made anew."""
    for name, table in tables().items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        text = re.sub(f"{begin}.*?{end}", lambda _, new=f"{begin}\n{table}\n{end}": new, text, flags=re.DOTALL)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    for document in documents():
        document.write_text(updated(document.read_text(encoding="utf-8")), encoding="utf-8")
    draw(picture_points(), PICTURE)
