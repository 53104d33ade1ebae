from pathlib import Path

import numpy as np
import pytest
from conftest import NO_NETWORK, write_folder
from PIL import Image

from config import UserError
from training import decoding, images
from training.decoding import decode
from training.images import Images, folder, load, synthetic


def assert_whole(data: Images, classes: int):
    for split in (data.train, data.test):
        assert split.images.dtype == np.uint8
        assert split.images.shape == (len(split), 32, 32, 3)
        assert split.labels.dtype == np.int64
        assert set(split.labels) == set(range(classes))
    assert len(data.class_names) == classes
    assert len(data.validation) == 0


def test_the_built_in_set_is_whole_and_always_the_same():
    data = synthetic()
    assert_whole(data, 10)
    assert (len(data.train), len(data.test)) == (5000, 1000)
    assert data.fingerprint() == synthetic().fingerprint()
    assert set(np.bincount(data.train.labels)) == {500}


def test_the_built_in_set_can_be_told_apart_by_shape_not_by_colour():
    """A nearest-neighbour search on shapes finds the class far above chance; on mean colours it doesn't."""
    data = synthetic()

    def accuracy(features):
        train, test = features(data.train.images[:2000]), features(data.test.images[:300])
        nearest = ((test[:, None] - train[None]) ** 2).sum(2).argmin(1)
        return (data.train.labels[nearest] == data.test.labels[:300]).mean()

    def shape(pixels):
        grey = abs(pixels.astype(float) - pixels[:, :1, :1]).mean(3).reshape(len(pixels), 16, 2, 16, 2).mean((2, 4))
        flat = grey.reshape(len(pixels), -1)
        return (flat - flat.mean(1, keepdims=True)) / flat.std(1, keepdims=True)

    assert accuracy(shape) > 0.3
    assert accuracy(lambda pixels: pixels.mean((1, 2))) < 0.2


def test_statistics_are_numpys():
    data = synthetic()
    mean, deviation = data.statistics()
    assert np.allclose(mean, data.train.images.mean((0, 1, 2)) / 255, rtol=1e-12)
    assert np.allclose(deviation, data.train.images.std((0, 1, 2)) / 255, rtol=1e-12)


def test_validation_is_class_balanced_fixed_and_leaves_no_image_out():
    data = synthetic()
    held = data.hold_out(503)
    assert np.bincount(held.validation.labels).tolist() == [51] * 3 + [50] * 7
    assert len(held.train) == 5000 - 503
    both = np.concatenate([held.train.images, held.validation.images])
    assert sorted(image.tobytes() for image in both) == sorted(image.tobytes() for image in data.train.images)
    assert held.fingerprint() == data.hold_out(503).fingerprint()
    assert data.hold_out(0) is data
    with pytest.raises(UserError, match=r"disc has only 500 training images; lower validation"):
        data.hold_out(5000)


# ---------------------------------------------------------------- folders

def test_a_folder_gives_the_same_thing(pictures):
    data = folder(pictures)
    assert_whole(data, 3)
    assert (len(data.train), len(data.test)) == (48, 24)
    assert data.class_names == ("disc", "ring", "square")
    first = np.asarray(Image.open(pictures / "train" / "ring" / "0.png"))
    assert any((image == first).all() for image in data.train.images[data.train.labels == 1])


