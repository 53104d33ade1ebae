"""Which weights, network and images a command uses, and what it refuses."""

import shutil

import pytest
import torch
from conftest import REFERENCE, ROOT, one_line
from learned_run import arguments, copy_learned_run, learned_run, rewrite_metadata
from safetensors.torch import load_file, save_file
from torch import nn

from config import UserError
from model import Net
from tinycnn.data.loading import load_images
from tinycnn.inference.loading import load_trained
from tinycnn.inference.network import build_trained_net, load_net_class
from tinycnn.runs.weights import read_weights, save_weights
from tinycnn.runs.writer import MODEL_SOURCE

PLAIN = (ROOT / "model.py").read_text()
OTHER = PLAIN.replace("nn.ReLU(),", "nn.LeakyReLU(0.5),")  # the same parameters, other results


# ---------------------------------------------------------------- the images and settings of the run

def test_a_run_is_loaded_as_it_was_trained(tmp_path):
    folder = copy_learned_run(tmp_path)
    trained = load_trained(arguments(folder))
    images = load_images("folder", str(learned_run() / "pictures")).hold_out(30)
    assert trained.images.fingerprint == images.fingerprint
    assert trained.config.batches == "device"
    assert trained.config.threads >= 1
    assert trained.config.lr == 0.05
    assert not trained.net.training
    assert trained.device == torch.device("cpu")
    for name, tensor in load_file(folder / "final.safetensors").items():
        assert torch.equal(trained.net.state_dict()[name], tensor)
    (normalization,) = trained.policies["test"]
    assert (tuple(normalization.mean), tuple(normalization.std)) == images.statistics
    assert len(trained.policies["train"]) == 2  # the flip, too


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
        net = build_trained_net(read_weights(path), None)
        assert not net.training
        assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_another_network_is_told_and_that_of_the_run_used_where_named(command, tmp_path, monkeypatch):
    """The run was trained with another model.py than the program has now; both have the same parameters."""
    folder, image = copy_learned_run(tmp_path), learned_run() / "pictures" / "test" / "disc" / "0.png"
    own = folder / "model.py"
    assert own.read_text() == PLAIN
    for verb in ("test", "predict", "export", "plot"):
        line = [verb, *([image, "--run"] if verb == "predict" else []), folder]
        with monkeypatch.context() as context:
            context.setattr("tinycnn.inference.network.Net", load_net_class(tmp_path_model(tmp_path, OTHER)))
            status, out, err = command(*line)
            assert (status, out) == (2, ""), verb
            assert (f"{folder / 'final.safetensors'} holds weights of another network than that of model.py: that of the run "
                    f"lies in {own}; use it with --model {own}") in one_line(err)
            if verb in ("test", "predict"):
                given = command(*line, "--model", own)
                assert (given[0], given[2]) == (0, "")
        if verb in ("test", "predict"):
            assert given == command(*line)  # with the network that the program has
    assert not list(folder.glob("__pycache__"))


def test_the_committed_runs_share_their_model(command, tmp_path, monkeypatch):
    image, own, block = learned_run() / "pictures" / "test" / "disc" / "0.png", REFERENCE / "model.py", "separable(c128, c128),"
    edited = tmp_path_model(tmp_path, own.read_text().replace(block, 2 * block))
    monkeypatch.setattr("tinycnn.inference.network.Net", load_net_class(edited))
    for folder in (REFERENCE, REFERENCE / "best" / "seed-0"):
        status, _, err = command("predict", image, "--run", folder)
        assert status == 2
        assert f"that of the run lies in {own}; use it with --model {own}" in one_line(err)
        assert command("predict", image, "--run", folder, "--model", own)[0] == 0


def tmp_path_model(tmp_path, text: str):
    (tmp_path / "edited.py").write_text(text)
    return tmp_path / "edited.py"


