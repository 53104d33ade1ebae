"""What the repository claims: tables, figures, links and commands in its documents, the reference run, the folders."""

import ast
import json
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import asdict

import pytest
import torch
from conftest import REFERENCE, ROOT
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_schedule import PUBLISHED as RATES

from benchmarks import readme
from config import RECIPES, Config, net_settings
from model import Net
from tinycnn.commands.parser import parse
from tinycnn.data.cifar10 import cifar10 as load_cifar10
from tinycnn.experiments.differences import effective_settings
from tinycnn.inference.classifier import Classifier
from tinycnn.inference.export import as_torch, fold, quiet
from tinycnn.network.summary import describe_network
from tinycnn.runs.log import read_log
from tinycnn.runs.record import read_run
from tinycnn.runs.weights import load_weights, recorded_names
from tinycnn.sources import COPIED_FILES

DOCUMENTS = {str(path.relative_to(ROOT)): path for path in readme.documents()}
CURRENT = [name for name in DOCUMENTS if name != "LEARNINGS.md"]  # whose commands are for this commit


def text_of(document: str) -> str:
    return DOCUMENTS[document].read_text(encoding="utf-8")


def unwrapped(document: str) -> str:
    """A document's text without line breaks."""
    return " ".join(text_of(document).split())


# ---------------------------------------------------------------- tables and figures

@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_tables_are_what_the_logs_and_the_network_say(document):
    assert readme.updated(text_of(document)) == text_of(document)


def test_each_table_stands_in_one_place():
    names = Counter(name for document in DOCUMENTS for name in re.findall("<!-- (?!end of|Badges)(.*?) -->", text_of(document)))
    assert names.keys() <= readme.tables().keys()
    assert names.keys() >= readme.tables().keys() - readme.results().keys()
    assert names.most_common(1)[0][1] == 1
    for name in names:
        assert sum(f"<!-- end of {name} -->" in text_of(document) for document in DOCUMENTS) == 1


@pytest.mark.parametrize(("document", "old", "new"), [
    ("README.md", "88.54", "99.99"), ("README.md", "0.301 ms", "0.201 ms"), ("README.md", "33 min", "3 min"),
    ("docs/structure.md", "1,048,576", "1,048,575"),
    ("docs/inference.md", "10.89 M", "9.89 M"), ("docs/speed.md", "882", "982"), ("docs/statistics.md", "significant", "yes"),
    ("LEARNINGS.md", "+9.20", "+9.30")])
def test_a_changed_figure_would_be_noticed(document, old, new):
    changed = text_of(document).replace(old, new)
    assert changed != text_of(document)
    assert readme.updated(changed) != changed


def test_figures_in_the_summary_of_what_was_learned_are_those_of_the_tables():
    summary = re.search(r"\n1\. .*?\n10\. .*?\n\n", text_of("LEARNINGS.md"), re.DOTALL)[0]
    told, figure = "\n".join(readme.tables().values()), r"\d+\.\d+"
    config = [f"{value}" for changes in (vars(Config()), {"lr": 0.05}, {"lr": 0.2}) for value in changes.values()]
    assert set(re.findall(figure, summary)) <= {*re.findall(figure, told), *config}
    pair = f"{figure} ± {figure}"
    assert set(re.findall(pair, summary)) <= set(re.findall(pair, told))


def test_the_picture_shows_what_is_measured():
    drawn = json.loads(Image.open(readme.PICTURE).text["Description"])
    assert drawn == [asdict(point) for point in readme.picture_points()]
    assert min(Image.open(readme.PICTURE).info["dpi"]) > 149


# ---------------------------------------------------------------- form, links, commands

def test_a_page_says_at_its_top_what_question_it_answers():
    for document in DOCUMENTS:
        assert not document.startswith("docs/") or text_of(document).splitlines()[0].endswith("?"), document


def missing(document: str, text: str) -> list[str]:
    """The links, pictures and files of a document's text that don't exist."""
    found = []
    for target, heading in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
        path = (DOCUMENTS[document].parent / target) if target else DOCUMENTS[document]
        if not path.exists():
            found.append(target)
        elif heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            if heading not in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]:
                found.append(heading)
    prose = re.sub("<!-- (.*?) -->.*?<!-- end of \\1 -->", "", text, flags=re.DOTALL)
    files = re.findall(r"(?<![\w/.-])((?:tinycnn|benchmarks|docs|tests|logs/reference)/[\w/.-]*\w)", prose)
    generated = re.compile(r"benchmarks/results/(cuda|cluster)\.|logs/reference/.*\.png")
    return found + [name for name in files if not generated.match(name) and not (ROOT / name).exists()]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_picture_and_file_exists(document):
    assert not missing(document, text_of(document))


