"""Which weights, network and images a command uses, and what it refuses."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import REFERENCE, ROOT, SMALL, one_line
from learned_run import arguments, copy_learned_run, learned_run, rewrite_metadata
from safetensors.torch import load_file, save_file
from torch import nn

from config import UserError
from model import Net
from tinycnn.data.loading import load_dataset
from tinycnn.inference.loading import load_trained
from tinycnn.runs.record import read_run
from tinycnn.runs.weights import read_weights, save_weights
from tinycnn.sources import COPIED_FILES, code_hash

PLAIN = (ROOT / "model.py").read_text()
OTHER = PLAIN.replace("nn.ReLU(),", "nn.LeakyReLU(0.5),")  # the same parameters, other results


# ---------------------------------------------------------------- the images and settings of the run

def test_a_run_is_loaded_as_it_was_trained(tmp_path):
    folder = copy_learned_run(tmp_path)
    trained = load_trained(arguments(folder))
    images = load_dataset("folder", str(learned_run() / "pictures")).hold_out(30)
    assert trained.dataset.fingerprint == images.fingerprint
    assert trained.config.batches == "device"
    assert trained.config.threads >= 1
    assert trained.config.lr == 0.05
    assert not trained.net.training
    assert trained.device == torch.device("cpu")
    for name, tensor in load_file(folder / "final.safetensors").items():
        assert torch.equal(trained.net.state_dict()[name], tensor)
    right = (trained.predict()[0].argmax(1).numpy() == images.test.labels).mean()
    assert 100 * right == pytest.approx(read_run(folder).rows[-1]["test_acc"], abs=0.005)


def test_the_images_are_where_the_run_had_them_unless_others_are_named(tmp_path, pictures, monkeypatch):
    folder = copy_learned_run(tmp_path)
    monkeypatch.chdir(tmp_path)  # where there is no data/
    assert load_trained(arguments(folder)).config.data_dir == str(learned_run() / "pictures")
    moved = tmp_path / "moved"
    shutil.copytree(learned_run() / "pictures", moved)
    assert load_trained(arguments(folder, data_dir=str(moved))).config.data_dir == str(moved)
    with pytest.raises(UserError, match=r"the images in .* are not those that .* was trained on: name .* --data-dir"):
        load_trained(arguments(folder, data_dir=str(pictures)))
    (folder / "checkpoint.pt").write_bytes(b"damaged")  # then by the one before
    assert load_trained(arguments(folder)).config.data_dir == str(learned_run() / "pictures")
    (folder / "checkpoint.previous.pt").unlink()  # then in Config's default
    moved.rename(tmp_path / "data")
    assert load_trained(arguments(folder)).config.data_dir == "data"


def test_a_run_is_used_that_had_a_setting_which_there_no_longer_is(command, tmp_path):
    path = copy_learned_run(tmp_path) / "final.safetensors"
    before = command("test", path, "--device", "cpu")
    assert before[0] == 0
    rewrite_metadata(path, config=read_weights(path).config | {"deleted_since": 0.5, "capture": False})  # once a bool
    assert read_weights(path).config["deleted_since"] == 0.5
    assert command("test", path, "--device", "cpu") == before
    rewrite_metadata(path, config=read_weights(path).config | {"flip_p": 7.0})
    status, out, err = command("test", path)
    assert (status, out) == (2, "")
    assert "was made by another version of this program (--flip-p is 7.0, but must lie in 0 to 1)" in one_line(err)


# ---------------------------------------------------------------- its network

def test_committed_weights_have_the_network_of_model():
    for path in REFERENCE.rglob("*.safetensors"):
        assert type(read_weights(path).build_net()) is Net


def with_model(folder: Path, text: str, recorded: bool = True) -> Path:
    """Make the run in `folder` one that was trained with this model.py; older files don't record its hash."""
    (folder / "model.py").write_text(text)
    rewrite_metadata(folder / "final.safetensors", model=code_hash(text.encode()) if recorded else None)
    return folder / "final.safetensors"


