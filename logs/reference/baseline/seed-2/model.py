"""The network: a depthwise-separable CNN for 32x32 images.

It follows MobileNet (Howard et al. 2017, arXiv:1704.04861): each 3x3 convolution is split into a depthwise one (each
channel by itself) and a pointwise one (1x1, across channels). It has 155,434 parameters and 7.55 million multiply-adds.
Strided convolutions halve the size; the only pooling is the global average of the last 4x4 map. Imports torch only.
"""

from torch import Tensor, nn


def separable(channels_in: int, channels_out: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """A depthwise 3x3 convolution, then a pointwise one with BatchNorm and ReLU: N x channels_in x H x W in,
    N x channels_out x H/stride x W/stride out, float. No activation between the two."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_in, kernel_size=3, stride=stride, padding=dilation, dilation=dilation,
                  groups=channels_in, bias=False),
        nn.Conv2d(channels_in, channels_out, kernel_size=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


class Net(nn.Module):
    """Float images N x 3 x 32 x 32, normalized, in; float logits N x num_classes out.

    `dropout` is the probability that one of the 256 features is dropped before the classifier; at 0 the layer is absent.
    `width` multiplies the channels of every stage, for a teacher; the sizes below are those of width 1.
    """

    def __init__(self, num_classes: int = 10, dropout: float = 0.0, width: int = 1) -> None:
        super().__init__()
        c32, c64, c128, c192, c256 = (width * channels for channels in (32, 64, 128, 192, 256))
        self.input_block = nn.Sequential(                 # output 32 x 32 x 32, receptive field  3
            nn.Conv2d(3, c32, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(c32),
            nn.ReLU(),
        )
        self.conv_block1 = nn.Sequential(
            separable(c32, c32),                          # output 32 x 32 x 32, receptive field  5
            separable(c32, c64, stride=2),                # output 64 x 16 x 16, receptive field  7
        )
        self.conv_block2 = nn.Sequential(
            separable(c64, c64),                          # output 64 x 16 x 16, receptive field 11
            separable(c64, c128, stride=2),               # output 128 x 8 x 8,  receptive field 15
        )
        self.conv_block3 = nn.Sequential(
            separable(c128, c128),                        # output 128 x 8 x 8,  receptive field 23
            separable(c128, c192, stride=2),              # output 192 x 4 x 4,  receptive field 31
        )
        self.conv_block4 = nn.Sequential(
            separable(c192, c192),                        # output 192 x 4 x 4,  receptive field 47
            separable(c192, c256, dilation=2),            # output 256 x 4 x 4,  receptive field 79: the whole image
        )
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),                      # output 256 x 1 x 1
            *([nn.Dropout(dropout)] if dropout else []),
            nn.Conv2d(c256, num_classes, kernel_size=1),  # output num_classes x 1 x 1
        )

    def forward(self, images: Tensor) -> Tensor:
        features = self.input_block(images)
        features = self.conv_block1(features)
        features = self.conv_block2(features)
        features = self.conv_block3(features)
        features = self.conv_block4(features)
        return self.head(features).flatten(1)
