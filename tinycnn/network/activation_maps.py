"""Class activation maps: where in an image a network finds each class."""

import torch
from torch import Tensor, nn

from config import UserError


@torch.no_grad()
def class_maps(net: nn.Module, images: Tensor) -> Tensor:
    """Compute the class activation maps of images (Zhou et al. 2016, "Learning Deep Features for Discriminative Localization",
    arXiv:1512.04150): what the classifier, a 1x1 convolution, makes of the last map before the global average.

    `images` are a batch of what `net` takes, on its device. Returns float32, N x classes x h x w, with h x w the size of the
    last map. The average of a class's map is its logit. Leaves `net` in evaluation mode. Raises UserError for a network with
    another head than nn.AdaptiveAvgPool2d(1), nn.Dropout or not, and a 1x1 nn.Conv2d.
    """
    layers = [layer for layer in net.modules() if not list(layer.children()) and not isinstance(layer, nn.Dropout)]
    pool, classifier = layers[-2:] if len(layers) > 1 else (None, None)
    last_maps: list[Tensor] = []
    if isinstance(pool, nn.AdaptiveAvgPool2d) and isinstance(classifier, nn.Conv2d) and classifier.kernel_size == (1, 1):
        hook = pool.register_forward_pre_hook(lambda layer, inputs: last_maps.append(inputs[0]))
        try:
            logits = net.eval()(images).float().flatten(1)
        finally:
            hook.remove()
        maps = [classifier(last_map).float() for last_map in last_maps]
        # forward() may do something else to the logits; the tolerance is that of convolutions in TF32
        if len(maps) == 1 and torch.allclose(maps[0].mean((2, 3)), logits, rtol=1e-2, atol=1e-2):
            return maps[0]
    raise UserError("the network has no class activation maps: its last layers must be nn.AdaptiveAvgPool2d(1) and a 1x1 "
                    "nn.Conv2d, as in model.py")
