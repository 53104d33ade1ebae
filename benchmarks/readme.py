"""Write the tables of README.md and LEARNINGS.md anew from what they report: the reference log, the network, the results of the
benchmarks, the comparison of runs.

    python benchmarks/readme.py

Each table stands between two comments that name it. A test fails when one is not what this would write.
"""

import ast
import csv
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from analysis.identity import describe_network  # noqa: E402 (after the path is set)
from analysis.receptive_field import convolutions  # noqa: E402
from benchmarks.peers import peers  # noqa: E402
from config import RECIPES, Config  # noqa: E402
from experiments.statistics import LEVEL  # noqa: E402
from model import Net  # noqa: E402
from runs.record import CONFIG, Run, read_run  # noqa: E402

# train and test accuracy of the published run of this network, by epoch
PUBLISHED = {0: (33.25, 44.40), 10: (71.84, 75.30), 20: (77.57, 81.73), 40: (83.18, 84.77), 60: (86.37, 86.55),
             79: (87.45, 87.20)}
TEACHER_WIDTH = {"best": 3, "fast-taught": 1}  # of the teachers, as README.md has them trained
STAGES = {"input_block": "input", "conv_block1": "block 1", "conv_block2": "block 2", "conv_block3": "block 3",
          "conv_block4": "block 4", "head": "head"}


