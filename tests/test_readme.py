"""What the repository claims: the README's tables, the reference run, the folders."""

import json
import re
import subprocess

import pytest
import torch
from conftest import REFERENCE, ROOT
from safetensors import safe_open
from safetensors.torch import load_file
from test_program import RATES

from analysis.identity import describe_network
from benchmarks import readme
from config import RECIPES, Config
from experiments.differences import settings
from images.cifar10 import cifar10 as load_cifar10
from model import Net
from runs.log import read_log
from runs.record import read_run
from runs.weights import read_weights


@pytest.mark.parametrize(("document", "tables"), [
    ("README.md", ["rows", "log", "recipes", "stages", "training speed", "training profile", "dilated", "same training",
                   "checkpoint overhead", "inference", "inference profile"]),
    ("docs/structure.md", ["structure"]),
    ("LEARNINGS.md", ["single changes", "recipe changes", "recipe at length", "fast changes", "strong changes"])])
def test_the_tables_are_what_the_logs_and_the_network_say(document, tables):
    text = (ROOT / document).read_text(encoding="utf-8")
    assert readme.updated(text) == text
    assert re.findall("<!-- (?!end of)(.*?) -->", text) == tables


def test_a_changed_figure_would_be_noticed():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    accuracy = f"{read_run(REFERENCE).rows[79]['test_acc']:.2f}"
    assert readme.updated(text.replace(accuracy, "99.99")) != text.replace(accuracy, "99.99")


def test_the_reference_run_is_the_whole_baseline():
    run = read_run(REFERENCE)
    assert run.record["dataset"]["kind"] == "cifar10"
    assert (run.record["dataset"]["train"], run.record["dataset"]["test"]) == (50_000, 10_000)
    assert run.record["network"] == describe_network(Net())  # else every run would seem to have another network
    assert len(run.rows) == run.summary["epochs"] == 80
    assert {epoch: f"{run.rows[epoch]['lr']:.6f}" for epoch in RATES} == RATES


def test_the_reference_run_reaches_the_published_accuracy_within_noise():
    assert read_run(REFERENCE).rows[79]["test_acc"] >= 87.2 - 0.4


@pytest.mark.parametrize("name", ["model_accuracy.log", "torch_summary.log"])
def test_the_committed_logs_are_those_of_the_reference_run(name):
    """As committed: in the work tree they are those of the run that the user started last."""
    committed = subprocess.run(["git", "show", f"HEAD:logs/{name}"], cwd=ROOT, capture_output=True)
    if committed.returncode:
        pytest.skip("no git checkout")
    assert committed.stdout == (REFERENCE / name).read_bytes()


def test_the_reference_holds_records_and_weights_only():
    made = [path for path in REFERENCE.iterdir() if path.name not in (*RECIPES, "fast-taught")]
    assert {path.name for path in made if path.suffix not in (".png", ".onnx", ".pt2")} == {
        "config.json", "model_accuracy.log", "torch_summary.log", "final.safetensors", "summary.json"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipes_committed_runs_are_whole_runs_of_it(recipe):
    runs, wanted = readme.recipe_runs(recipe), settings(vars(Config(**RECIPES[recipe])))
    for run in runs:
        had = settings(run.record["config"])  # perhaps with a setting that there no longer is
        assert {name: had[name] for name in wanted} == wanted
        assert run.record["dataset"]["sha256"] == read_run(REFERENCE).record["dataset"]["sha256"]
        assert (run.record["dataset"]["train"], run.record["dataset"]["test"]) == (50_000, 10_000)
        assert run.record["network"] == describe_network(Net())
        assert len(run.rows) == run.summary["epochs"] == run.record["config"]["epochs"]
    assert len({run.record["config"]["seed"] for run in runs}) == len(runs)


def test_the_taught_runs_differ_from_fast_by_their_teacher_which_is_the_committed_strong():
    (teacher,) = {run.record["config"]["teacher"] for run in readme.recipe_runs("fast-taught")}
    assert teacher == read_weights(REFERENCE / "strong" / "seed-0" / "final.safetensors").name
    for run in readme.recipe_runs("fast-taught"):
        assert settings(run.record["config"]) == settings(vars(Config(**RECIPES["fast"], teacher=teacher)))
        assert len(run.rows) == run.summary["epochs"] == 20


def test_no_committed_log_holds_an_absolute_path():
    for path in (path for path in REFERENCE.rglob("*") if path.is_file() and path.suffix != ".png"):
        assert not re.search(rb"[\" '=](/[a-z]+){2,}", path.read_bytes()), path


def test_the_readmes_three_lines_load_the_weights():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "load_file" in block)
    assert len(code.splitlines()) == 3
    scope: dict = {}
    exec(code.replace("logs/reference", str(REFERENCE)), scope)
    assert not scope["net"].training
    assert scope["net"](torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_the_reference_weights_give_the_logged_accuracy_on_the_real_images(cifar10):
    with safe_open(REFERENCE / "final.safetensors", "pt") as file:
        about = {key: json.loads(value) for key, value in file.metadata().items()}
    net = Net()
    net.load_state_dict(load_file(REFERENCE / "final.safetensors"))
    net.eval()
    test = load_cifar10(cifar10).test
    right = 0
    for images, labels in zip(torch.from_numpy(test.images).split(500), torch.from_numpy(test.labels).split(500), strict=True):
        pixels = (images / 255 - torch.tensor(about["mean"])) / torch.tensor(about["standard_deviation"])
        with torch.no_grad():
            right += int((net(pixels.permute(0, 3, 1, 2)).argmax(1) == labels).sum())
    assert right / 100 == pytest.approx(read_log(REFERENCE / "model_accuracy.log")[1][79]["test_acc"], abs=0.02)


@pytest.mark.parametrize("weights", sorted(REFERENCE.rglob("*.safetensors")), ids=lambda path: path.parent.name)
def test_the_program_can_still_test_every_committed_network(weights, cifar10, command):
    status, out, _ = command("test", weights.parent, "--flip", "--data-dir", cifar10, "--device", "cpu")
    assert status == 0
    accuracy = float(re.search(r"accuracy ([\d.]+) %", out)[1])
    assert accuracy == pytest.approx(read_run(weights.parent).rows[-1]["test_acc"], abs=0.02)
    mirrored = float(re.search(r"mirrored: accuracy ([\d.]+) %", out)[1])
    told = re.search("also mirrored at the test, .*? `python", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    assert mirrored in [pytest.approx(float(figure), abs=0.02) for figure in re.findall(r"([\d.]+) %", told)]


def test_every_folder_and_file_is_named():
    readme_text, structure = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/structure.md"))
    rooms = sorted(path.parent for path in ROOT.glob("*/__init__.py"))
    for path in (*ROOT.glob("*.py"), *rooms):
        assert f"{path.name}{'' if path.suffix else '/'} " in readme_text, path
    for path in (path for room in rooms if room.name != "benchmarks" for path in room.glob("[!_]*.py")):
        assert f"{path.name} " in structure, path