def test_a_network_that_computes_the_same_is_no_other_one(tmp_path):
    folder = copy_learned_run(tmp_path)
    same = tmp_path_model(tmp_path, PLAIN.replace("features", "maps").replace("class Net", "# a comment\nclass Net"))
    weights = read_weights(folder / "final.safetensors")
    assert weights.identity
    build_trained_net(weights, str(same))
    with pytest.raises(UserError, match=r"another network than that of .*edited\.py: that of the run lies in"):
        build_trained_net(weights, str(tmp_path_model(tmp_path, OTHER)))
    (folder / "model.py").unlink()
    with pytest.raises(UserError, match=r"another network than that of .*edited\.py: undo the edits"):
        build_trained_net(weights, str(tmp_path_model(tmp_path, OTHER)))
    rewrite_metadata(folder / "final.safetensors", network=None)  # as it was before identities were kept
    build_trained_net(read_weights(folder / "final.safetensors"), str(tmp_path_model(tmp_path, OTHER)))


def test_an_older_model_needs_no_setting_that_came_later(command, tmp_path):
    folder = copy_learned_run(tmp_path)
    older = MODEL_SOURCE.decode().replace(", dropout: float = 0.0, width: int = 1)", ")").replace(
        "super().__init__()", "super().__init__()\n        dropout, width = 0.0, 1")
    before = command("test", folder, "--device", "cpu")
    assert before[0] == 0
    assert command("test", folder, "--device", "cpu", "--model", tmp_path_model(tmp_path, older)) == before


@pytest.mark.parametrize(("text", "words"), [
    ("", "has no class Net"), ("Net = 3", "has no class Net"), ("class Net: pass", "has no class Net"),
    ("def broken(", "can't be imported (SyntaxError"), ("import nothing", "can't be imported (ModuleNotFoundError"),
    ("1 / 0", "can't be imported (ZeroDivisionError"), ("raise SystemExit(3)", "can't be imported (SystemExit"),
    ("raise MemoryError", "out of memory"), ("\0", "can't be imported"),
    ("from torch import nn\nclass Net(nn.Module):\n    pass", "must take num_classes; dropout and width are optional"),
    ("def Net(*_, **__): return 5", "must return a torch.nn.Module, and returned int"),
    (PLAIN.replace(".flatten(1)", ""), "the network returns 2 x 3 x 1 x 1 for 2 images")])
def test_a_model_that_cannot_be_used_is_one_line(command, tmp_path, text, words):
    path = copy_learned_run(tmp_path) / "final.safetensors"
    rewrite_metadata(path, network=None)
    status, out, err = command("test", path, "--model", tmp_path_model(tmp_path, text))
    assert (status, out) == (2, "")
    assert words in one_line(err)


def test_a_model_that_is_not_there_is_one_line(command, tmp_path):
    folder = copy_learned_run(tmp_path)
    for name in (tmp_path / "nothing.py", tmp_path):
        status, out, err = command("test", folder, "--model", name)
        assert (status, out) == (2, "")
        assert f"--model {name} can't be read" in one_line(err)


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
    assert "device is cuda:9" in refused("predict", image, "--device", "cuda:9", *logs)
    for verb in (("predict", image), ("test",), ("plot",)):
        assert "device is 'tpu', but must be one of" in refused(*verb, "--device", "tpu", *logs)
    assert "is no run: pictures are drawn of a run" in refused("plot", folder / "final.safetensors")
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
    assert "does not hold weights of the network in model.py for 3 classes" in refused()
    for wrong in ({"mean": [0.5]}, {"mean": ["a", "b", "c"]}, {"config": 1}, {"config": {"width": "2"}}):
        save_weights(path, Net(3).state_dict(), metadata | wrong)
        assert "holds no weights of this program" in refused()
    broken = Net(3)
    broken.head[1].bias.data[0] = float("nan")
    save_weights(path, broken.state_dict(), metadata)
    assert "some of its weights are not numbers" in refused()
    save_weights(path, nn.Linear(2, 2).state_dict(), metadata)
    assert "does not hold weights of the network" in refused()