def log_table() -> str:
    """Selected epochs of the reference run beside the published one."""
    rows = read_run(ROOT / "logs" / "reference").rows
    lines = ["| epoch | learning rate | train loss | train % | test loss | test % | published train % | published test % |",
             "|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for epoch, (train, test) in PUBLISHED.items():
        row = rows[epoch]
        lines.append(f"| {epoch} | {row['lr']:.6f} | {row['train_loss']:.4f} | {row['train_acc']:.2f} | {row['test_loss']:.4f} "
                     f"| {row['test_acc']:.2f} | {train:.2f} | {test:.2f} |")
    gap = rows[79]["test_acc"] - PUBLISHED[79][1]
    lines += ["", f"The final test accuracy is {rows[79]['test_acc']:.2f} %, {abs(gap):.2f} points "
              f"{'below' if gap < 0 else 'above'} the published run's."]
    return "\n".join(lines)


def first_rows() -> str:
    """The first lines of the reference run's table, as the terminal shows them."""
    lines = (ROOT / "logs" / "reference" / "model_accuracy.log").read_text().splitlines()
    return "```\n" + "\n".join([line for line in lines if not line.startswith("#")][:4]) + "\n```"


def stage_table() -> str:
    """Every stage of the network: kernel, output size, receptive field, parameters, multiply-adds."""
    net = Net()
    layers = dict(net.named_modules())
    lines = ["| stage | convolution | stride | dilation | output | receptive field | weights | multiply-adds |",
             "|---|---|---:|---:|---|---:|---:|---:|"]
    for found in convolutions(net):
        layer = layers[found.name]
        kind = "depthwise" if layer.groups > 1 else "pointwise" if found.kernel == (1, 1) else "full"
        size = " x ".join(map(str, found.output))
        lines.append(f"| {STAGES[found.name.split('.')[0]]} | {kind} {found.kernel[0]}x{found.kernel[1]} | {found.stride[0]} | "
                     f"{found.dilation[0]} | {size} | {found.receptive_field} | {layer.weight.numel():,} | "
                     f"{found.multiply_adds:,} |")
    return "\n".join(lines)


def recipe_runs(recipe: str) -> list[Run]:
    """The committed runs of a recipe, by seed."""
    reference = ROOT / "logs" / "reference"
    folders = [reference] if recipe == "baseline" else [path.parent for path in (reference / recipe).glob(f"*/{CONFIG}")]
    return sorted(map(read_run, folders), key=lambda run: run.record["config"]["seed"])


def compute(config: Config, teacher_width: int) -> float:
    """Multiply-adds of training, in multiples of the baseline's: a backward pass costs two forward ones. A teacher is trained
    for the baseline's epochs, and predicts in every step."""
    epochs = config.epochs / Config().epochs
    if not config.teacher:
        return epochs
    teacher, ours = (describe_network(Net(width=width))["multiply_adds"] for width in (teacher_width, 1))
    return epochs + teacher / ours * (1 + epochs / 3)


def recipe_table() -> str:
    """The final accuracies of the recipes, beside what is published: mean and standard deviation over seeds."""
    ours = describe_network(Net())
    network = f"{ours['parameters']:,} | {ours['multiply_adds'] / 1e6:.2f} M"
    lines = ["| network, recipe | parameters | multiply-adds | epochs | compute | train % | test % | seeds |",
             "|---|---:|---:|---:|---:|---:|---:|---:|",
             f"| ours, the published run | {network} | 80 | 1 | {PUBLISHED[79][0]:.2f} | {PUBLISHED[79][1]:.2f} | 1 |"]
    taught = {"fast-taught": RECIPES["fast"] | {"teacher": "strong"}}
    for recipe, changes in (RECIPES | taught).items():
        runs, config = recipe_runs(recipe), Config(**changes)
        train, test = ([run.rows[-1][name] for run in runs] for name in ("train_acc", "test_acc"))
        spread = f" ± {statistics.stdev(test):.2f}" if len(runs) > 1 else ""
        figures = f"{statistics.fmean(train):.2f} | {statistics.fmean(test):.2f}{spread}" if runs else "- | not measured yet"
        name = "`fast`, taught by `strong`" if recipe in taught else f"`{recipe}`"
        cost = compute(config, TEACHER_WIDTH.get(recipe, 0))
        lines.append(f"| ours, {name} | {network} | {config.epochs} | {cost:.2g} | {figures} | {len(runs)} |")
    for name, peer in peers().items():
        about = describe_network(peer.net)
        lines.append(f"| {name} | {about['parameters']:,} | {about['multiply_adds'] / 1e6:.2f} M | | | | "
                     f"{'> ' if peer.required else ''}{peer.accuracy:.2f} | |")
    return "\n".join(lines)


def first_sentence(path: Path) -> str:
    """The first sentence of a file's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.split(r"\.\s|\.$|\n\n", docstring, maxsplit=1)[0].replace("\n", " ")


def structure() -> str:
    """Every file of the program with the first sentence of its docstring, room by room."""
    lines = [f"{name:22} {first_sentence(ROOT / name)}" for name in ("config.py", "main.py", "model.py")]
    for room in sorted(path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name != "benchmarks"):
        lines.append(f"{room.name}/")
        lines += [f"  {path.name:20} {first_sentence(path)}" for path in sorted(room.glob("[!_]*.py"))]
    return "```\n" + "\n".join(lines) + "\n```"


def result(name: str) -> str:
    """A benchmark's result as it was printed."""
    return "```\n" + (ROOT / "benchmarks" / "results" / f"{name}.txt").read_text().rstrip() + "\n```"


def experiments(name: str) -> list[dict[str, str]]:
    """The rows of an experiments.csv that `compare` wrote."""
    with open(ROOT / "benchmarks" / "results" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def runs_table(name: str) -> str:
    """The rows of a comparison that are not the reference, the best first, with what they don't share."""
    rows = [row for row in experiments(name) if row["differs"] != "-"]
    shared = set.intersection(*(set(row["differs"].split(", ")) for row in rows))
    lines = ["| settings | seeds | train % | validation % |", "|---|---:|---:|---:|"]
    for row in sorted(rows, key=lambda row: -float(row["val_acc"])):
        own = ", ".join(part for part in row["differs"].split(", ") if part not in shared)
        lines.append(f"| {own} | {row['count']} | {float(row['train_acc']):.2f} | {float(row['val_acc']):.2f} |")
    return "\n".join(lines)


def changes_table(name: str) -> str:
    """What a sweep with --one-at-a-time found, from the experiments.csv that its `compare` wrote: each row beside that of the
    unchanged settings."""
    rows = experiments(name)
    base = next(row for row in rows if any(other["compared_with"] == row["run"] for other in rows))
    common = set(base["differs"].split(", "))
    lines = ["| change | seeds | train % | validation % | difference | |", "|---|---:|---:|---:|---:|---|",
             f"| none | {base['count']} | {float(base['train_acc']):.2f} | {float(base['val_acc']):.2f} | | |"]
    found = [row for row in rows if row["compared_with"] == base["run"]]
    for row in sorted(found, key=lambda row: -float(row["difference"])):
        parts = [part for part in row["differs"].split(", ") if part not in common and not part.startswith("model.py")]
        verdict = "significant" if float(row["corrected_p"]) <= LEVEL else "not significant"
        lines.append(f"| {', '.join(parts)} | {row['count']} | {float(row['train_acc']):.2f} | {float(row['val_acc']):.2f} | "
                     f"{float(row['difference']):+.2f} ± {float(row['standard_error']):.2f} | {verdict} |")
    return "\n".join(lines)


def updated(text: str) -> str:
    """The `text` of README.md or LEARNINGS.md with every table made anew."""
    tables = {"structure": structure(), "rows": first_rows(), "log": log_table(), "recipes": recipe_table(), "stages": stage_table(),
              "training speed": result("training_speed"),
              "dilated": result("dilated"),
              "training profile": result("training_profile"), "same training": result("same_training"),
              "checkpoint overhead": result("checkpoint_overhead"), "inference": result("inference"),
              "inference profile": result("inference_profile"), "single changes": changes_table("single_changes"),
              "recipe changes": changes_table("recipe_changes"), "recipe at length": runs_table("recipe_at_length"),
              "fast changes": changes_table("fast_changes"), "strong changes": changes_table("strong_changes")}
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        text = re.sub(f"{begin}.*?{end}", lambda _, new=f"{begin}\n{table}\n{end}": new, text, flags=re.DOTALL)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    for document in (ROOT / "README.md", ROOT / "LEARNINGS.md", *sorted((ROOT / "docs").glob("*.md"))):
        document.write_text(updated(document.read_text(encoding="utf-8")), encoding="utf-8")
