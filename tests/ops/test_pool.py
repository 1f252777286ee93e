"""Max pooling, with ties, NaN and infinities, and global average pooling."""

import numpy as np
import pytest
from harness import Bench, each_mode

from dpresnet import reference
from dpresnet.ops import pool as ops

CASES = [  # (input shape, kernel, stride, padding)
    ((2, 20, 9, 8), 3, 2, 1),  # the ImageNet stem's; the stride leaves a remainder across
    ((1, 16, 6, 7), 2, 2, 0),  # the last column belongs to no window
    ((3, 5, 5, 6), 3, 1, 1),  # every pixel in nine windows
    ((2, 1, 7, 5), 2, 3, 0),  # pixels between the windows
    ((1, 33, 4, 3), 1, 1, 0),
    ((1, 16, 3, 5), 3, 1, 0),  # one row of windows
    ((1, 4, 12, 14), 7, 5, 3),
]
each_case = pytest.mark.parametrize(("shape", "kernel", "stride", "padding"), CASES)


def out_shape(shape: tuple[int, ...], kernel: int, stride: int, padding: int) -> tuple[int, ...]:
    return (*shape[:2], *((size + 2 * padding - kernel) // stride + 1 for size in shape[2:]))


def check_max(bench: Bench, x: np.ndarray, *window: int) -> None:
    """Values and positions, both exact."""
    shape = out_shape(x.shape, *window)
    y, index = bench.out_image(shape), bench.out_image(shape, np.uint8)
    ops.max_forward(bench.plan, "pool", bench.image(x), y, index, *window)
    bench.run()
    values, positions = reference.pool_max_forward(x, *window)
    bench.assert_exact(index, positions)
    bench.assert_exact(y, values)


@each_mode
@each_case
def test_max_forward(mode, shape, kernel, stride, padding):
    """Padding is no maximum, though 0 is larger than every value here."""
    bench = Bench(mode)
    check_max(bench, bench.draw(*shape, mean=-10.0), kernel, stride, padding)


@each_mode
@each_case
def test_first_of_equal_values_wins(mode, shape, kernel, stride, padding):
    bench = Bench(mode)
    check_max(bench, np.sign(bench.draw(*shape)), kernel, stride, padding)


@each_mode
def test_zeros_of_both_signs_are_equal(mode):
    bench = Bench(mode)
    check_max(bench, np.copysign(0.0, bench.draw(2, 20, 9, 8)), 3, 2, 1)


@each_mode
@pytest.mark.parametrize("bad", [np.nan, -np.nan, -np.inf, np.inf])
def test_values_that_are_no_numbers(mode, bad):
    bench = Bench(mode)
    x = bench.draw(2, 3, 8, 9)
    x[bench.draw(*x.shape) > 0] = bad
    x[1] = bad  # nothing else, in windows that begin outside of the image too
    check_max(bench, x, 3, 2, 1)


@each_mode
@each_case
def test_max_backward(mode, shape, kernel, stride, padding):
    bench, window = Bench(mode), (kernel, stride, padding)
    _, index = reference.pool_max_forward(np.sign(bench.draw(*shape)), *window)
    dy, dx = bench.draw(*index.shape), bench.out_image(shape)
    ops.max_backward(bench.plan, "pool", bench.image(dy), bench.image(index, np.uint8), dx, *window)
    bench.run()
    bench.assert_close(dx, reference.pool_max_backward(dy, index, shape, *window), kernel**2)


@each_mode
@pytest.mark.parametrize("shape", [(2, 20, 7, 7), (3, 16, 1, 1), (1, 5, 4, 9)])
def test_average(mode, shape):
    bench = Bench(mode)
    x, dy = bench.draw(*shape), bench.draw(*shape[:2], 1, 1)
    y, dx = bench.out_image(dy.shape), bench.out_image(shape)
    ops.average_forward(bench.plan, "average", bench.image(x), y)
    ops.average_backward(bench.plan, "average", bench.image(dy), dx)
    bench.run()
    bench.assert_close(y, reference.pool_average_forward(x)[:, :, None, None], x[0, 0].size)
    bench.assert_close(dx, reference.pool_average_backward(dy[:, :, 0, 0], shape), length=1)
