"""Triton kernels that train a depthwise-separable network.

Activations are bfloat16, rows x channels: a row is a pixel, images one after another, in channels_last order. Only what the
convolutions return is stored (`maps`): BatchNorm and ReLU are applied wherever it is loaded, by a `norm`, float32 13 x
channels: mean, 1 / standard deviation, scale, shift, and the nine weights of the depthwise convolution that follows, in this
order so that neighbouring channels are loaded together. Sums over all rows have the same bits in each run: each program adds up
its own rows and stores that sum in `partial`, then another kernel adds up the programs' sums. Channels are multiples of 32.
"""

import triton
import triton.language as tl

TAPS = tl.constexpr(9)
MEAN, RSTD, SCALE, SHIFT, TAP = (tl.constexpr(row) for row in range(5))  # rows of a norm
DEPTHWISE_SUMS = tl.constexpr(11)  # the gradients of nine weights, the sums of the gradient and of the gradient times the map
IMAGE_TAPS = tl.constexpr(27)  # nine pixels of three channels
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


# ---------------------------------------------------------------- parts of kernels

@triton.jit
def _dot(one, other, total):
    """total + one @ other, of bfloat16; Triton's interpreter takes bfloat16 in a product for integers."""
    if INTERPRETED:
        one, other = one.to(tl.float32), other.to(tl.float32)
    return tl.dot(one, other, total)


