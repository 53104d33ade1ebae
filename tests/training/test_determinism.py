"""What --deterministic rests on: every operation of an epoch and a test on CUDA, by name, is one that was looked at."""

import pytest
import torch
from fake_cuda import Launches, fake_cuda
from test_fake_cuda import Training

# Each thread writes a place of its own. Names without their underscores
ELEMENTWISE = """to_copy copy clone cat stack flip where arange eye zeros zeros_like ones_like fill zero scalar_tensor
    masked_fill abs add sub rsub mul div neg exp cos sin tan deg2rad round trunc clamp minimum remainder eq lt le gt ge
    logical_and bitwise_and bitwise_or bitwise_not bitwise_right_shift rshift lshift relu threshold_backward native_dropout
    native_dropout_backward foreach_add"""  # the last stands for SGD's fused kernel too
READ_BY_INDEX = {"index", "index_select"}  # only writing by index, and their gradients, add in any order
# Sums in an order that the shape decides. The global average is `mean`, because pooling to one pixel is computed so: the
# gradient of adaptive_avg_pool2d, which adds atomically, isn't reached. nll_loss2d, of pixels, would add atomically too
FIXED_SUMS = {"sum", "mean", "argmax", "log_softmax", "log_softmax_backward_data", "native_batch_norm",
              "native_batch_norm_backward", "nll_loss_forward", "nll_loss_backward"}
CUDNN = {"convolution", "convolution_backward", "cudnn_batch_norm", "cudnn_batch_norm_backward"}  # as cudnn.deterministic says


@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch is built without CUDA")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bfloat16", [True, False])
def test_each_operation_of_an_epoch_and_a_test_was_checked(bfloat16):
    with fake_cuda(bfloat16), Launches() as launches:
        training = Training(distill=True, crop_padding=2, weight_decay=1e-3, capture="off")
        training.epoch()
        training.test()
    names = {name.strip("_") for name in launches.kernels}
    assert names <= set(ELEMENTWISE.split()) | READ_BY_INDEX | FIXED_SUMS | CUDNN
    assert {"mean", "convolution_backward", "nll_loss_backward"} <= names