def test_a_wrong_link_would_be_noticed():
    for line in ("[a](docs/none.md)", "![a](none.png)", "[a](docs/speed.md#none)", "`tinycnn/none.py`", "`tests/none/`"):
        assert missing("README.md", line), line
    assert not missing("README.md", "[a](docs/speed.md#cuda) [b](https://example.org/none.md) `logs/reference/strong/seed-0`")


def commands_in(text: str) -> list[list[str]]:
    """The arguments of every python main.py in a document, but of those with an ellipsis."""
    fenced, lines = False, []
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip().startswith("```"):
            fenced = not fenced
        else:
            lines += [line] if fenced or line.startswith("    ") else re.findall("`([^`]+)`", line)
    calls = [call for line in lines for call in re.split("&&|[ ]#", line) if re.match(r"\s*python main\.py\b", call)]
    return [call.split()[2:] for call in calls if "…" not in call]


@pytest.mark.parametrize("document", CURRENT)
def test_every_command_is_one_that_the_program_takes(document):
    for line in commands_in(text_of(document)):
        if "--help" not in line:
            parse(line)


def test_commands_are_found():
    assert len(commands_in(text_of("README.md"))) > 12
    assert commands_in("`python main.py --lrr 1`") == [["--lrr", "1"]]
    blocks = "```python\nx\n```\n```\npython main.py \\\n    test a && python main.py  # b\n```"
    assert commands_in(blocks) == [["test", "a"], []]


def test_the_two_commands_stand_as_ci_runs_them():
    assert "\npython -m pip install -r requirements.txt && python main.py\n" in text_of("README.md")
    assert "\npython -m pip install -r requirements-test.txt && python -m pytest -n 2\n" in text_of("README.md")


@pytest.mark.skipif(not (shutil.which("bash") and shutil.which("awk")), reason="needs bash and awk")
def test_the_comparison_of_logs_finds_a_changed_figure(tmp_path):
    line = re.search(r"^diff <\(.*$", text_of("docs/structure.md"), re.MULTILINE)[0]
    log = (REFERENCE / "model_accuracy.log").read_text()
    (tmp_path / "logs" / "reference").mkdir(parents=True)
    (tmp_path / "logs" / "reference" / "model_accuracy.log").write_text(log)

    def printed(other: str) -> str:
        (tmp_path / "logs" / "model_accuracy.log").write_text("# run: of now\n" + other)
        return subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True).stdout

    assert printed(log.replace(" 62.19\n", " 99.01\n")) == ""
    assert "1.7688" in printed(log.replace("1.7689", "1.7688"))
    assert "< " not in printed("\n".join(log.splitlines()[:12]) + "\n")


# ---------------------------------------------------------------- the committed runs

def test_the_reference_run_is_the_whole_baseline():
    run = read_run(REFERENCE)
    assert run.record["dataset"]["kind"] == "cifar10"
    assert (run.record["dataset"]["train"], run.record["dataset"]["test"]) == (50_000, 10_000)
    assert run.record["network"].items() >= describe_network(Net()).items()
    assert len(run.rows) == run.summary["epochs"] == 80
    assert {epoch: f"{run.rows[epoch]['lr']:.6f}" for epoch in RATES} == RATES


def test_the_reference_run_reaches_the_published_accuracy():
    assert read_run(REFERENCE).rows[79]["test_acc"] >= 87.2 - 0.4


@pytest.mark.parametrize("name", ["model_accuracy.log", "torch_summary.log"])
def test_the_committed_logs_are_those_of_the_reference_run(name):
    """As committed: in the work tree they are those of the run that the user started last."""
    committed = subprocess.run(["git", "show", f"HEAD:logs/{name}"], cwd=ROOT, capture_output=True)
    if committed.returncode:
        pytest.skip("no git checkout")
    assert committed.stdout == (REFERENCE / name).read_bytes()


def test_the_reference_holds_records_and_weights_only():
    made = [path for path in REFERENCE.iterdir() if path.name not in {*RECIPES, *readme.OTHERS}]
    assert {path.name for path in made if path.suffix not in (".png", ".onnx", ".pt2", ".html")} == {
        "config.json", "model_accuracy.log", "torch_summary.log", "final.safetensors", "summary.json", *COPIED_FILES}


