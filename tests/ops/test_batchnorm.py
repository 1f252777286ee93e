"""Batch normalisation with what follows it: statistics, application and gradient, each with and without a second branch and
ReLU, with short batches and with means far from zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from harness import EPS32, Bench, each_mode, tolerance

from dpresnet import reference
from dpresnet.device import BLOCK
from dpresnet.ops import batchnorm as ops
from dpresnet.ops import residual
from dpresnet.plan import Tensor, blocks_of
from dpresnet.syncbn import moments

SHAPES = [
    (5, 20, 6, 7),
    (3, 16, 1, 1),
    (4, 17, 3, 2),
    (2, 5, 40, 37),  # large and few: an image is cut in parts, the last one shorter
    (3, 1, 9, 8),
]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
each_valid = pytest.mark.parametrize("valid", [0, 1, 2])
each_relu = pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
each_residual = pytest.mark.parametrize("residual", [0, 1, 2], ids=["alone", "plus tensor", "plus norm"])
each_number_of_terms = pytest.mark.parametrize("count", [1, 2], ids=["one term", "two terms"])


@dataclass(frozen=True)
class Branch:
    """A normalisation in numbers."""

    x: np.ndarray
    moments: np.ndarray
    weight: np.ndarray
    bias: np.ndarray

    @classmethod
    def draw(cls, bench: Bench, shape: tuple[int, ...]) -> "Branch":
        x = bench.draw(*shape, mean=0.5)
        return cls(x, moments_of(x), bench.draw(shape[1]), bench.draw(shape[1]))

    def on(self, bench: Bench) -> ops.Affine:
        return ops.Affine(bench.image(self.x), *(bench.rows(a) for a in (self.moments, self.weight, self.bias)))

    @property
    def y(self) -> np.ndarray:
        return reference.batchnorm_apply(self.x, self.moments[0], self.moments[1] ** -2, self.weight, self.bias, eps=0)


def moments_of(x: np.ndarray) -> np.ndarray:
    """[2, C] = mean and 1 / deviation as the host would store them."""
    count, mean, m2 = reference.batchnorm_statistics(x)
    return np.stack([mean, 1 / np.sqrt(m2 / count + ops.EPS)]).astype(np.float32).astype(np.float64)


def with_rubbish(x: np.ndarray, valid: int) -> np.ndarray:
    """The images that do not count hold values that would show."""
    x[valid:] = 1000 * x[valid:] + 5000
    return x


def statistics(bench: Bench, x: np.ndarray, valid: int) -> Tensor:
    """Runs them; and where replicas need no host to be alone, its moments are there, to the bit."""
    merged = bench.out_rows(2, x.shape[1])
    alone = bench.scratch(merged.shape)
    ops.statistics(bench.plan, "bn", bench.image(x), merged, alone, bench.control(valid=valid))
    bench.run()
    if bench.plan.device.doubles:
        count = valid * x[0, 0].size
        expected = moments(np.concatenate([[count], *bench.stored(merged).astype(np.float64)]))
        np.testing.assert_array_equal(bench.stored(alone), expected.astype(np.float32))
    return merged


def add_images(bench: Bench, partial: Tensor, outputs: Sequence[Tensor], pixels: int, valid: int) -> Tensor:
    """Appends the launch; returns where it leaves the means of a replica that is alone."""
    means = bench.scratch(outputs[0].shape)
    ops.add_images(bench.plan, "bn", partial, *outputs, means, bench.control(valid=valid), pixels)
    return means


def assert_means(bench: Bench, sums: Tensor, means: Tensor, count: int) -> None:
    """They are those of the host, to the bit."""
    if bench.plan.device.doubles:
        expected = bench.stored(sums).astype(np.float64) / max(count, 1)
        np.testing.assert_array_equal(bench.stored(means), expected.astype(np.float32))


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
@each_relu
@each_residual
def test_apply(mode, shape, relu, residual):
    bench = Bench(mode)
    first, z = Branch.draw(bench, shape), bench.out_image(shape)
    expected, second = first.y, None
    if residual == 1:
        r = bench.draw(*shape)
        expected, second = reference.residual_add(expected, r), bench.image(r)
    elif residual == 2:
        other = Branch.draw(bench, shape)
        expected, second = reference.residual_add(expected, other.y), other.on(bench)
    ops.apply(bench.plan, "bn", first.on(bench), second, relu, z)
    bench.run()
    bench.assert_close(z, reference.relu_forward(expected) if relu else expected, length=8)


@each_mode
@each_residual
def test_bad_values_stay_visible(mode, residual):
    """ReLU must not turn NaN into 0."""
    bench = Bench(mode)
    bad = np.array([np.nan, np.inf, -np.inf, -0.0, 1.0]).reshape(1, 5, 1, 1)
    ones, zeros, z = np.ones(5), np.zeros(5), bench.out_image(bad.shape)
    good, worse = (Branch(x, np.stack([zeros, ones]), ones, zeros) for x in (0 * ones.reshape(bad.shape), bad))
    second = [None, bench.image(bad), worse.on(bench)][residual]
    ops.apply(bench.plan, "bn", (good if residual else worse).on(bench), second, True, z)
    bench.run()
    bench.assert_exact(z, np.array([np.nan, np.inf, 0.0, 0.0, 1.0]).reshape(bad.shape))


@each_mode
@each_shape
def test_running(mode, shape):
    bench = Bench(mode)
    x, mean, weight, bias = (bench.draw(*s) for s in (shape, *[shape[1:2]] * 3))
    var, z = np.abs(bench.draw(shape[1])), bench.out_image(shape)
    var[0] = 0  # only eps is left
    source, moments = bench.image(x), bench.scratch((2, blocks_of(shape[1]) * BLOCK))
    ops.running(bench.plan, "bn.running", source, bench.rows(mean), bench.rows(var), moments)
    ops.apply(bench.plan, "bn", ops.Affine(source, moments, bench.rows(weight), bench.rows(bias)), None, False, z)
    bench.run()
    bench.assert_close(z, reference.batchnorm_apply(x, mean, var, weight, bias, ops.EPS), length=6)


@each_mode
@each_shape
@each_relu
@each_residual
@each_number_of_terms
def test_backward_reduce(mode, shape, relu, residual, count):
    """Without a residual the kernel finds the sign of z itself; with one it reads z, and stores the masked gradient."""
    bench = Bench(mode)
    branches = [Branch.draw(bench, shape) for _ in range(2 if residual == 2 else 1)]
    dz = [bench.draw(*shape) for _ in range(count)]
    y = bench.draw(*shape) if residual else branches[0].y
    for term in dz:
        term[np.abs(y) < 1e-5] = 0  # there rounding could decide
    z, gradient = reference.relu_forward(y), sum(dz)
    masked = reference.relu_backward(gradient, z) if relu else gradient
    sums = [tuple(bench.out_rows(*size) for size in ((2, shape[1]), shape[1:2], shape[1:2])) for _ in branches]
    partials = [bench.scratch((shape[0], *total.shape)) for total, *_ in sums]
    given = (bench.image(z), bench.out_image(shape)) if residual else (None, None)
    terms, affines = [bench.image(term) for term in dz], [branch.on(bench) for branch in branches]
    ops.backward_reduce(bench.plan, "bn", terms, affines, relu, partials, *given)
    valid = shape[0] - count  # in the end they count, the gradients of the others are zeros in a step
    pixels = shape[2] * shape[3]
    means = [add_images(bench, partial, outputs, pixels, valid) for partial, outputs in zip(partials, sums, strict=True)]
    bench.run()
    for branch, (total, dbias, dweight), mean in zip(branches, sums, means, strict=True):
        assert_means(bench, total, mean, valid * pixels)
        expected = reference.batchnorm_backward_reduce(masked, branch.x, *branch.moments)
        bench.assert_close(total, np.stack(expected), masked[:, 0].size)
        np.testing.assert_array_equal(bench.read(total), np.stack([bench.read(dbias), bench.read(dweight)]))
    if residual:
        bench.assert_exact(given[1], masked)


@each_mode
@each_shape
@pytest.mark.parametrize("residual", [1, 2])
def test_backward_reduce_of_a_given_sum(mode, shape, residual):
    """A convolution has masked and added the terms; g is read, and not written again."""
    bench = Bench(mode)
    branches, gradient = [Branch.draw(bench, shape) for _ in range(residual)], bench.draw(*shape)
    g, partials = bench.image(gradient), [bench.out_rows(shape[0], 2, shape[1]) for _ in branches]
    ops.backward_reduce(bench.plan, "bn", [g], [branch.on(bench) for branch in branches], False, partials, None, g)
    bench.run()
    for branch, partial in zip(branches, partials, strict=True):
        images = zip(gradient[:, None], branch.x[:, None], strict=True)
        expected = [np.stack(reference.batchnorm_backward_reduce(dz, x, *branch.moments)) for dz, x in images]
        bench.assert_close(partial, np.stack(expected), gradient[0, 0].size)
    bench.assert_exact(g, gradient)


@each_mode
@each_shape
@each_number_of_terms
def test_results_may_take_the_place_of_a_term(mode, shape, count):
    """Same bits as in memory of their own: g in that of the last term, and then dx in that of g."""

    def g_and_dx(in_place: bool) -> list[np.ndarray]:
        bench = Bench(mode)
        branch, z, mean = Branch.draw(bench, shape), bench.image(bench.draw(*shape)), bench.rows(bench.draw(2, shape[1]))
        terms = [bench.image(bench.draw(*shape)) for _ in range(count)]
        affine, partial = branch.on(bench), bench.out_rows(shape[0], 2, shape[1])
        g, dx = (terms[-1], terms[-1]) if in_place else (bench.out_image(shape), bench.out_image(shape))
        ops.backward_reduce(bench.plan, "bn", terms, [affine], True, [partial], z, g)
        kept = bench.out_image(shape)
        residual.add(bench.plan, "kept", g, bench.image(np.zeros(shape)), kept)
        ops.backward(bench.plan, "bn", [g], [affine], False, [mean], bench.control(valid=shape[0]), [dx])
        bench.run()
        return [bench.read(tensor) for tensor in (partial, kept, dx)]

    for apart, here in zip(g_and_dx(False), g_and_dx(True), strict=True):
        np.testing.assert_array_equal(here, apart)


@each_mode
@each_shape
def test_mask_is_where_the_output_is_positive(mode, shape):
    """Found again from the input, it is the same at every single pixel, also where the input to ReLU is exactly 0."""
    bench = Bench(mode)
    drawn = Branch.draw(bench, shape)
    branch = Branch(drawn.x, drawn.moments.astype(mode.storage).astype(np.float64), drawn.weight, drawn.bias)
    branch.bias[0] = 0
    branch.x[:, 0].flat[::3] = branch.moments[0, 0]
    affine, ones, z = branch.on(bench), bench.image(np.ones(shape)), bench.out_image(shape)
    outputs = [bench.out_rows(*size) for size in ((2, shape[1]), shape[1:2], shape[1:2])]
    means = bench.rows(np.zeros((2, shape[1])))
    dx = bench.out_image(shape)
    ops.apply(bench.plan, "bn", affine, None, True, z)
    partial = bench.scratch((shape[0], *outputs[0].shape))
    ops.backward_reduce(bench.plan, "bn", [ones], [affine], True, [partial])
    add_images(bench, partial, outputs, shape[2] * shape[3], shape[0])
    ops.backward(bench.plan, "bn", [ones], [affine], True, [means], bench.control(valid=shape[0]), [dx])
    bench.run()
    positive = bench.read(z) > 0
    np.testing.assert_array_equal(bench.read(outputs[1]), positive.sum(axis=(0, 2, 3)))
    np.testing.assert_array_equal(bench.read(dx) != 0, positive)
    assert 0 < positive[:, 0].sum() < positive[:, 0].size or positive[:, 0].size < 4


@each_mode
@each_shape
@pytest.mark.parametrize("valid", [0, 2])
@pytest.mark.parametrize(("relu", "branches", "count"), [
    (False, 1, 1), (False, 1, 2), (True, 1, 1), (True, 1, 2), (False, 2, 1),
])  # fmt: skip
def test_backward(mode, shape, valid, relu, branches, count):
    """The sums come from elsewhere: all replicas have their part in them. Images that do not count get zeros."""
    bench = Bench(mode)
    drawn, mean_dz = [Branch.draw(bench, shape) for _ in range(branches)], bench.draw(shape[1])
    means = [np.stack([mean_dz, bench.draw(shape[1])]) for _ in drawn]  # the branches have the same gradient
    dz, y = [bench.draw(*shape) for _ in range(count)], drawn[0].y
    for term in dz:
        term[np.abs(y) < 1e-5] = 0  # there rounding could decide
    masked = reference.relu_backward(sum(dz), y) if relu else sum(dz)
    dxs, control = [bench.out_image(shape) for _ in drawn], bench.control(valid=valid)
    terms, affines = [bench.image(term) for term in dz], [branch.on(bench) for branch in drawn]
    ops.backward(bench.plan, "bn", terms, affines, relu, [bench.rows(mean) for mean in means], control, dxs)
    bench.run()
    for branch, mean, dx in zip(drawn, means, dxs, strict=True):
        expected = reference.batchnorm_backward(masked, branch.x, *branch.moments, branch.weight, *mean, 1, valid)
        bench.assert_close(dx, expected, length=8)
        assert not bench.read(dx)[valid:].any()


@each_mode
@each_shape
def test_large_results_are_stored_past_the_caches_with_the_same_bits(monkeypatch, mode, shape):
    """Unless they take the place of what is read."""

    def results() -> tuple[list[np.ndarray], list[int]]:
        bench = Bench(mode)
        branch, z, dx = Branch.draw(bench, shape).on(bench), bench.out_image(shape), bench.out_image(shape)
        mean, control, dz = bench.rows(bench.draw(2, shape[1])), bench.control(valid=shape[0]), bench.image(bench.draw(*shape))
        ops.apply(bench.plan, "bn", branch, None, True, z)
        ops.backward(bench.plan, "bn", [dz], [branch], True, [mean], control, [dx])
        ops.backward(bench.plan, "bn", [dz], [branch], True, [mean], control, [dz])
        bench.run()
        return [bench.stored(tensor) for tensor in (z, dx, dz)], [dict(entry.defines)["LARGE"] for entry in bench.plan.entries]

    (usual, small), _ = results(), monkeypatch.setattr(ops, "LAST_LEVEL_BYTES", 0)
    past, large = results()
    assert (small, large) == ([0, 0, 0], [1, 1, 0])
    np.testing.assert_array_equal(past, usual)


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
    affine, partial = ops.Affine(source, shared, second.rows(weight), second.rows(bias)), second.scratch((4, *sums.shape))
    ops.apply(second.plan, "bn", affine, None, False, y)
    ops.backward_reduce(second.plan, "bn", [second.image(dy)], [affine], False, [partial])
    alone = add_images(second, partial, (sums, dbias, dweight), 30, valid)
    second.run()
    assert_means(second, sums, alone, count)

    third = Bench(mode)
    dx, means = third.out_image(x.shape), third.rows(second.read(sums) / count)
    affine = ops.Affine(third.image(x), third.rows(moments), third.rows(weight), third.rows(bias))
    ops.backward(third.plan, "bn", [third.image(dy)], [affine], False, [means], third.control(valid=valid), [dx])
    third.run()

    invstd = 1 / np.sqrt(m2 / count + ops.EPS)
    both = reference.batchnorm_backward_reduce(dy, x, mean, invstd, valid)
    second.assert_close(y, reference.batchnorm_apply(x, mean, m2 / count, weight, bias, ops.EPS), count)
    second.assert_close(sums, np.stack(both), count)
    third.assert_close(dx, reference.batchnorm_backward(dy, x, mean, invstd, weight, *both, count, valid), count)