@triton.jit
def _relu(values):
    """What is above zero; NaN stays NaN, so that a loss shows it."""
    return tl.maximum(values, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _load(rows_of, row, channel, valid, CHANNELS: tl.constexpr):
    """Rows x channels as float32; zero where not `valid`."""
    return tl.load(rows_of + row[:, None] * CHANNELS + channel[None, :], mask=valid[:, None], other=0.0).to(tl.float32)


@triton.jit
def _store(rows_of, row, channel, valid, values, CHANNELS: tl.constexpr):
    tl.store(rows_of + row[:, None] * CHANNELS + channel[None, :], values, mask=valid[:, None])


@triton.jit
def _store_sums(partial, sums, channel, CHANNELS: tl.constexpr):
    """Store the two sums that a program has added up, rows x channels each, as 2 x channels."""
    tl.store(partial + channel, tl.sum(sums[0], 0))
    tl.store(partial + CHANNELS + channel, tl.sum(sums[1], 0))


@triton.jit
def _add_statistics(sums, stored, center, valid):
    """Add differences from `center`, a value near the mean, and their squares."""
    difference = tl.where(valid[:, None], stored.to(tl.float32) - center[None, :], 0.0)
    return sums[0] + difference, sums[1] + difference * difference


@triton.jit
def _gradient_before_norm(gradients, maps, norm, sums, row, channel, valid, rows, CHANNELS: tl.constexpr):
    """From the gradients after BatchNorm and ReLU those before them, of rows x channels. `sums`: of the gradient before ReLU,
    and of that times the normalized map."""
    mean, rstd = tl.load(norm + MEAN * CHANNELS + channel), tl.load(norm + RSTD * CHANNELS + channel)
    scale, shift = tl.load(norm + SCALE * CHANNELS + channel), tl.load(norm + SHIFT * CHANNELS + channel)
    constant, slope = tl.load(sums + channel) / rows, tl.load(sums + CHANNELS + channel) / rows
    z = _load(maps, row, channel, valid, CHANNELS)
    gradient = _load(gradients, row, channel, valid, CHANNELS)
    gradient = tl.where(z * scale[None, :] + shift[None, :] > 0, gradient, 0.0)
    before = scale[None, :] * (gradient - constant[None, :] - (z - mean[None, :]) * rstd[None, :] * slope[None, :])
    return tl.where(valid[:, None], before, 0.0)


@triton.jit
def _image_patches(images, row, valid, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """The 27 values around each pixel, and five zeros: rows x 32 bfloat16."""
    value = tl.arange(0, 32)
    y = (row // WIDTH % HEIGHT)[:, None] + value[None, :] // 9 - 1
    x = (row % WIDTH)[:, None] + value[None, :] // 3 % 3 - 1
    inside = valid[:, None] & (value < IMAGE_TAPS)[None, :] & (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH)
    image = (row // (HEIGHT * WIDTH))[:, None]
    return tl.load(images + ((image * HEIGHT + y) * WIDTH + x) * 3 + value[None, :] % 3, mask=inside, other=0.0).to(tl.bfloat16)


# ---------------------------------------------------------------- forwards

@triton.jit
def input_forward(images, weights, maps, centers, partial, rows, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
                  OUT: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr):
    """The first 3x3 convolution, with padding 1, from float32 images; and the sums for its BatchNorm."""
    out, value = tl.program_id(1) * OUTS + tl.arange(0, OUTS), tl.arange(0, 32)
    weight = tl.load(weights + out[None, :] * IMAGE_TAPS + value[:, None], mask=(value < IMAGE_TAPS)[:, None], other=0.0)
    center, zero = tl.load(centers + out), tl.zeros((ROWS, OUTS), tl.float32)
    sums = (zero, zero)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        valid = row < rows
        patches = _image_patches(images, row, valid, HEIGHT, WIDTH)
        result = _dot(patches, weight.to(tl.bfloat16), zero).to(tl.bfloat16)
        _store(maps, row, out, valid, result, OUT)
        sums = _add_statistics(sums, result, center, valid)
    _store_sums(partial + tl.program_id(0) * 2 * OUT, sums, out, OUT)


@triton.jit
def separable_forward(maps_in, norm, pointwise, between, maps, centers, partial, rows,
                      HEIGHT: tl.constexpr, WIDTH: tl.constexpr, OUT_HEIGHT: tl.constexpr, OUT_WIDTH: tl.constexpr,
                      IN: tl.constexpr, OUT: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
                      ROWS: tl.constexpr, INS: tl.constexpr, OUTS: tl.constexpr):
    """BatchNorm and ReLU of the input, the depthwise convolution, whose result goes to `between`, the pointwise one, and the
    sums for its BatchNorm."""
    part = tl.program_id(1)
    out = part * OUTS + tl.arange(0, OUTS)
    center, zero = tl.load(centers + out), tl.zeros((ROWS, OUTS), tl.float32)
    sums = (zero, zero)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        valid = row < rows
        image, y, x = row // (OUT_HEIGHT * OUT_WIDTH), row // OUT_WIDTH % OUT_HEIGHT, row % OUT_WIDTH
        total = zero
        for first in range(0, IN, INS):
            channel = first + tl.arange(0, INS)
            scale, shift = tl.load(norm + SCALE * IN + channel), tl.load(norm + SHIFT * IN + channel)
            filtered = tl.zeros((ROWS, INS), tl.float32)
            for tap in tl.static_range(TAPS):
                yy, xx = y * STRIDE + (tap // 3 - 1) * DILATION, x * STRIDE + (tap % 3 - 1) * DILATION
                inside = valid & (yy >= 0) & (yy < HEIGHT) & (xx >= 0) & (xx < WIDTH)
                z = _load(maps_in, (image * HEIGHT + yy) * WIDTH + xx, channel, inside, IN)
                activation = tl.where(inside[:, None], _relu(z * scale[None, :] + shift[None, :]), 0.0)
                filtered += activation * tl.load(norm + (TAP + tap) * IN + channel)[None, :]
            rounded = filtered.to(tl.bfloat16)
            if part == 0:
                _store(between, row, channel, valid, rounded, IN)
            weight = tl.load(pointwise + out[None, :] * IN + channel[:, None]).to(tl.bfloat16)
            total = _dot(rounded, weight, total)
        result = total.to(tl.bfloat16)
        _store(maps, row, out, valid, result, OUT)
        sums = _add_statistics(sums, result, center, valid)
    _store_sums(partial + tl.program_id(0) * 2 * OUT, sums, out, OUT)


@triton.jit
def sum_programs(partial, total, programs, VALUES: tl.constexpr, PROGRAMS: tl.constexpr, EACH: tl.constexpr):
    """The sum over the programs, at most PROGRAMS, of EACH of the VALUES that each has stored."""
    value, program = tl.program_id(0) * EACH + tl.arange(0, EACH), tl.arange(0, PROGRAMS)
    tl.store(total + value, tl.sum(_load(partial, program, value, program < programs, VALUES), 0))


@triton.jit
def finish_norm(partial, gamma, beta, running_mean, running_var, depthwise, norm, programs, rows, momentum, epsilon,
                CHANNELS: tl.constexpr, PROGRAMS: tl.constexpr, EACH: tl.constexpr, FILTERED: tl.constexpr):
    """The norm of EACH channels from the programs' sums, and the running statistics. The sums are of differences from the
    running mean, so that a mean far from zero costs no precision (Chan, Golub and LeVeque 1983, "Algorithms for computing the
    sample variance", shifted data). FILTERED: a depthwise convolution follows."""
    channel, program = tl.program_id(0) * EACH + tl.arange(0, EACH), tl.arange(0, PROGRAMS)
    # everything is asked for at once: memory answers some 600 ns later
    differences = _load(partial, 2 * program, channel, program < programs, CHANNELS)
    squares = _load(partial, 2 * program + 1, channel, program < programs, CHANNELS)
    mean_before, variance_before = tl.load(running_mean + channel), tl.load(running_var + channel)
    weight, bias = tl.load(gamma + channel), tl.load(beta + channel)
    if FILTERED:
        for tap in tl.static_range(TAPS):
            tl.store(norm + (TAP + tap) * CHANNELS + channel, tl.load(depthwise + channel * TAPS + tap))
    difference, square = tl.sum(differences, 0) / rows, tl.sum(squares, 0) / rows
    mean, variance = mean_before + difference, _relu(square - difference * difference)
    rstd = 1 / tl.sqrt(variance + epsilon)
    scale = weight * rstd
    tl.store(norm + MEAN * CHANNELS + channel, mean)
    tl.store(norm + RSTD * CHANNELS + channel, rstd)
    tl.store(norm + SCALE * CHANNELS + channel, scale)
    tl.store(norm + SHIFT * CHANNELS + channel, bias - mean * scale)
    tl.store(running_mean + channel, mean_before + momentum * difference)
    tl.store(running_var + channel, variance_before + momentum * (variance * rows / (rows - 1) - variance_before))


@triton.jit
def _load_head(weights, first, channel, CHANNELS: tl.constexpr, CLASSES: tl.constexpr, EACH: tl.constexpr):
    """The head's weights for EACH classes, from the `first` on: classes x channels, zero where there are none."""
    value = first + tl.arange(0, EACH)
    there = (value < CLASSES)[:, None] & (channel < CHANNELS)[None, :]
    return tl.load(weights + value[:, None] * CHANNELS + channel[None, :], mask=there, other=0.0)


@triton.jit
def pool_forward(maps, norm, weights, bias, features, logits, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
                 PADDED: tl.constexpr, BLOCK: tl.constexpr, CLASSES: tl.constexpr, EACH: tl.constexpr):
    """Of an image: the mean of its pixels after BatchNorm and ReLU, and the logits of CLASSES, if there are any."""
    image, channel = tl.program_id(0), tl.arange(0, PADDED)
    there = channel < CHANNELS
    scale = tl.load(norm + SCALE * CHANNELS + channel, mask=there, other=0.0)
    shift = tl.load(norm + SHIFT * CHANNELS + channel, mask=there, other=0.0)
    total = tl.zeros((PADDED,), tl.float32)
    for start in range(0, PIXELS, BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        inside = (pixel < PIXELS)[:, None] & there[None, :]
        z = tl.load(maps + (image * PIXELS + pixel)[:, None] * CHANNELS + channel[None, :], mask=inside, other=0.0)
        total += tl.sum(tl.where(inside, _relu(z.to(tl.float32) * scale[None, :] + shift[None, :]), 0.0), 0)
    feature = total / PIXELS
    tl.store(features + image * CHANNELS + channel, feature, mask=there)
    for first in range(0, CLASSES, EACH):
        value = first + tl.arange(0, EACH)
        product = tl.sum(_load_head(weights, first, channel, CHANNELS, CLASSES, EACH) * feature[None, :], 1)
        tl.store(logits + image * CLASSES + value, product + tl.load(bias + value, mask=value < CLASSES, other=0.0),
                 mask=value < CLASSES)


# ---------------------------------------------------------------- the loss

@triton.jit
def _log_softmax(values):
    """Of rows x classes, by row."""
    shifted = values - tl.max(values, 1)[:, None]
    return shifted - tl.log(tl.sum(tl.exp(shifted), 1))[:, None]


@triton.jit
def _load_logits(logits, row, valid, CLASSES: tl.constexpr, PADDED: tl.constexpr):
    """Rows x PADDED as float32: -inf beyond the classes, zero in rows that are not `valid`."""
    value = tl.arange(0, PADDED)
    there = valid[:, None] & (value < CLASSES)[None, :]
    loaded = tl.load(logits + row[:, None] * CLASSES + value[None, :], mask=there, other=0.0).to(tl.float32)
    return tl.where((value < CLASSES)[None, :], loaded, float("-inf"))


@triton.jit
def softmax_loss(logits, labels, teachers, loss, gradients, rows, smoothing, share, temperature,
                 CLASSES: tl.constexpr, PADDED: tl.constexpr, TEACHERS: tl.constexpr, ROWS: tl.constexpr):
    """The loss of tinycnn/training/distillation.py, and its gradients for the logits, rows x classes. `teachers`: the logits of
    TEACHERS networks, each rows x classes. One program, so the sum has one order."""
    value = tl.arange(0, PADDED)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        valid = row < rows
        there = valid[:, None] & (value < CLASSES)[None, :]
        student = _load_logits(logits, row, valid, CLASSES, PADDED)
        label = tl.load(labels + row, mask=valid, other=0)
        target = tl.where(value[None, :] == label[:, None], 1 - smoothing, 0.0) + smoothing / CLASSES
        log_predicted = _log_softmax(student)
        lost = -target * log_predicted
        gradient = tl.exp(log_predicted) - target
        if TEACHERS:
            softened = tl.zeros((ROWS, PADDED), tl.float32)
            for teacher in tl.static_range(TEACHERS):
                predicted = _load_logits(teachers + teacher * rows * CLASSES, row, valid, CLASSES, PADDED)
                softened += tl.exp(_log_softmax(predicted / temperature)) / TEACHERS
            log_predicted = _log_softmax(student / temperature)
            divergence = tl.where(softened > 0, softened * (tl.log(softened) - log_predicted), 0.0)
            lost = (1 - share) * lost + share * temperature * temperature * divergence
            gradient = (1 - share) * gradient + share * temperature * (tl.exp(log_predicted) - softened)
        total += tl.sum(tl.where(there, lost, 0.0), 1)
        tl.store(gradients + row[:, None] * CLASSES + value[None, :], gradient / rows, mask=there)
    tl.store(loss, tl.sum(total, 0) / rows)


# ---------------------------------------------------------------- backwards

@triton.jit
def _add_norm_gradients(sums, gradient, z, mean, rstd, scale, shift, valid):
    """Add the gradients of a BatchNorm's bias, and of its weight; `gradient` is that after the ReLU."""
    passed = tl.where(valid[:, None] & (z * scale[None, :] + shift[None, :] > 0), gradient.to(tl.float32), 0.0)
    return sums[0] + passed, sums[1] + passed * (z - mean[None, :]) * rstd[None, :]


@triton.jit
def head_backward(logit_gradients, weights, feature_gradients, CHANNELS: tl.constexpr, PADDED: tl.constexpr,
                  CLASSES: tl.constexpr, EACH: tl.constexpr):
    """The gradients of an image's features from those of its logits."""
    image, channel = tl.program_id(0), tl.arange(0, PADDED)
    total = tl.zeros((PADDED,), tl.float32)
    for first in range(0, CLASSES, EACH):
        value = first + tl.arange(0, EACH)
        gradient = tl.load(logit_gradients + image * CLASSES + value, mask=value < CLASSES, other=0.0)
        total += tl.sum(_load_head(weights, first, channel, CHANNELS, CLASSES, EACH) * gradient[:, None], 0)
    tl.store(feature_gradients + image * CHANNELS + channel, total, mask=channel < CHANNELS)


@triton.jit
def pool_backward(feature_gradients, maps, norm, gradients, partial, rows, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
                  ROWS: tl.constexpr):
    """The gradients of the pooled pixels, and the sums for BatchNorm."""
    channel = tl.program_id(1) * 32 + tl.arange(0, 32)
    mean, rstd = tl.load(norm + MEAN * CHANNELS + channel), tl.load(norm + RSTD * CHANNELS + channel)
    scale, shift = tl.load(norm + SCALE * CHANNELS + channel), tl.load(norm + SHIFT * CHANNELS + channel)
    zero = tl.zeros((ROWS, 32), tl.float32)
    sums = (zero, zero)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        valid = row < rows
        gradient = (_load(feature_gradients, row // PIXELS, channel, valid, CHANNELS) / PIXELS).to(tl.bfloat16)
        _store(gradients, row, channel, valid, gradient, CHANNELS)
        z = _load(maps, row, channel, valid, CHANNELS)
        sums = _add_norm_gradients(sums, gradient, z, mean, rstd, scale, shift, valid)
    _store_sums(partial + tl.program_id(0) * 2 * CHANNELS, sums, channel, CHANNELS)


@triton.jit
def pointwise_backward(gradients, maps, norm, sums, pointwise, between_gradients, rows, IN: tl.constexpr, OUT: tl.constexpr,
                       ROWS: tl.constexpr, INS: tl.constexpr, OUTS: tl.constexpr):
    """The gradients between the depthwise and the pointwise convolution."""
    row, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * INS + tl.arange(0, INS)
    valid = row < rows
    total = tl.zeros((ROWS, INS), tl.float32)
    for start in range(0, OUT, OUTS):
        out = start + tl.arange(0, OUTS)
        gradient = _gradient_before_norm(gradients, maps, norm, sums, row, out, valid, rows, OUT)
        weight = tl.load(pointwise + out[:, None] * IN + channel[None, :]).to(tl.bfloat16)
        total = _dot(gradient.to(tl.bfloat16), weight, total)
    _store(between_gradients, row, channel, valid, total.to(tl.bfloat16), IN)


@triton.jit
def pointwise_weights(gradients, maps, norm, sums, between, partial, rows, IN: tl.constexpr, OUT: tl.constexpr,
                      ROWS: tl.constexpr, INS: tl.constexpr, OUTS: tl.constexpr):
    """A program's sum of the gradients of OUTS x INS pointwise weights."""
    split, splits = tl.program_id(0), tl.num_programs(0)
    out, channel = tl.program_id(1) * OUTS + tl.arange(0, OUTS), tl.program_id(2) * INS + tl.arange(0, INS)
    total = tl.zeros((OUTS, INS), tl.float32)
    for start in range(split * ROWS, rows, splits * ROWS):
        row = start + tl.arange(0, ROWS)
        valid = row < rows
        gradient = _gradient_before_norm(gradients, maps, norm, sums, row, out, valid, rows, OUT)
        filtered = tl.load(between + row[:, None] * IN + channel[None, :], mask=valid[:, None], other=0.0)
        total = _dot(tl.trans(gradient.to(tl.bfloat16)), filtered, total)
    tl.store(partial + split * OUT * IN + out[:, None] * IN + channel[None, :], total)


@triton.jit
def depthwise_backward(between_gradients, maps_in, norm, gradients, partial, rows,
                       HEIGHT: tl.constexpr, WIDTH: tl.constexpr, OUT_HEIGHT: tl.constexpr, OUT_WIDTH: tl.constexpr,
                       CHANNELS: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, ROWS: tl.constexpr):
    """The gradients of the block's input, and the sums of the weights' gradients and for the BatchNorm before."""
    channel = tl.program_id(1) * 32 + tl.arange(0, 32)
    mean, rstd = tl.load(norm + MEAN * CHANNELS + channel), tl.load(norm + RSTD * CHANNELS + channel)
    scale, shift = tl.load(norm + SCALE * CHANNELS + channel), tl.load(norm + SHIFT * CHANNELS + channel)
    zero = tl.zeros((ROWS, 32), tl.float32)
    weights, sums = (zero, zero, zero, zero, zero, zero, zero, zero, zero), (zero, zero)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        valid = row < rows
        image, y, x = row // (HEIGHT * WIDTH), row // WIDTH % HEIGHT, row % WIDTH
        z = _load(maps_in, row, channel, valid, CHANNELS)
        activation = tl.where(valid[:, None], _relu(z * scale[None, :] + shift[None, :]), 0.0)
        total, added = zero, ()
        for tap in tl.static_range(TAPS):
            down, right = y - (tap // 3 - 1) * DILATION, x - (tap % 3 - 1) * DILATION  # STRIDE times the output pixel's place
            inside = valid & (down >= 0) & (down % STRIDE == 0) & (right >= 0) & (right % STRIDE == 0)
            inside = inside & (down // STRIDE < OUT_HEIGHT) & (right // STRIDE < OUT_WIDTH)
            output = (image * OUT_HEIGHT + down // STRIDE) * OUT_WIDTH + right // STRIDE
            gradient = _load(between_gradients, output, channel, inside, CHANNELS)
            total += gradient * tl.load(norm + (TAP + tap) * CHANNELS + channel)[None, :]
            added = added + (weights[tap] + activation * gradient,)  # type: ignore[assignment]
        weights = added  # type: ignore[assignment]
        rounded = total.to(tl.bfloat16)
        _store(gradients, row, channel, valid, rounded, CHANNELS)
        sums = _add_norm_gradients(sums, rounded, z, mean, rstd, scale, shift, valid)
    own = partial + tl.program_id(0) * DEPTHWISE_SUMS * CHANNELS
    for tap in tl.static_range(TAPS):  # in the order of the weights in memory
        tl.store(own + channel * TAPS + tap, tl.sum(weights[tap], 0))
    _store_sums(own + TAPS * CHANNELS, sums, channel, CHANNELS)


@triton.jit
def input_weights(gradients, maps, norm, sums, images, partial, rows, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
                  OUT: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr):
    """A program's sum of the gradients of the first convolution's weights, OUTS x 27."""
    split, splits = tl.program_id(0), tl.num_programs(0)
    out, value = tl.program_id(1) * OUTS + tl.arange(0, OUTS), tl.arange(0, 32)
    total = tl.zeros((OUTS, 32), tl.float32)
    for start in range(split * ROWS, rows, splits * ROWS):
        row = start + tl.arange(0, ROWS)
        valid = row < rows
        gradient = _gradient_before_norm(gradients, maps, norm, sums, row, out, valid, rows, OUT)
        patches = _image_patches(images, row, valid, HEIGHT, WIDTH)
        total = _dot(tl.trans(gradient.to(tl.bfloat16)), patches, total)
    place = partial + (split * OUT + out[:, None]) * IMAGE_TAPS + value[None, :]
    tl.store(place, total, mask=(value < IMAGE_TAPS)[None, :])
