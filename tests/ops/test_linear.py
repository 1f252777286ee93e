"""The classifier: outputs, both gradients and the packed weights."""

import numpy as np
import pytest
from harness import Bench, each_mode

from dpresnet import reference
from dpresnet.ops import linear as ops
from dpresnet.plan import Tensor, blocks_of

CASES = [(5, 64, 10), (1, 1, 1), (3, 20, 17), (2, 33, 16), (7, 128, 100)]  # (images, features, classes)
CASES += [(1, 64, 17), (8, 144, 33), (9, 16, 10), (9, 272, 37), (17, 64, 17), (35, 160, 10)]  # what tiles leave over
each_case = pytest.mark.parametrize(("images", "features", "classes"), CASES)


def packed_weights(bench: Bench, w: np.ndarray) -> Tensor:
    classes, features = w.shape
    packed = bench.scratch((classes, 16 * blocks_of(features)))
    ops.pack(bench.plan, "pack", bench.array(w), packed, features)
    return packed


@each_mode
@each_case
def test_forward(mode, images, features, classes):
    bench = Bench(mode)
    x, w, b = bench.draw(images, features), bench.draw(classes, features), bench.draw(classes)
    y = bench.out_rows(images, classes)
    ops.forward(bench.plan, "fc", bench.image(x[:, :, None, None]), packed_weights(bench, w), bench.array(b), y)
    bench.run()
    bench.assert_close(y, reference.linear_forward(x, w, b), features + 1)


@each_mode
@each_case
def test_backward_data(mode, images, features, classes):
    bench = Bench(mode)
    dy, w = bench.draw(images, classes), bench.draw(classes, features)
    dx = bench.out_image((images, features, 1, 1))
    ops.backward_data(bench.plan, "fc", bench.rows(dy), packed_weights(bench, w), dx)
    bench.run()
    bench.assert_close(dx, reference.linear_backward_data(dy, w)[:, :, None, None], classes)


@each_mode
@each_case
def test_backward_weight(mode, images, features, classes):
    bench = Bench(mode)
    dy, x = bench.draw(images, classes), bench.draw(images, features)
    dw, db = bench.out_array(classes, features), bench.out_array(classes)
    ops.backward_weight(bench.plan, "fc", bench.rows(dy), bench.image(x[:, :, None, None]), dw, db, classes)
    bench.run()
    for actual, expected in zip((dw, db), reference.linear_backward_weight(dy, x), strict=True):
        bench.assert_close(actual, expected, images)


@each_mode
@each_case
def test_packed_weights_are_the_nearest_the_storage_holds(mode, images, features, classes):
    bench = Bench(mode)
    w = np.random.default_rng(images).normal(size=(classes, features)).astype(np.float32)
    packed = bench.out_rows(classes, features)
    ops.pack(bench.plan, "pack", bench.array(w), packed, features)
    bench.run()
    bench.assert_exact(packed, w.astype(mode.storage))


@each_mode
def test_sums_do_not_depend_on_the_images_beside_them(mode):
    """A batch of 9 is two tiles and a remainder, of 1 a tile of its own: the same sums in the same order."""
    images, features, classes = 9, 144, 21
    draw = Bench(mode)
    x, dy, w, b = (draw.draw(*shape) for shape in ((images, features), (images, classes), (classes, features), (classes,)))

    def run(part: slice) -> tuple[np.ndarray, np.ndarray]:
        bench = Bench(mode)
        packed, inputs = packed_weights(bench, w), bench.image(x[part, :, None, None])
        y, dx = bench.out_rows(len(x[part]), classes), bench.out_image((len(x[part]), features, 1, 1))
        ops.forward(bench.plan, "fc", inputs, packed, bench.array(b), y)
        ops.backward_data(bench.plan, "fc.dx", bench.rows(dy[part]), packed, dx)
        bench.run()
        return bench.read(y), bench.read(dx)

    whole = run(slice(None))
    for n in (0, 5, 8):
        for together, alone in zip(whole, run(slice(n, n + 1)), strict=True):
            np.testing.assert_array_equal(together[n : n + 1], alone)