def test_the_cache_is_used_until_the_folder_changes(tmp_path, monkeypatch):
    root = write_folder(tmp_path, 2, 1)
    before = folder(root)
    monkeypatch.setattr(images, "decode_all", lambda paths: pytest.fail("decoded again"))
    assert folder(root).fingerprint() == before.fingerprint()
    monkeypatch.undo()

    Image.new("RGB", (32, 32), "red").save(root / "train" / "ring" / "new.png")
    after = folder(root)
    assert len(after.train) == 7
    changed = root / "test" / "disc" / "0.png"
    Image.new("RGB", (32, 32), "blue").save(changed)
    assert (folder(root).test.images == [0, 0, 255]).all((1, 2, 3)).any()
    whole, rng = (root / ".cache.npz").read_bytes(), np.random.default_rng(0)
    for _ in range(50):
        flipped = bytearray(whole)
        flipped[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        (root / ".cache.npz").write_bytes(flipped)
        assert len(folder(root).train) == 7


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, capsys):
    root = write_folder(tmp_path, 2, 1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert len(folder(root).train) == 6
    assert "could not be kept" in capsys.readouterr().err
    assert not list(root.glob(".cache*"))


def test_many_files_are_decoded_by_several_processes_alike(tmp_path, monkeypatch):
    root = write_folder(tmp_path, 4, 2)
    alone = folder(root)
    (root / ".cache.npz").unlink()
    monkeypatch.setattr(decoding, "ALONE", 0)
    assert folder(root).fingerprint() == alone.fingerprint()


def test_other_sizes_are_resized_with_one_notice(tmp_path, capsys):
    root = write_folder(tmp_path, 2, 1)
    for number in range(3):
        Image.new("RGB", (100, 50), "green").save(root / "train" / "disc" / f"big{number}.jpeg")
    assert len(folder(root).train) == 9
    assert capsys.readouterr().err.count("3 of 12 images had another size") == 1


def test_other_files_are_left_out_with_a_notice(tmp_path, capsys):
    root = write_folder(tmp_path, 2, 1)
    (root / "train" / "disc" / "notes.txt").write_text("x")
    (root / "train" / "disc" / ".hidden").write_text("x")
    assert len(folder(root).train) == 6
    assert "1 files that are not PNG or JPEG are left out" in capsys.readouterr().err


@pytest.mark.parametrize(("mode", "value", "expected"), [
    ("L", 100, (100, 100, 100)), ("RGBA", (1, 2, 3, 255), (1, 2, 3)), ("RGBA", (1, 2, 3, 0), (255, 255, 255)),
    ("P", 0, (0, 0, 0)), ("1", 1, (255, 255, 255)),
    ("I;16", 65535, (255, 255, 255)), ("I;16", 256 * 40, (40, 40, 40))])
def test_every_mode_of_png_becomes_rgb(tmp_path, mode, value, expected):
    path = tmp_path / "image.png"
    Image.new(mode, (32, 32), value).save(path)
    image, resized = decode(str(path))
    assert image.dtype == np.uint8
    assert image.shape == (32, 32, 3)
    assert not resized
    assert tuple(image[5, 7]) == expected


def test_exif_orientation_is_obeyed(tmp_path):
    upright = np.zeros((32, 32, 3), dtype=np.uint8)
    upright[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    Image.fromarray(upright[::-1, ::-1]).save(tmp_path / "turned.png", exif=exif)
    assert (decode(str(tmp_path / "turned.png"))[0] == upright).all()


def damage(kind: str, root: Path) -> None:
    if kind == "no train":
        (root / "train").rename(root / "training")
    elif kind == "lone class":
        (root / "train" / "extra").mkdir()
    elif kind == "empty class":
        for split in ("train", "test"):
            (root / split / "void").mkdir()
    elif kind == "one class":
        for split in ("train", "test"):
            for name in ("ring", "square"):
                (root / split / name).rename(root / f"{split}-{name}")
    elif kind == "truncated":
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / "test" / "ring" / "broken.jpg")
        whole = (root / "test" / "ring" / "broken.jpg").read_bytes()
        (root / "test" / "ring" / "broken.jpg").write_bytes(whole[:len(whole) // 2])
    elif kind == "text":
        (root / "train" / "ring" / "text.png").write_text("not a picture")


@pytest.mark.parametrize(("kind", "words"), [
    ("no train", "there is no folder .*train"), ("lone class", "class extra is in .*train only"),
    ("empty class", "void holds no PNG or JPEG"), ("one class", "holds 1 class folders"),
    ("truncated", r"broken.jpg is not a whole image"), ("text", r"text.png is not a whole image")])
def test_a_wrong_folder_is_refused_by_name(tmp_path, kind, words):
    root = write_folder(tmp_path, 2, 1)
    damage(kind, root)
    with pytest.raises(UserError, match=words):
        folder(root)
    assert not list(root.glob(".cache*"))


# ---------------------------------------------------------------- CIFAR-10

@pytest.fixture
def offline(monkeypatch):
    for name, value in NO_NETWORK.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("offline")
def test_without_data_and_network_cifar10_ends_with_one_error(tmp_path):
    with pytest.raises(UserError, match=r"could not be downloaded .*--data-dir.*--dataset folder or --dataset synthetic"):
        load("cifar10", str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.usefixtures("offline")
def test_without_data_and_network_auto_is_a_demonstration(tmp_path, capsys):
    assert load("auto", str(tmp_path / "none")).kind == "synthetic"
    assert "could not be downloaded" in capsys.readouterr().err


@pytest.mark.parametrize("dataset", ["cifar10", "auto"])
def test_a_damaged_batch_is_an_error_never_a_demonstration(tmp_path, dataset):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(UserError, match="data_batch_1 is missing"):
        load(dataset, str(tmp_path))
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"x")
    with pytest.raises(UserError, match="data_batch_1 is damaged"):
        load(dataset, str(tmp_path))


def test_the_real_cifar10(cifar10):
    data = load("auto", str(cifar10))
    assert_whole(data, 10)
    assert (data.kind, len(data.train), len(data.test)) == ("cifar10", 50_000, 10_000)
    assert data.class_names[3] == "cat"
    mean, deviation = data.statistics()
    assert np.allclose(mean, (0.4914, 0.4822, 0.4465), atol=1e-4)  # the figures that everybody prints
    assert np.allclose(deviation, (0.2470, 0.2435, 0.2616), atol=1e-4)
    assert np.bincount(data.hold_out(5000).validation.labels).tolist() == [500] * 10


def test_a_flipped_byte_in_a_real_batch_is_named(cifar10, tmp_path):
    target = tmp_path / "cifar-10-batches-py"
    target.mkdir()
    for file in (cifar10 / "cifar-10-batches-py").iterdir():
        (target / file.name).symlink_to(file)
    content = bytearray((cifar10 / "cifar-10-batches-py" / "data_batch_3").read_bytes())
    content[1_000_000] ^= 1
    (target / "data_batch_3").unlink()
    (target / "data_batch_3").write_bytes(content)
    with pytest.raises(UserError, match="data_batch_3 is damaged"):
        load("cifar10", str(tmp_path))

