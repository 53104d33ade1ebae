"""Small CIFAR-10 networks to compare with, built from their published descriptions, without weights."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import MobileNetV2, ShuffleNetV2


@dataclass(frozen=True)
class Peer:
    """A network, and its test accuracy in percent as published: `required` says that it is only what a benchmark requires."""

    net: nn.Module
    accuracy: float
    required: bool = False


def peers() -> dict[str, Peer]:
    """ResNet-8 of the MLPerf Tiny benchmark (Banbury et al. 2021, arXiv:2106.07597); the others as in
    chenyaofo/pytorch-cifar-models, whose accuracies these are."""
    return {
        "ResNet-8": Peer(ResNet((1, 1, 1), norm_on_shortcut=False), 85.0, required=True),
        "ResNet-20": Peer(ResNet((3, 3, 3), norm_on_shortcut=True), 92.60),
        "MobileNetV2 x0.5": Peer(mobilenet_v2_half(), 92.88),
        "ShuffleNetV2 x0.5": Peer(shufflenet_v2_half(), 90.13),
    }


class Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2015, arXiv:1512.03385), a 1x1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, norm_on_shortcut: bool) -> None:
        super().__init__()
        bias = not norm_on_shortcut  # MLPerf's network, from Keras, has a bias in each convolution
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=bias), nn.BatchNorm2d(channels_out), nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=bias), nn.BatchNorm2d(channels_out))
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut.append(nn.Conv2d(channels_in, channels_out, 1, stride, bias=bias))
            if norm_on_shortcut:
                self.shortcut.append(nn.BatchNorm2d(channels_out))

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.body(images) + self.shortcut(images))


class ResNet(nn.Sequential):
    """Three stages of 16, 32 and 64 channels with so many blocks each."""

    def __init__(self, blocks: tuple[int, int, int], norm_on_shortcut: bool) -> None:
        layers = [nn.Conv2d(3, 16, 3, padding=1, bias=not norm_on_shortcut), nn.BatchNorm2d(16), nn.ReLU()]
        channels = 16
        for stage, count in enumerate(blocks):
            for block in range(count):
                out = 16 << stage
                layers.append(Residual(channels, out, 2 if stage and not block else 1, norm_on_shortcut))
                channels = out
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mobilenet_v2_half() -> nn.Module:
    """MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) at half width; on 32x32 images its first two strides are 1."""
    net = MobileNetV2(num_classes=10, width_mult=0.5, inverted_residual_setting=[
        [1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1]])
    net.features[0][0].stride = (1, 1)
    return net


def shufflenet_v2_half() -> nn.Module:
    """ShuffleNetV2 (Ma et al. 2018, arXiv:1807.11164) at half width; on 32x32 images its first stride is 1, and it has no max
    pool."""
    net = ShuffleNetV2([4, 8, 4], [24, 48, 96, 192, 1024], num_classes=10)
    net.conv1[0].stride = (1, 1)
    net.maxpool = nn.Identity()
    return net
