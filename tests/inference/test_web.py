"""python main.py export --to web: one HTML file that classifies pictures as the network does."""

import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import one_line
from learned_run import copy_learned_run
from PIL import Image
from torch import nn

from config import UserError
from model import Net
from tinycnn.data.dataset import Split
from tinycnn.inference import web
from tinycnn.inference.classifier import Classifier
from tinycnn.inference.export import fold

needs_node = pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
RANDOM = np.random.default_rng(0)
TOPS = (256, 30, 90, 256, 60, 200)  # so that the images are unlike each other
IMAGES = np.stack([RANDOM.integers(0, top, (32, 32, 3), np.uint8) for top in TOPS])
TEST = Split(IMAGES, np.array([0, 1, 2, 0, 1, 2]))
CLASSES = ("cat", "</script><b>", "Zürich")


def classifier_of(net: nn.Module) -> Classifier:
    """A classifier with weights and BatchNorm statistics as unlike those at the start as training makes them."""
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                for values in (layer.weight, layer.running_var):
                    values.uniform_(0.5, 2)
                for values in (layer.bias, layer.running_mean):
                    values.uniform_(-1, 1)
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.mul_(1.9)  # so that the logits differ from image to image
    return Classifier(net, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def logits_of(classifier: nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return classifier(torch.tensor(images)).numpy()


def with_head(*layers: nn.Module, channels: int = 6) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 3, 1), nn.Flatten())


UNUSUAL = with_head(
    nn.Conv2d(3, 5, (3, 2), stride=(1, 2), padding=(2, 1)), nn.ReLU(), nn.Conv2d(5, 5, 3, groups=5, dilation=(1, 3)),
    nn.Dropout(0.5), nn.Conv2d(5, 6, 1, stride=3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 5, padding=2))


@needs_node
@pytest.mark.parametrize("net", [Net(3), Net(7, dropout=0.2), UNUSUAL], ids=["net", "dropout", "unusual"])
def test_the_page_computes_what_the_network_does(net):
    classifier = classifier_of(net)
    expected = logits_of(classifier, IMAGES)
    page = web.as_page(fold(classifier), (*CLASSES, *"defg")[:expected.shape[1]], TEST)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(web.node_logits(page, IMAGES), expected, atol=1e-4)


@needs_node
@pytest.mark.parametrize("size", [(300, 171), (150, 201), (7, 5), (32, 20), (32, 32)], ids=str)
def test_the_page_resizes_as_predict_does(size):
    width, height = size
    image = RANDOM.integers(0, 256, (height, width, 3), np.uint8)
    resize = re.search("function resizeRows.*?(?=</script>)", web.TEMPLATE.read_text(encoding="utf-8"), re.DOTALL)[0]
    line = f"process.stdout.write(new Uint8Array(resize(require('fs').readFileSync(0), {height}, {width})))"
    output = subprocess.run(["node", "-e", f"const SIDE = 32; {resize} {line}"], input=image.tobytes(), capture_output=True,
                            check=True).stdout
    expected = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC), dtype=int)
    found = np.frombuffer(output, np.uint8).reshape(32, 32, 3)
    assert np.abs(found - expected).max() <= 1
    assert (found == expected).mean() > 0.999


class Beside(nn.Module):
    """Adds a layer's input to its output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 1), with_head(channels=3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(images) + images)


class Skipping(Beside):
    """Computes a layer whose output isn't used by the next one."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.conv(images)
        return self.head(images)


@pytest.mark.parametrize(("net", "words"), [
    (with_head(nn.Conv2d(3, 6, 3), nn.GELU()), r"_1 \(GELU"), (with_head(nn.MaxPool2d(2), nn.Conv2d(3, 6, 3)), "MaxPool2d"),
    (with_head(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3)), "BatchNorm2d"), (Beside(), "conv "), (Skipping(), "AdaptiveAvgPool2d"),
    (with_head(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=2)), "groups=2"),
    (with_head(nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect")), "reflect"),
    (with_head(nn.Conv2d(3, 6, 3, padding="same")), "padding=same"),
    (nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.Flatten()), "this order"),
    (nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 3, 1, padding=1), nn.Flatten()), "this order"),
    (nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten()), r"output_size=2")])
def test_a_network_that_the_page_cannot_run_is_an_error(net, words):
    with pytest.raises(UserError, match=f"the page can't run .*{words}.*use --to onnx"):
        web.as_page(fold(classifier_of(net)), CLASSES, TEST)


def test_a_page_that_is_too_large_is_an_error():
    with pytest.raises(UserError, match=r"the page would have 3,\d+,\d+ bytes, more than 1,500,000"):
        web.as_page(fold(classifier_of(Net(3, width=2))), CLASSES, TEST)


def test_it_is_written_beside_the_weights_and_checked(command, tmp_path, monkeypatch):
    folder = copy_learned_run(tmp_path)
    path = folder / "model.html"
    status, out, err = command("export", "--to", "web", folder)
    assert (status, err) == (0, "")
    assert out.startswith(f"{path}: {path.stat().st_size:,} bytes\n")
    assert ("logits differ by at most" in out) == bool(shutil.which("node"))
    assert 800_000 < path.stat().st_size < 1_500_000
    path.unlink()
    monkeypatch.setattr(web.shutil, "which", lambda name: None)
    status, out, _ = command("export", "--to", "web", folder)
    assert (status, out.splitlines()[1:]) == (0, ["not checked, for want of Node.js (node on PATH)"])
    assert path.exists()
    path.unlink()
    monkeypatch.setattr("tinycnn.inference.export.node_logits", lambda page, images: np.zeros((len(images), 3), np.float32))
    status, _, err = command("export", "--to", "web", folder)
    assert status == 2
    assert "the exported network's logits differ" in one_line(err)
    assert not path.exists()


