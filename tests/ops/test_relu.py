"""The rectifier: nothing is rounded, so every result is exact."""

import numpy as np
import pytest
from harness import Bench, each_mode

from dpresnet import reference
from dpresnet.ops import relu as ops

SHAPES = [(1, 1, 1, 1), (3, 17, 5, 7), (2, 64, 9, 16)]  # less than one work-item, a remainder, several full ones


@each_mode
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(mode, shape):
    bench = Bench(mode)
    x, y = bench.draw(*shape), bench.out_image(shape)
    x.flat[::5] = 0
    ops.forward(bench.plan, "relu", bench.image(x), y)
    bench.run()
    bench.assert_exact(y, reference.relu_forward(x))


@each_mode
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(mode, shape):
    """Where the output is 0 nothing passes, whether the input was negative or 0."""
    bench = Bench(mode)
    dy, y, dx = bench.draw(*shape), np.maximum(bench.draw(*shape), 0), bench.out_image(shape)
    ops.backward(bench.plan, "relu", bench.image(dy), bench.image(y), dx)
    bench.run()
    bench.assert_exact(dx, reference.relu_backward(dy, y))


@each_mode
def test_bad_values_stay_visible(mode):
    bench = Bench(mode)
    x = np.array([np.nan, np.inf, -np.inf, -0.0, 1.0]).reshape(1, 5, 1, 1)
    y = bench.out_image(x.shape)
    ops.forward(bench.plan, "relu", bench.image(x), y)
    bench.run()
    bench.assert_exact(y, np.array([np.nan, np.inf, 0.0, 0.0, 1.0]).reshape(1, 5, 1, 1))
