"""Residual addition: one rounding, so every result is the nearest value there is."""

import numpy as np
import pytest
from harness import Bench, each_mode

from dpresnet import reference
from dpresnet.ops import residual as ops


@each_mode
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 17, 5, 7), (2, 64, 9, 16)])
def test_add(mode, shape):
    bench = Bench(mode)
    a, b, y = bench.draw(*shape), bench.draw(*shape, deviation=100.0), bench.out_image(shape)
    ops.add(bench.plan, "add", bench.image(a), bench.image(b), y)
    bench.run()
    bench.assert_exact(y, reference.residual_add(a, b))


@each_mode
def test_overflow_is_infinite_and_nan_stays(mode):
    bench, largest = Bench(mode), float(np.finfo(mode.storage).max)
    a = np.array([largest, -largest, np.nan, np.inf]).reshape(1, 4, 1, 1)
    b = np.array([largest, -largest, 0.0, -np.inf]).reshape(1, 4, 1, 1)
    y = bench.out_image(a.shape)
    ops.add(bench.plan, "add", bench.image(a), bench.image(b), y)
    bench.run()
    bench.assert_exact(y, np.array([np.inf, -np.inf, np.nan, np.nan]).reshape(1, 4, 1, 1))
