"""Batch normalisation: statistics, application and gradient, with short batches and with means far from zero."""

import numpy as np
import pytest
from harness import EPS32, Bench, each_mode, tolerance

from dpresnet import reference
from dpresnet.ops import batchnorm as ops
from dpresnet.plan import Tensor

SHAPES = [(5, 20, 6, 7), (3, 16, 1, 1), (2, 1, 9, 4), (4, 33, 3, 2)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
each_valid = pytest.mark.parametrize("valid", [0, 1, 2])


def moments_of(x: np.ndarray) -> np.ndarray:
    """[2, C] = mean and 1 / deviation as the host would store them."""
    count, mean, m2 = reference.batchnorm_statistics(x)
    return np.stack([mean, 1 / np.sqrt(m2 / count + ops.EPS)]).astype(np.float32).astype(np.float64)


def with_rubbish(x: np.ndarray, valid: int) -> np.ndarray:
    """The images that do not count hold values that would show."""
    x[valid:] = 1000 * x[valid:] + 5000
    return x


def statistics(bench: Bench, x: np.ndarray, valid: int) -> Tensor:
    merged = bench.out_rows(2, x.shape[1])
    ops.statistics(bench.plan, "bn", bench.image(x), merged, bench.control(valid=valid))
    bench.run()
    return merged


@each_mode
@each_shape
@each_valid
def test_statistics(mode, shape, valid):
    bench = Bench(mode)
    x = with_rubbish(bench.draw(*shape, mean=0.5), valid).astype(mode.storage).astype(np.float64)
    merged = bench.read(statistics(bench, x, valid))
    count, mean, m2 = reference.batchnorm_statistics(x, valid)
    allowed = 4 * np.sqrt(max(count, 1)) * EPS32
    assert np.abs(merged[0] - mean).max() <= allowed * np.abs(mean).max()
    # where every channel is one pixel, m2 is the rounding of the mean, squared
    assert np.abs(merged[1] - m2).max() <= allowed * m2.max() + (allowed * np.abs(mean).max()) ** 2 * count


@each_mode
def test_variance_survives_a_mean_a_thousand_deviations_away(mode):
    """A sum of squares would lose 1000^2 * 2^-24 = 6 % of the variance.

    The mean of an image may be off by 4 sqrt(72) 2^-24 * 1000 = 0.002 deviations. That enters the variance twice, times
    the distance of the image means from each other: a tenth of a deviation.
    """
    bench = Bench(mode)
    x = bench.draw(6, 18, 9, 8, mean=1000.0)
    merged = bench.read(statistics(bench, x, 6))
    _, mean, m2 = reference.batchnorm_statistics(x)
    off = tolerance(np.dtype(np.float32), 72) * 1000
    assert np.abs(merged[0] - mean).max() <= off
    assert np.abs(merged[1] / m2 - 1).max() <= 2 * off * 0.1


@each_mode
@each_shape
def test_apply(mode, shape):
    bench = Bench(mode)
    x, weight, bias = bench.draw(*shape, mean=0.5), bench.draw(shape[1]), bench.draw(shape[1])
    moments, y = moments_of(x), bench.out_image(shape)
    ops.apply(bench.plan, "bn", bench.image(x), y, *(bench.rows(a) for a in (moments, weight, bias)))
    bench.run()
    bench.assert_close(y, reference.batchnorm_apply(x, moments[0], moments[1] ** -2, weight, bias, eps=0), length=4)


@each_mode
@each_shape
def test_inference(mode, shape):
    bench = Bench(mode)
    x, mean, weight, bias = (bench.draw(*s) for s in (shape, *[shape[1:2]] * 3))
    var, y = np.abs(bench.draw(shape[1])), bench.out_image(shape)
    var[0] = 0  # only eps is left
    ops.inference(bench.plan, "bn", bench.image(x), y, *(bench.rows(a) for a in (mean, var, weight, bias)))
    bench.run()
    bench.assert_close(y, reference.batchnorm_apply(x, mean, var, weight, bias, ops.EPS), length=6)


@each_mode
@each_shape
@each_valid
def test_backward_reduce(mode, shape, valid):
    """Images that do not count have no gradient: the loss saw to that."""
    bench = Bench(mode)
    dy, x = bench.draw(*shape), bench.draw(*shape, mean=0.5)
    dy[valid:] = 0
    moments, channels = moments_of(x), shape[1]
    sums, dbias, dweight = bench.out_rows(2, channels), bench.out_rows(channels), bench.out_rows(channels)
    ops.backward_reduce(bench.plan, "bn", bench.image(dy), bench.image(x), bench.rows(moments), sums, dbias, dweight)
    bench.run()
    sum_dy, sum_dy_xhat = reference.batchnorm_backward_reduce(dy, x, *moments, valid)
    bench.assert_close(sums, np.stack([sum_dy, sum_dy_xhat]), dy[:, 0].size)
    np.testing.assert_array_equal(bench.read(sums), np.stack([bench.read(dbias), bench.read(dweight)]))


@each_mode
@each_shape
@each_valid
def test_backward(mode, shape, valid):
    """The sums come from elsewhere: all replicas have their part in them."""
    bench = Bench(mode)
    dy, x, weight = bench.draw(*shape), bench.draw(*shape, mean=0.5), bench.draw(shape[1])
    moments, means = moments_of(x), bench.draw(2, shape[1])
    dx, control = bench.out_image(shape), bench.control(valid=valid)
    inputs = bench.image(dy), bench.image(x), dx, *(bench.rows(a) for a in (moments, means, weight))
    ops.backward(bench.plan, "bn", *inputs, control)
    bench.run()
    bench.assert_close(dx, reference.batchnorm_backward(dy, x, *moments, weight, *means, 1, valid), length=6)
    assert not bench.read(dx)[valid:].any()


@each_mode
def test_stages_in_a_row(mode):
    """Statistics, forward and backward, each fed with what the one before left, as the host hands it on."""
    first, valid = Bench(mode), 3
    x, dy = first.draw(4, 20, 5, 6, mean=3.0), first.draw(4, 20, 5, 6)
    weight, bias = first.draw(20), first.draw(20)
    dy[valid:] = 0
    count, mean, m2 = reference.batchnorm_statistics(x, valid)
    merged = first.read(statistics(first, x, valid)).astype(np.float64)
    moments = np.stack([merged[0], 1 / np.sqrt(merged[1] / count + ops.EPS)])

    second = Bench(mode)
    y, sums, dbias, dweight = second.out_image(x.shape), *(second.out_rows(*shape) for shape in ((2, 20), (20,), (20,)))
    source, shared = second.image(x), second.rows(moments)
    ops.apply(second.plan, "bn", source, y, shared, second.rows(weight), second.rows(bias))
    ops.backward_reduce(second.plan, "bn", second.image(dy), source, shared, sums, dbias, dweight)
    second.run()

    third = Bench(mode)
    dx, means = third.out_image(x.shape), third.rows(second.read(sums) / count)
    inputs = third.image(dy), third.image(x), dx, third.rows(moments), means, third.rows(weight)
    ops.backward(third.plan, "bn", *inputs, third.control(valid=valid))
    third.run()

    invstd = 1 / np.sqrt(m2 / count + ops.EPS)
    both = reference.batchnorm_backward_reduce(dy, x, mean, invstd, valid)
    second.assert_close(y, reference.batchnorm_apply(x, mean, m2 / count, weight, bias, ops.EPS), count)
    second.assert_close(sums, np.stack(both), count)
    third.assert_close(dx, reference.batchnorm_backward(dy, x, mean, invstd, weight, *both, count, valid), count)
