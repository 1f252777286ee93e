"""The shortcut without parameters: values are moved, not computed, so every result is exact."""

import numpy as np
import pytest
from harness import Bench, each_mode

from dpresnet import reference
from dpresnet.ops import shortcut as ops

CASES = [  # (input shape, output channels, stride)
    ((2, 16, 8, 6), 32, 2),
    ((1, 16, 7, 9), 16, 1),
    ((3, 4, 5, 5), 8, 2),  # both in one block
    ((2, 17, 7, 8), 20, 3),  # both end in the same block
    ((1, 20, 9, 4), 48, 2),
    ((1, 1, 1, 1), 1, 2),
]
each_case = pytest.mark.parametrize(("shape", "outs", "stride"), CASES)


def out_shape(shape: tuple[int, ...], outs: int, stride: int) -> tuple[int, ...]:
    return (shape[0], outs, -(-shape[2] // stride), -(-shape[3] // stride))


@each_mode
@each_case
def test_forward(mode, shape, outs, stride):
    bench = Bench(mode)
    x, y = bench.draw(*shape), bench.out_image(out_shape(shape, outs, stride))
    ops.forward(bench.plan, "shortcut", bench.image(x), y, stride)
    bench.run()
    bench.assert_exact(y, reference.shortcut_forward(x, outs, stride))


@each_mode
@each_case
def test_backward(mode, shape, outs, stride):
    bench = Bench(mode)
    dy, dx = bench.draw(*out_shape(shape, outs, stride)), bench.out_image(shape)
    dy[:, shape[1] :] = np.inf  # channels that only y has: not even an overflow leaves a trace
    ops.backward(bench.plan, "shortcut", bench.image(dy), dx, stride)
    bench.run()
    bench.assert_exact(dx, reference.shortcut_backward(dy, shape, stride))
