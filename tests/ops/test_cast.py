"""Host images into the blocked layout: every value the nearest that the storage holds."""

import numpy as np
import pytest
from harness import Bench, each_mode

from dpresnet.ops import cast as ops


@each_mode
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 8, 7), (3, 17, 4, 5), (1, 48, 2, 3)])
def test_pack(mode, shape):
    bench = Bench(mode)
    x = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    y = bench.out_image(shape)
    ops.pack(bench.plan, "cast", bench.array(x), y)
    bench.run()
    bench.assert_exact(y, x)


@each_mode
def test_edges_of_fp16(mode):
    """Overflow, the smallest subnormal, ties to even, signed zero, NaN: as IEEE 754 says."""
    large, small = [65504, 65519.996, 65520, -1e6, np.inf, np.nan], [2**-24, 2**-25, 1.5 * 2**-24]
    x = np.array([-0.0, *large, *small, 1 + 2**-11, 1 + 3 * 2**-11], np.float32).reshape(1, 12, 1, 1)
    bench = Bench(mode)
    y = bench.out_image(x.shape)
    ops.pack(bench.plan, "cast", bench.array(x), y)
    bench.run()
    bench.assert_exact(y, x)
    assert np.signbit(bench.read(y)[0, 0, 0, 0])