@pytest.mark.parametrize("folder", [*RECIPES, *readme.OTHERS])
def test_the_committed_runs_are_whole_runs_of_their_recipe(folder, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe, changes = readme.OTHERS.get(folder, (folder, {}))
    config = Config(**(RECIPES[recipe] | changes))
    runs, wanted = readme.recipe_runs(folder), effective_settings(vars(config) | recorded_names(load_weights(config)))
    assert runs
    for run in runs:
        assert effective_settings(run.record["config"]) == wanted
        assert run.record["dataset"]["sha256"] == read_run(REFERENCE).record["dataset"]["sha256"]
        assert (run.record["dataset"]["train"], run.record["dataset"]["test"]) == (50_000, 10_000)
        assert run.record["network"].items() >= describe_network(Net(**net_settings(vars(config)))).items()
        assert len(run.rows) == run.summary["epochs"] == run.record["config"]["epochs"]
    assert len({run.record["config"]["seed"] for run in runs}) == len(runs)


def test_no_committed_log_holds_an_absolute_path():
    for path in (path for path in REFERENCE.rglob("*") if path.is_file() and path.suffix != ".png"):
        assert not re.search(rb"[\" '=](/[a-z]+){2,}", path.read_bytes()), path


def listing(document: str, word: str) -> str:
    """The Python listing with `word` in it."""
    return next(block for block in re.findall(r"```python\n(.*?)```", text_of(document), re.DOTALL) if word in block)


def test_an_exported_program_is_used_as_the_page_says(tmp_path):
    path = tmp_path / "model.pt2"
    with quiet():
        path.write_bytes(as_torch(fold(Classifier(Net().eval(), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))), ["one", "two"]))
    names: dict = {}
    exec(listing("docs/inference.md", "torch.export").replace("model.pt2", str(path)), names)
    assert names["logits"].shape == (1, 10)
    assert json.loads(names["names"]["class_names.json"]) == ["one", "two"]


def test_the_readmes_four_lines_print_a_class(tmp_path, monkeypatch, capsys):
    code = listing("README.md", "torch.hub")
    assert len(code.splitlines()) == 4
    Image.new("RGB", (40, 30), "navy").save(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    exec(code.replace('hub.load(".",', f"hub.load({str(ROOT)!r},"), {})
    assert capsys.readouterr().out.strip() in read_run(REFERENCE).record["dataset"]["class_names"]


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
    run = read_run(weights.parent)
    in_bfloat16 = "cuda" in run.record["machine"]["device"]  # so a few predictions differ
    assert accuracy == pytest.approx(run.rows[-1]["test_acc"], abs=0.1 if in_bfloat16 else 0.02)
    mirrored = float(re.search(r"mirrored: accuracy ([\d.]+) %", out)[1])
    assert mirrored == pytest.approx(_mirrored_as_told()[weights.parent.relative_to(REFERENCE).as_posix()], abs=0.02)


def _mirrored_as_told() -> dict[str, float]:
    """The accuracies with mirrored images in docs/inference.md, by the run's folder."""
    return {run.removeprefix("logs/reference").strip("/") or ".": float(mirrored)
            for run, mirrored in re.findall(r"\| `(logs/reference.*?)`.* \| ([\d.]+) \|$", text_of("docs/inference.md"), re.M)}


def test_the_accuracies_without_mirrored_images_are_the_logged_ones():
    told = dict(re.findall(r"\| `(logs/reference.*?)`.* \| ([\d.]+) \| [\d.]+ \|$", text_of("docs/inference.md"), re.M))
    assert len(told) == len(_mirrored_as_told()) > 5
    assert told == {folder: f"{read_run(ROOT / folder).rows[-1]['test_acc']:.2f}" for folder in told}


def test_every_folder_and_file_is_named():
    readme_text, structure = text_of("README.md"), text_of("docs/structure.md")
    rooms = [path.parent for path in (ROOT / "tinycnn").glob("*/__init__.py")]
    for path in (*ROOT.glob("*.py"), *rooms):
        assert re.search(rf"^ *{path.name}{'' if path.suffix else '/'} ", readme_text, re.MULTILINE), path
    for path in (ROOT / "tinycnn").rglob("[!_]*.py"):
        assert f"{path.name} " in structure, path


# ---------------------------------------------------------------- the house

ROOMS = ["commands", "experiments", "inference", "runs", "training", "kernels", "data network", "."]  # imports go down only


def imports(path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    found = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return found | {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}


def test_imports_go_one_way():
    floor = {room: number for number, rooms in enumerate(ROOMS) for room in rooms.split()}
    package = ROOT / "tinycnn"
    for path in package.rglob("*.py"):
        room = path.parent.name if path.parent != package else "."
        for module in imports(path):
            first, *rest = module.split(".")
            assert first != "main" or path.name == "cluster.py", path  # a worker of Ray
            if (path.name, module) == ("device_batches.py", "tinycnn.kernels.policy"):  # one policy of batches is a kernel
                continue
            if first == "tinycnn" and rest:
                other = rest[0] if (package / rest[0]).is_dir() else "."
                assert room == other or floor[room] < floor[other], f"{path} imports {module}"
    for name in ("config.py", "augmentation.py", "model.py"):
        assert not any(module.startswith("tinycnn") for module in imports(ROOT / name)), name