def test_a_node_that_fails_is_named(monkeypatch):
    monkeypatch.setattr(web.shutil, "which", lambda name: "no-such-program")
    with pytest.raises(UserError, match=r"can't run the page .*update Node\.js"):
        web.node_logits(b'<script id="network"></script>', IMAGES)


# ---------------------------------------------------------------- in a browser

@pytest.fixture(scope="module")
def browser():
    """Chromium, without a window."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="requirements-test.txt is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("Chromium and its driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    browser.set_script_timeout(120)
    yield browser
    browser.quit()


@pytest.fixture
def opened(browser, tmp_path):
    """The browser with the page open, and the classifier that the page is of."""
    classifier = classifier_of(Net(3))
    path = tmp_path / "model.html"
    path.write_bytes(web.as_page(fold(classifier), CLASSES, TEST))
    browser.get(path.as_uri())
    text_of(browser, "classes")
    return browser, classifier


def text_of(browser, name: str, before: str = "") -> str:
    """The text of an element of the page, once it is neither empty nor `before`."""
    from selenium.webdriver.support.wait import WebDriverWait

    def text(browser) -> str:
        return browser.find_element("id", name).text

    WebDriverWait(browser, 60).until(lambda browser: text(browser) not in ("", before))
    return text(browser)


def as_shown(classifier: Classifier, image: np.ndarray) -> str:
    probabilities = torch.from_numpy(logits_of(classifier, image[None])[0]).softmax(0)
    return "\n".join(f"{CLASSES[i]}\n{100 * probabilities[i]:.1f} %" for i in probabilities.argsort(descending=True).tolist())


def test_the_page_classifies_in_a_browser(opened, tmp_path):
    browser, classifier = opened
    assert text_of(browser, "classes") == as_shown(classifier, IMAGES[0])  # the first example
    found = [browser.execute_script("return classify(arguments[0]).logits", image.flatten().tolist()) for image in IMAGES]
    np.testing.assert_allclose(found, logits_of(classifier, IMAGES), atol=1e-4)

    smooth = Image.fromarray(IMAGES[3][:4, :6]).resize((230, 170), Image.Resampling.BILINEAR)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned
    smooth.save(tmp_path / "turned.png", exif=exif)
    browser.find_element("id", "file").send_keys(str(tmp_path / "turned.png"))
    before = text_of(browser, "classes", as_shown(classifier, IMAGES[0]))
    upright = np.asarray(smooth.transpose(Image.Transpose.ROTATE_270).resize((32, 32), Image.Resampling.BICUBIC))
    assert before.split("\n")[::2] == as_shown(classifier, upright).split("\n")[::2]
    pixels = browser.execute_script("return [...document.getElementById('seen').getContext('2d')"
                                    ".getImageData(0, 0, 32, 32).data]")
    assert np.abs(np.reshape(pixels, (32, 32, 4))[..., :3] - upright.astype(int)).max() <= 1

    (tmp_path / "broken.png").write_bytes(b"no picture")
    browser.find_element("id", "file").send_keys(str(tmp_path / "broken.png"))
    assert "can't read that picture" in text_of(browser, "error")


def test_the_page_works_by_keyboard_by_paste_and_by_drop(opened):
    from selenium.webdriver import ActionChains, Keys

    browser, classifier = opened
    reached = []
    for _ in range(5):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        reached.append(browser.switch_to.active_element)
    names = [each.get_attribute("id") or each.get_attribute("title") for each in reached]
    assert [name for name in names if name != "camera"][:4] == ["file", *CLASSES]
    next(each for each in reached if each.get_attribute("title") == "Zürich").send_keys(Keys.ENTER)
    before = text_of(browser, "classes", as_shown(classifier, IMAGES[0]))
    assert before == as_shown(classifier, IMAGES[2])
    for kind, name in (("paste", "clipboardData"), ("drop", "dataTransfer")):
        number = 1 if kind == "paste" else 2
        browser.execute_async_script("""
            const [number, kind, name, done] = arguments, data = new DataTransfer();
            const binary = atob(model.examples[number].url.split(",")[1]);
            data.items.add(new File([Uint8Array.from(binary, c => c.charCodeAt(0))], "a.png", { type: "image/png" }));
            const Kind = kind === "paste" ? ClipboardEvent : DragEvent;
            document.body.dispatchEvent(new Kind(kind, { [name]: data, bubbles: true }));
            done();""", number, kind, name)
        before = text_of(browser, "classes", before)
        assert before == as_shown(classifier, IMAGES[number])


def test_the_page_connects_to_nothing_and_holds_no_foreign_markup(opened):
    browser, _ = opened
    requests = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert all(re.match("(data|blob):", name) for name in requests)
    outcome = browser.execute_async_script("""
        const done = arguments[0];
        document.addEventListener("securitypolicyviolation", event => done(event.effectiveDirective));
        fetch("https://example.com/").catch(() => setTimeout(done, 2000, "no policy"));""")
    assert outcome == "connect-src"
    assert not browser.find_elements("css selector", "b")
    assert CLASSES[1] in browser.find_element("id", "known").text
    assert not [entry for entry in browser.get_log("browser") if "example.com" not in entry["message"]]
