"""The reference against what it is derived from: definitions written as plain loops, and central finite differences.

Every other test trusts dpresnet.reference, so nothing here trusts it. Inputs are read-only float16 arrays and results
are compared to float64 accuracy: computing in a narrower type, or changing an argument in place, fails everywhere.
"""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from dpresnet import reference as ref

STEP = 1e-5  # central differences: truncation ~ STEP^2 = 1e-10, rounding ~ 2^-53 / STEP = 1e-11, of values near 1
SLOPE_TOLERANCE = 1e-8
ROUNDING = 1e-12  # float64 sums of fewer than a thousand terms


def draw(rng: np.random.Generator, *shape: int, mean: float = 0.0, deviation: float = 1.0) -> np.ndarray:
    return frozen(rng.normal(mean, deviation, size=shape))


def spread(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Values of both signs, none within 1e-3 of another or of 0: no kink lies within a difference step."""
    size = int(np.prod(shape))
    return frozen((rng.permutation(size) - size // 2 + 0.5).reshape(shape) * 2e-3)


def frozen(values: np.ndarray) -> np.ndarray:
    narrow = values.astype(np.float16)
    narrow.flags.writeable = False
    return narrow


def wide(*arrays: np.ndarray) -> list[np.ndarray]:
    return [np.asarray(a, dtype=np.float64) for a in arrays]


def close(actual: np.ndarray, expected: np.ndarray, tolerance: float = ROUNDING) -> bool:
    """Same shape, and no difference beyond tolerance times the largest expected value (or 1, if that is larger)."""
    actual, expected = wide(actual, expected)
    largest = max(np.abs(expected).max(initial=0.0), 1.0)
    return actual.shape == expected.shape and bool(np.all(np.abs(actual - expected) <= tolerance * largest))


def is_slope(
    gradient: np.ndarray, function: Callable[[np.ndarray], np.ndarray], at: np.ndarray, dy: np.ndarray
) -> bool:
    """Whether gradient is that of sum(function(at) * dy) by `at`, one central difference per element."""
    at, dy = wide(at, dy)
    slope = np.zeros(at.shape)
    for position in np.ndindex(*at.shape):
        nudge = np.zeros(at.shape)
        nudge[position] = STEP
        slope[position] = ((function(at + nudge) - function(at - nudge)) * dy).sum() / (2 * STEP)
    return close(gradient, slope, SLOPE_TOLERANCE)


def per_channel(values: np.ndarray) -> np.ndarray:
    return values[:, None, None]


CONVOLUTIONS = {  # x shape, w shape, stride, padding, groups
    "3x3": ((2, 3, 5, 4), (4, 3, 3, 3), 1, 1, 1),
    "stride 2 leaves a row over": ((1, 2, 6, 5), (3, 2, 3, 3), 2, 1, 1),
    "stride 3 leaves rows and columns over": ((1, 2, 7, 8), (2, 2, 3, 3), 3, 0, 1),
    "two groups, stride 2": ((1, 4, 6, 7), (6, 2, 3, 3), 2, 1, 2),
    "depthwise": ((2, 3, 5, 4), (3, 1, 3, 3), 1, 1, 3),
    "1x1, stride beyond the kernel": ((2, 3, 5, 4), (2, 3, 1, 1), 2, 0, 1),
    "2x2": ((1, 2, 5, 6), (3, 2, 2, 2), 2, 1, 1),
    "4x2, wide padding": ((1, 2, 4, 3), (2, 2, 4, 2), 1, 3, 1),
    "1x5, windows of padding alone": ((1, 2, 3, 4), (2, 2, 1, 5), 1, 2, 1),
    "7x7 stem": ((1, 1, 9, 8), (2, 1, 7, 7), 2, 3, 1),
    "one pixel": ((1, 2, 1, 1), (2, 2, 3, 3), 1, 1, 1),
}


def convolve_by_definition(x: np.ndarray, w: np.ndarray, stride: int, padding: int, groups: int) -> np.ndarray:
    x, w = wide(x, w)
    (images, _, height, width), (outputs, group_inputs, kh, kw) = x.shape, w.shape
    tall, across = (height + 2 * padding - kh) // stride + 1, (width + 2 * padding - kw) // stride + 1
    y = np.zeros((images, outputs, tall, across))
    for n, o, row, column, c, i, j in np.ndindex(*y.shape, *w.shape[1:]):
        h, v = row * stride + i - padding, column * stride + j - padding
        if 0 <= h < height and 0 <= v < width:
            y[n, o, row, column] += w[o, c, i, j] * x[n, o // (outputs // groups) * group_inputs + c, h, v]
    return y


@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_convolution_equals_its_definition_and_its_gradients_finite_differences(case):
    (x_shape, w_shape, *geometry), rng = case, np.random.default_rng(1)
    x, w = draw(rng, *x_shape), draw(rng, *w_shape)
    y = ref.conv_forward(x, w, *geometry)
    assert close(y, convolve_by_definition(x, w, *geometry))
    dy = draw(rng, *y.shape)
    dx, dw = ref.conv_backward_data(dy, w, x_shape, *geometry), ref.conv_backward_weight(dy, x, w_shape, *geometry)
    assert is_slope(dx, lambda at: ref.conv_forward(at, w, *geometry), x, dy)
    assert is_slope(dw, lambda at: ref.conv_forward(x, at, *geometry), w, dy)


def with_unused_images(x: np.ndarray, unused: int) -> np.ndarray:
    """Room beyond the valid images, filled with NaN: a single use of it would show."""
    return np.concatenate([x, np.full((unused, *x.shape[1:]), np.nan, dtype=x.dtype)])


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_statistics_of_parts_merge_in_any_grouping_to_those_of_the_whole(offset):
    x = np.random.default_rng(2).normal(size=(6, 3, 2, 5))
    parts = [x[:1] + offset, x[1:4] + offset, x[4:] + offset, x[:0]]
    a, b, c, none = (ref.batchnorm_statistics(with_unused_images(part, 2), len(part)) for part in parts)
    merge = ref.batchnorm_merge
    padded_out = merge(merge(none, a), merge(merge(b, none), c))
    for count, mean, m2 in (merge(merge(a, b), c), merge(a, merge(b, c)), padded_out):
        # The values carry an error of 2^-53 * offset; by way of E[x^2] it would be offset times larger still.
        assert count == 60
        assert close(mean - offset, x.mean(axis=(0, 2, 3)), 1e-15 * (10 + offset))
        assert close(m2 / count, x.var(axis=(0, 2, 3)), 1e-15 * (10 + offset))
    assert merge(none, none)[0] == 0 and not np.any(merge(none, none)[1:])


def normalise(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    """Batch normalisation by its definition, all replicas in one batch."""
    x, weight, bias = wide(x, weight, bias)
    mean, variance = x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3))
    return (x - per_channel(mean)) / per_channel((variance + eps) ** 0.5) * per_channel(weight) + per_channel(bias)


def test_batchnorm_gradients_of_merged_replicas_equal_finite_differences():
    rng, eps = np.random.default_rng(3), 0.1
    x, dy = draw(rng, 3, 2, 3, 2, mean=2, deviation=3), draw(rng, 3, 2, 3, 2)
    weight, bias = draw(rng, 2), draw(rng, 2)
    count, mean, m2 = ref.batchnorm_statistics(x)
    assert close(ref.batchnorm_apply(x, mean, m2 / count, weight, bias, eps), normalise(x, weight, bias, eps))
    invstd = (m2 / count + eps) ** -0.5
    parts = [slice(0, 2), slice(2, 3), slice(3, 3)]  # replicas with 2, 1 and no real images, and room for 2 more
    replicas = [(with_unused_images(dy[p], 2), with_unused_images(x[p], 2), len(x[p])) for p in parts]
    sums = [ref.batchnorm_backward_reduce(dy_v, x_v, mean, invstd, valid) for dy_v, x_v, valid in replicas]
    sum_dy, sum_dy_xhat = np.sum(sums, axis=0)
    merged = mean, invstd, weight, sum_dy, sum_dy_xhat, count
    dxs = [ref.batchnorm_backward(dy_v, x_v, *merged, valid) for dy_v, x_v, valid in replicas]
    assert [dx.shape[0] for dx in dxs] == [4, 3, 2] and not any(np.any(dx[-2:]) for dx in dxs)
    assert is_slope(np.concatenate([dx[:-2] for dx in dxs]), lambda at: normalise(at, weight, bias, eps), x, dy)
    assert is_slope(sum_dy, lambda at: normalise(x, weight, at, eps), bias, dy)
    assert is_slope(sum_dy_xhat, lambda at: normalise(x, at, bias, eps), weight, dy)
    assert not np.any(ref.batchnorm_backward(dy, x, *merged[:3], 0 * sum_dy, 0 * sum_dy, 0, valid=0))


def test_running_statistics_move_a_tenth_of_the_way_to_the_unbiased_variance():
    rng = np.random.default_rng(4)
    x, mean, var = draw(rng, 2, 3, 2, 2), draw(rng, 3), draw(rng, 3, mean=9)
    new_mean, new_var = ref.batchnorm_running(mean, var, *ref.batchnorm_statistics(x))
    x64, mean64, var64 = wide(x, mean, var)
    assert close(new_mean, 0.9 * mean64 + 0.1 * x64.mean(axis=(0, 2, 3)))
    assert close(new_var, 0.9 * var64 + 0.1 * x64.var(axis=(0, 2, 3), ddof=1))
    assert close(ref.batchnorm_running(mean, var, 1, mean, 0 * var, momentum=0.25), (mean64, 0.75 * var64))
    assert close(ref.batchnorm_running(mean, var, *ref.batchnorm_statistics(x, 0)), (mean, var), 0.0)


def test_relu_residual_sum_and_their_gradients():
    rng = np.random.default_rng(5)
    x, dy = spread(rng, 2, 3, 3, 2), draw(rng, 2, 3, 3, 2)
    assert is_slope(ref.relu_backward(dy, ref.relu_forward(x)), ref.relu_forward, x, dy)
    assert np.array_equal(ref.relu_forward([-2, 0, 3, np.nan]), [0, 0, 3, np.nan], equal_nan=True)
    assert np.array_equal(ref.relu_backward([np.inf, 5], [0, 3]), [0, 5])
    assert close(ref.residual_add(x, dy), x.astype(float) + dy.astype(float), 0.0)


GEOMETRIES = [(3, 2, 1), (2, 2, 0), (2, 1, 1), (3, 3, 0), (3, 1, 1), (1, 2, 0)]  # kernel, stride, padding


def pool_by_definition(x: np.ndarray, kernel: int, stride: int, padding: int) -> tuple[np.ndarray, np.ndarray]:
    tall, across = ((size + 2 * padding - kernel) // stride + 1 for size in x.shape[2:])
    y, index = np.zeros((*x.shape[:2], tall, across)), np.zeros((*x.shape[:2], tall, across), dtype=int)
    for n, c, row, column in np.ndindex(*y.shape):
        window = {}
        for i, j in np.ndindex(kernel, kernel):
            h, v = row * stride + i - padding, column * stride + j - padding
            if 0 <= h < x.shape[2] and 0 <= v < x.shape[3]:
                window[kernel * i + j] = x[n, c, h, v]
        index[n, c, row, column] = max(window, key=window.get)  # max keeps the first of equals
        y[n, c, row, column] = max(window.values())
    return y, index


@pytest.mark.parametrize(("shape", "geometry"), list(product([(1, 2, 5, 6), (2, 1, 7, 4)], GEOMETRIES)))
def test_max_pooling_equals_its_definition_and_its_gradient_finite_differences(shape, geometry):
    rng = np.random.default_rng(6)
    ties = rng.integers(-4, 0, size=shape)  # the first of equals wins; every value is below the padding's zero
    for actual, expected in zip(
        ref.pool_max_forward(ties, *geometry), pool_by_definition(ties, *geometry), strict=True
    ):
        assert np.array_equal(actual, expected)
    x = spread(rng, *shape)
    y, index = ref.pool_max_forward(x, *geometry)
    dy = draw(rng, *y.shape)
    dx = ref.pool_max_backward(dy, index, shape, *geometry)
    assert is_slope(dx, lambda at: ref.pool_max_forward(at, *geometry)[0], x, dy)


def test_max_pooling_lets_nan_through_and_chooses_a_pixel_among_minus_infinities():
    x = np.array([[[[1, np.nan, 9, -np.inf], [np.nan, 7, -np.inf, -np.inf]]]])
    y, index = ref.pool_max_forward(x, kernel=2, stride=2, padding=0)
    assert np.array_equal(y, [[[[np.nan, 9]]]], equal_nan=True)
    assert index.tolist() == [[[[2, 0]]]]
    assert ref.pool_max_forward(np.full((1, 1, 1, 1), -np.inf), 3, 2, 1)[1].tolist() == [[[[4]]]]


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_shortcut_and_its_gradient(stride):
    rng = np.random.default_rng(8)
    x = draw(rng, 2, 3, 5, 4)
    y = ref.shortcut_forward(x, 5, stride)
    assert y.shape == (2, 5, -(-5 // stride), -(-4 // stride))
    for n, c, h, w in np.ndindex(*y.shape):
        assert y[n, c, h, w] == (x[n, c, h * stride, w * stride] if c < 3 else 0)
    dy = draw(rng, *y.shape)
    assert is_slope(ref.shortcut_backward(dy, x.shape, stride), lambda at: ref.shortcut_forward(at, 5, stride), x, dy)


def test_linear_and_average_pooling_and_their_gradients():
    rng = np.random.default_rng(9)
    x, w, b, dy = draw(rng, 3, 5), draw(rng, 2, 5), draw(rng, 2), draw(rng, 3, 2)
    x64, w64, b64 = wide(x, w, b)
    assert close(ref.linear_forward(x, w, b), [[sum(x64[n] * w64[o]) + b64[o] for o in range(2)] for n in range(3)])
    dw, db = ref.linear_backward_weight(dy, x)
    assert is_slope(ref.linear_backward_data(dy, w), lambda at: ref.linear_forward(at, w, b), x, dy)
    assert is_slope(dw, lambda at: ref.linear_forward(x, at, b), w, dy)
    assert is_slope(db, lambda at: ref.linear_forward(x, w, at), b, dy)
    images = draw(rng, 3, 2, 3, 5)
    assert close(ref.pool_average_forward(images), images.astype(float).reshape(3, 2, 15).sum(axis=2) / 15)
    assert is_slope(ref.pool_average_backward(dy, images.shape), ref.pool_average_forward, images, dy)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_loss_and_its_gradient(smoothing):
    logits, labels = draw(np.random.default_rng(10), 4, 5, deviation=3), np.array([0, 4, 2, 2])
    logits64 = logits.astype(float)
    surprise = np.log(np.exp(logits64).sum(axis=1, keepdims=True)) - logits64  # -log softmax, as it is defined
    expected = (1 - smoothing) * surprise[np.arange(4), labels] + smoothing * surprise.mean(axis=1)
    assert close(ref.loss_forward(logits, labels, smoothing), expected)
    gradient = ref.loss_backward(logits, labels, smoothing, scale=3.0)
    assert is_slope(gradient, lambda at: ref.loss_forward(at, labels, smoothing), logits, np.full(4, 3.0))
    assert close(gradient.sum(axis=1), np.zeros(4))  # the targets sum to 1, as the probabilities do
    assert close(ref.loss_forward(np.zeros((1, 5)), [3], smoothing), [np.log(5)])


def test_loss_does_not_overflow_and_ignores_a_common_offset():
    logits, labels = np.array([[1e5, 0.0, -1e5], [2.0, 1.0, 0.0]]), [1, 0]
    assert close(ref.loss_forward(logits, labels), [1e5, np.log1p(np.exp(-1) + np.exp(-2))])
    assert close(ref.loss_backward(logits, labels)[0], [1, -1, 0])
    assert close(ref.loss_backward(logits + 64, labels, 0.1), ref.loss_backward(logits, labels, 0.1))


def test_samples_beyond_valid_have_no_loss_no_gradient_and_are_not_correct():
    logits, labels = np.array([[1.0, 3.0], [np.nan, np.nan]]), np.array([1, 2**31 - 1])
    assert close(ref.loss_forward(logits, labels, 0.1, valid=1), [*ref.loss_forward(logits[:1], labels[:1], 0.1), 0])
    assert close(ref.loss_backward(logits, labels, valid=1), [*ref.loss_backward(logits[:1], labels[:1]), [0, 0]])
    assert ref.loss_correct(logits, labels, valid=1).tolist() == [1, 0]
    assert ref.loss_correct(logits, labels, valid=0).tolist() == [0, 0]


def test_the_first_largest_logit_is_the_prediction_and_nan_is_never_right():
    logits = np.array([[1, 5, 5], [1, 5, 5], [7, 5, 5], [np.nan, 1, 2], [2, 1, np.nan]])
    assert ref.loss_correct(logits, [1, 2, 0, 0, 0]).tolist() == [1, 0, 1, 0, 0]


