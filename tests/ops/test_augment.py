"""Augmentation: which pixels are taken is exact; their values are rounded a few times in fp32, then to storage."""

import numpy as np
import pytest
from harness import EPS16, Bench, assert_close, each_mode, tolerance

from dpresnet import reference
from dpresnet.ops import augment as ops

SEED, EPOCH = 0xDEADBEEF, 7
MANY = 50  # samples, among which every shift occurs
SHAPES = [(MANY, 3, 8, 11), (MANY, 1, 5, 4), (2, 16, 3, 3), (9, 9, 2, 2)]


def normalise(
    bench: Bench, images: np.ndarray, samples: np.ndarray, padding: int, flip: bool, **control: int
) -> np.ndarray:
    x, y = bench.array(images, np.uint8), bench.out_image(images.shape)
    told = bench.control(seed=SEED, epoch=EPOCH, **control)
    constants = moments(images.shape[1])
    ops.normalise(bench.plan, "augment", x, bench.array(samples, np.uint32), y, told, *constants, padding, flip)
    bench.run()
    return bench.read(y)


def moments(channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each channel; powers of two, so that no constant is rounded."""
    return 0.125 + 0.0625 * np.arange(channels), 2.0 ** -(np.arange(channels) % 4)


def draw_images(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Images and the numbers of their samples, some beyond 2^31."""
    rng = np.random.default_rng(3)
    return rng.integers(0, 256, shape, np.uint8), rng.integers(0, 2**32, shape[0], np.uint32)


def check(mode, actual: np.ndarray, expected: np.ndarray) -> None:
    """fp32: four roundings. fp16: half a unit in the last place of each value, besides."""
    arithmetic = tolerance(np.dtype(np.float32), 4)
    if mode.storage == np.float32:
        assert_close(actual, expected, arithmetic)
    else:
        limit = EPS16 * np.abs(expected) + arithmetic * np.abs(expected).max()
        assert (np.abs(actual.astype(np.float64) - expected) <= limit).all()


@each_mode
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("padding", "flip"), [(0, False), (0, True), (4, False), (4, True), (1, True)])
def test_training(mode, shape, padding, flip):
    images, samples = draw_images(shape)
    actual = normalise(Bench(mode), images, samples, padding, flip, augment=1, valid=shape[0])
    dy, dx, mirrored = reference.augment_parameters(SEED, EPOCH, samples, padding)
    check(mode, actual, reference.augment_apply(images, dy, dx, mirrored * flip, *moments(shape[1])))
    if shape[0] == MANY:
        assert {*dy} == {*dx} == {*range(-padding, padding + 1)} and {*mirrored} == {0, 1}


@each_mode
@pytest.mark.parametrize("shape", SHAPES)
def test_evaluation_takes_images_as_they_are(mode, shape):
    images, samples = draw_images(shape)
    actual = normalise(Bench(mode), images, samples, 4, True, augment=0, valid=shape[0])
    still = np.zeros(shape[0], int)
    check(mode, actual, reference.augment_apply(images, still, still, still, *moments(shape[1])))


@each_mode
@pytest.mark.parametrize("valid", [0, 5])
def test_images_that_do_not_count_are_black(mode, valid):
    images, samples = draw_images((8, 3, 6, 5))
    actual = normalise(Bench(mode), images, samples, 2, True, augment=1, valid=valid)
    dy, dx, mirrored = reference.augment_parameters(SEED, EPOCH, samples, 2)
    images[valid:] = 0
    check(mode, actual, reference.augment_apply(images, dy, dx, mirrored, *moments(3)))