@pytest.mark.parametrize("recorded", [True, False])
def test_a_model_that_nobody_knows_is_not_run_unless_it_is_named(command, tmp_path, recorded):
    folder, image = copy_learned_run(tmp_path), learned_run() / "pictures" / "test" / "disc" / "0.png"
    before = command("test", folder)
    with_model(folder, f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n{OTHER}", recorded)
    for verb in ("test", "predict", "export", "plot"):
        line = [verb, *([image, "--run"] if verb == "predict" else []), folder]
        status, out, err = command(*line)
        assert (status, out) == (2, ""), verb
        assert (f"was trained with another model.py than this program's: name that file, if you trust it (--model "
                f"{folder / 'model.py'}; it is run as code)") in one_line(err)
    assert not (tmp_path / "ran").exists()
    given = command("test", folder, "--model", folder / "model.py")
    assert (given[0], given[2]) == (0, "")
    assert given[1].splitlines()[1:] != before[1].splitlines()[1:]  # it computes something else
    assert (tmp_path / "ran").exists()
    assert not list(folder.glob("__pycache__"))


def test_a_model_that_differs_in_comments_is_ours(tmp_path):
    folder = copy_learned_run(tmp_path)
    path = with_model(folder, PLAIN.replace("class Net", "# a comment\nclass Net"))
    assert type(read_weights(path).build_net()) is Net


def test_a_shipped_model_is_run_where_ours_is_another(tmp_path, monkeypatch):
    path, reference = copy_learned_run(tmp_path) / "final.safetensors", REFERENCE / "fast" / "seed-0" / "final.safetensors"
    monkeypatch.setitem(COPIED_FILES, "model.py", OTHER.encode())
    for each in (path, reference):  # the committed runs have one model.py for all, and recorded no hash
        net = read_weights(each).build_net()
        assert type(net) is not Net
        assert type(net).__name__ == "Net"
    (path.parent / "model.py").unlink()
    with pytest.raises(UserError, match=r"another model\.py than this program's: name that file.*--model FILE"):
        read_weights(path).build_net()
    rewrite_metadata(path, model=None)
    assert type(read_weights(path).build_net()) is Net


def test_a_model_that_was_changed_after_training_is_not_the_runs(tmp_path):
    """What the weights record says which one is meant, but lets nothing run."""
    folder = copy_learned_run(tmp_path)
    (folder / "model.py").write_text(OTHER)
    assert type(read_weights(folder / "final.safetensors").build_net()) is Net
    rewrite_metadata(folder / "final.safetensors", model="0" * 16)
    (folder / "model.py").write_text(PLAIN)
    with pytest.raises(UserError, match=r"--model FILE"):
        read_weights(folder / "final.safetensors").build_net()


def tmp_path_model(tmp_path, text: str):
    (tmp_path / "edited.py").write_text(text)
    return tmp_path / "edited.py"


def test_an_older_model_needs_no_setting_that_came_later(command, tmp_path):
    folder = copy_learned_run(tmp_path)
    older = PLAIN.replace(", dropout: float = 0.0, width: int = 1)", ")").replace(
        "super().__init__()", "super().__init__()\n        dropout, width = 0.0, 1")
    before = command("test", folder, "--device", "cpu")
    assert before[0] == 0
    assert command("test", folder, "--device", "cpu", "--model", tmp_path_model(tmp_path, older)) == before


@pytest.mark.parametrize(("text", "words"), [
    ("", "has no Net"), ("Net = 3", "does not hold weights of Net"), ("class Net: pass", "does not hold weights of Net"),
    ("def broken(", "can't be imported, or has no Net (SyntaxError"), ("1 / 0", "has no Net (ZeroDivisionError"),
    ("raise SystemExit(3)", "has no Net (SystemExit"), ("raise MemoryError", "out of memory"), ("\0", "can't be imported"),
    ("from torch import nn\nclass Net(nn.Module):\n    pass", "does not hold weights of Net"),
    (PLAIN.replace(".flatten(1)", ""), "it returns 2 x 3 x 1 x 1 for 2 images, not 2 x 3, a logit for each class"),
    (PLAIN.replace("channels_out, kernel_size=1", "channels_out + 1, kernel_size=1"), "size mismatch for conv_block1")])
def test_a_model_that_cannot_be_used_is_one_line(command, tmp_path, text, words):
    status, out, err = command("test", copy_learned_run(tmp_path), "--model", tmp_path_model(tmp_path, text))
    assert (status, out) == (2, "")
    assert words in one_line(err)


def test_a_model_that_is_not_there_is_one_line(command, tmp_path):
    folder = copy_learned_run(tmp_path)
    for name in (tmp_path / "nothing.py", tmp_path):
        status, out, err = command("test", folder, "--model", name)
        assert (status, out) == (2, "")
        assert f"--model {name} can't be read" in one_line(err)


def test_a_teacher_is_loaded_by_the_same_rule(command, tmp_path):
    folder = copy_learned_run(tmp_path)
    line = ["--teacher", folder, "--dataset", "folder", "--data-dir", learned_run() / "pictures", "--validation", "30",
            "--epochs", "1", "--log-dir", tmp_path / "new", *SMALL]
    with_model(folder, OTHER)
    status, _, err = command(*line)
    assert status == 2
    assert "was trained with another model.py than this program's" in err.splitlines()[-1]
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- what can't be used

def test_wrong_input_is_one_line(command, tmp_path):
    folder, image = copy_learned_run(tmp_path), str(learned_run() / "pictures" / "test" / "disc" / "0.png")
    (tmp_path / "empty").mkdir()
    logs = ("--log-dir", tmp_path / "logs")

    def refused(*line: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        status, out, err = command(*line)
        assert (status, out) == (2, "")
        assert sorted(tmp_path.rglob("*")) == before
        return one_line(err)

    assert "there is no run 'nothing'" in refused("test", "nothing", *logs)
    assert "there is no file nothing.safetensors" in refused("test", "nothing.safetensors", *logs)
    assert "there is no finished run in" in refused("test", "--log-dir", tmp_path / "nowhere")
    assert "there is no file" in refused("predict", tmp_path / "nothing.png", *logs)
    assert "the name of an image is empty" in refused("predict", "", *logs)
    assert "holds no image files" in refused("predict", tmp_path / "empty", *logs)
    assert "the following arguments are required: IMAGE" in refused("predict")
    assert "top is 0" in refused("predict", image, "--top", "0")
    assert "there is no device cuda:9" in refused("predict", image, "--device", "cuda:9", *logs)
    for verb in (("predict", image), ("test",), ("plot",)):
        assert "device is 'tpu', but must be one of" in refused(*verb, "--device", "tpu", *logs)
    assert "holds weights, but pictures are drawn of a run" in refused("plot", folder / "final.safetensors")
    assert "invalid choice: 'pdf'" in refused("export", "--to", "pdf")


def test_weights_that_cannot_be_used_are_one_line(command, tmp_path):
    whole, image = copy_learned_run(tmp_path) / "final.safetensors", learned_run() / "pictures" / "test" / "disc" / "0.png"
    path = tmp_path / "damaged.safetensors"
    metadata = {"class_names": ["disc", "ring", "square"], "mean": [0.5] * 3, "standard_deviation": [0.5] * 3,
                "config": {"dropout": 0.0}}

    def refused(verb: str = "predict") -> str:
        status, out, err = command("test", path) if verb == "test" else command("predict", image, "--run", path)
        assert (status, out) == (2, "")
        return one_line(err)

    flipped = bytearray(whole.read_bytes())
    flipped[-1000] ^= 1
    for data in (whole.read_bytes()[:-100], b"not weights", b"", flipped):
        path.write_bytes(data)
        assert "is damaged, or holds no weights of this program" in refused()
    save_file({"a": torch.zeros(1)}, path)
    assert "holds no weights of this program" in refused("test")
    save_weights(path, Net(10).state_dict(), metadata)
    assert "does not hold weights of Net in model.py for 3 classes" in refused()
    for wrong in ({"mean": [0.5]}, {"mean": ["a", "b", "c"]}, {"config": 1}, {"config": {"width": "2"}}):
        save_weights(path, Net(3).state_dict(), metadata | wrong)
        assert "holds no weights of this program" in refused()
    save_weights(path, nn.Linear(2, 2).state_dict(), metadata)
    assert "does not hold weights of Net" in refused()
