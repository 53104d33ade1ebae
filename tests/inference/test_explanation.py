"""python main.py predict --explain: pictures of where the network looked."""

import json

import numpy as np
import pytest
from learned_run import copy_learned_run, learned_run
from PIL import Image


@pytest.fixture
def predict(command, tmp_path, monkeypatch):
    """Predict with a copy of the learned run, in the folder of the images."""
    run, here = copy_learned_run(tmp_path), tmp_path / "images"
    here.mkdir()
    monkeypatch.chdir(here)
    for name, source in zip(("a.png", "b.png"), sorted((learned_run() / "pictures" / "test").rglob("*.png")), strict=False):
        Image.open(source).save(here / name)
    return lambda *arguments: command("predict", *arguments, "--explain", "--device", "cpu", "--run", run)


@pytest.mark.filterwarnings("error:The given NumPy array")  # which users would see
def test_each_file_gets_a_picture_and_no_input_is_overwritten(predict, saved, tmp_path):
    status, out, err = predict("a.png", "b.png")
    assert (status, err) == (0, "")
    assert out.splitlines()[1::2] == ["a.explained.png", "b.explained.png"]
    image, *maps = saved[0].axes[0].images
    assert np.array_equal(image.get_array(), np.asarray(Image.open("a.png").convert("RGB")))
    assert len(maps) == 2 * 3  # a grey image and a map for each of three classes
    texts = [text.get_text() for text in saved[0].axes[0].texts[1:]]
    first = out.splitlines()[0].removeprefix("a.png: ")
    assert ", ".join(" ".join(text.split("\n")) for text in texts) == first
    before = (tmp_path / "images" / "a.explained.png").read_bytes()
    assert predict(".")[0] == 0  # among them a.explained.png
    assert (tmp_path / "images" / "a.explained.png").read_bytes() == before
    assert (tmp_path / "images" / "a.explained-2.png").exists()


def test_json_stays_json(predict):
    status, out, err = predict("a.png", "--json")
    assert (status, err) == (0, "a.explained.png\n")
    assert json.loads(out)[0]["file"] == "a.png"
