"""Augmentation: which pixels are taken is exact; their values are rounded a few times in fp32, then to storage."""

from dataclasses import replace

import numpy as np
import pytest
from harness import EPS16, Bench, Mode, assert_close, each_mode, struct_in, tolerance

from dpresnet import reference_augment as reference
from dpresnet.augment import VIEW, Augmentation
from dpresnet.ops import augment as ops

SEED, EPOCH = 0xDEADBEEF, 7
MANY = 50  # samples, among which every shift occurs
SHAPES = [(MANY, 3, 8, 11), (MANY, 1, 5, 4), (2, 16, 3, 3), (9, 9, 2, 2), (3, 3, 1, 1)]
EVERYTHING = {"resized": 0.08, "flip": True, "jitter": 0.9, "erase": 0.6, "cutout": 3, "mixup": 0.7, "cutmix": 1.0}


def normalise(
    bench: Bench, images: np.ndarray, views: np.ndarray, wanted: Augmentation, valid: int | None = None
) -> np.ndarray:
    """Views [N, C, *size] from the device; those beyond ``valid`` do not count."""
    x, y = bench.array(images, np.uint8), bench.out_image((*images.shape[:2], *wanted.size))
    control = bench.control(valid=len(images) if valid is None else valid)
    table = bench.array(views, VIEW)
    ops.normalise(bench.plan, "augment", x, table, y, control, *moments(images.shape[1]), **wanted.features)
    bench.run()
    return bench.read(y)


def moments(channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each channel; powers of two, so that no constant is rounded."""
    return 0.125 + 0.0625 * np.arange(channels), 2.0 ** -(np.arange(channels) % 4)


def draw_images(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Images and the numbers of their samples, some beyond 2^31."""
    rng = np.random.default_rng(3)
    return rng.integers(0, 256, shape, np.uint8), rng.integers(0, 2**32, shape[0])


def expected(images: np.ndarray, views: np.ndarray, wanted: Augmentation) -> np.ndarray:
    constants = moments(images.shape[1])
    return reference.augment_apply(images, views, wanted.size, *constants, wanted.resized > 0, wanted.jitter > 0)


def check(mode: Mode, actual: np.ndarray, expected: np.ndarray, roundings: int = 4) -> None:
    """fp32: so many roundings. fp16: half a unit in the last place of each value, besides."""
    arithmetic = tolerance(np.dtype(np.float32), roundings)
    if mode.storage == np.float32:
        assert_close(actual, expected, arithmetic)
    else:
        limit = EPS16 * np.abs(expected) + arithmetic * np.abs(expected).max(initial=0.0)
        assert (np.abs(actual.astype(np.float64) - expected) <= limit).all()


def test_view_is_the_same_struct_on_both_sides():
    assert struct_in("augment", "View") == struct_in("loss", "View") == VIEW


@each_mode
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("padding", "flip"), [(0, False), (0, True), (4, False), (4, True), (1, True)])
def test_crops_and_flips(mode, shape, padding, flip):
    """Shifts and flips are those that the hash has always given."""
    images, samples = draw_images(shape)
    wanted = Augmentation(shape[1:], shape[2:], padding=padding, flip=flip)
    actual = normalise(Bench(mode), images, wanted.drawn(SEED, EPOCH, samples, images), wanted)
    dy, dx, mirrored = reference.augment_parameters(SEED, EPOCH, samples, padding)
    padded = np.pad(images / 255, [(0, 0), (0, 0), (padding, padding), (padding, padding)])
    for n, (image, mean, std) in enumerate((image, *np.array(moments(shape[1]))[..., None, None]) for image in padded):
        crop = image[:, padding + dy[n] :, padding + dx[n] :][:, : shape[2], : shape[3]]
        check(mode, actual[n], ((crop[:, :, ::-1] if flip and mirrored[n] else crop) - mean) / std)
    if shape[0] == MANY:
        assert {*dy} == {*dx} == {*range(-padding, padding + 1)} and {*mirrored} == {0, 1}


@each_mode
@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("padding", [0, 2])
def test_crops_of_larger_images(mode, shape, padding):
    images, samples = draw_images(shape)
    wanted = Augmentation(shape[1:], (3, 3), padding=padding, flip=True)
    views = wanted.drawn(SEED, EPOCH, samples, images)
    check(mode, normalise(Bench(mode), images, views, wanted), expected(images, views, wanted))


@each_mode
@pytest.mark.parametrize(("shape", "size"), [(shape, shape[2:]) for shape in SHAPES] + [((2, 3, 9, 6), (4, 4))])
def test_evaluation_takes_the_middle_as_it_is(mode, shape, size):
    images, samples = draw_images(shape)
    wanted = Augmentation(shape[1:], size, padding=4, flip=True)
    actual = normalise(Bench(mode), images, wanted.centred(samples, images), wanted)
    top, left = (shape[2] - size[0]) // 2, (shape[3] - size[1]) // 2
    middle = images[:, :, top : top + size[0], left : left + size[1]] / 255
    mean, std = np.array(moments(shape[1]))[..., None, None]
    check(mode, actual, (middle - mean) / std)


@each_mode
@pytest.mark.parametrize("options", [{}, {"jitter": 0.5}, EVERYTHING], ids=["crop", "jitter", "everything"])
@pytest.mark.parametrize("valid", [0, 5])
def test_images_that_do_not_count_are_black(mode, options, valid):
    """And are nobody's partners: the table has no rows for them."""
    images, samples = draw_images((8, 3, 6, 5))
    wanted = Augmentation((3, 6, 5), (6, 5), **options)
    views = np.zeros(8, VIEW)
    views[:valid] = wanted.drawn(SEED, EPOCH, samples[:valid], images[:valid])
    actual = normalise(Bench(mode), images, views, wanted, valid)
    mean, std = np.array(moments(3))[..., None, None]
    black = np.broadcast_to(-mean / std, (8 - valid, 3, 6, 5))
    check(mode, actual, np.concatenate([expected(images[:valid], views[:valid], wanted), black]), 64)


CASES = {
    "resize": {"resized": 0.08},
    "jitter": {"jitter": 1.0, "padding": 2},
    "erase": {"erase": 0.8, "flip": True},
    "cutout": {"cutout": 3},
    "mixup": {"mixup": 1.0, "flip": True},
    "cutmix": {"cutmix": 1.0, "padding": 1},
    "both mixes": {"mixup": 0.3, "cutmix": 2.0},
    "everything": EVERYTHING,
    "everything, cropped": EVERYTHING | {"resized": 0.0, "padding": 3},
}


OTHER_SHAPES = [(20, 1, 5, 4), (4, 16, 3, 3), (3, 9, 2, 2), (3, 3, 1, 1), (1, 2, 6, 3)]


@each_mode
@pytest.mark.parametrize(("shape", "options"), [
    *(pytest.param((20, 3, 8, 11), options, id=name) for name, options in CASES.items()),
    *(pytest.param(shape, EVERYTHING, id=f"{shape}") for shape in OTHER_SHAPES),
])  # fmt: skip
def test_each_change_alone_and_all_together(mode, shape, options):
    images, samples = draw_images(shape)
    wanted = Augmentation(shape[1:], shape[2:], **options)
    views = wanted.drawn(SEED, EPOCH, samples, images)
    check(mode, normalise(Bench(mode), images, views, wanted), expected(images, views, wanted), 64)


BOXES = [  # of a stored image of 13 x 17
    (0, 0, 13, 17), (0, 0, 1, 1), (12, 16, 1, 1), (3, 4, 7, 5), (0, 0, 13, 1), (5, 0, 1, 17), (2, 3, 5, 7), (1, 1, 12, 16),
]  # fmt: skip


@each_mode
@pytest.mark.parametrize("size", [(13, 17), (1, 1), (5, 7), (2, 3), (12, 4)])
def test_resizing_any_box(mode, size):
    """Enlarged, as it is, and reduced by up to 17."""
    images, _ = draw_images((2 * len(BOXES), 3, 13, 17))
    wanted = Augmentation((3, 13, 17), size, resized=0.08)
    views = wanted.centred(np.arange(len(images)), images)
    for part, values in zip(("top", "left", "height", "width"), np.array(BOXES * 2).T, strict=True):
        views[f"crop_{part}"] = values
    views["flip"][len(BOXES) :] = 1
    check(mode, normalise(Bench(mode), images, views, wanted), expected(images, views, wanted), 2 * (13 + 17))


@each_mode
def test_a_box_of_the_right_size_is_not_resized(mode):
    images, samples = draw_images((MANY, 3, 8, 11))
    plain = Augmentation((3, 8, 11), (5, 7), padding=0, flip=True)
    views = plain.drawn(SEED, EPOCH, samples, images)
    resized = normalise(Bench(mode), images, views, replace(plain, resized=0.5))
    np.testing.assert_array_equal(resized, normalise(Bench(mode), images, views, plain))


@each_mode
def test_holes_and_pastes_at_all_borders(mode):
    """Rectangles in every corner, over the whole and of a single pixel; what is pasted brings its own holes."""
    images, samples = draw_images((8, 3, 4, 5))
    wanted = Augmentation((3, 4, 5), (4, 5), erase=0.5, cutout=2, cutmix=1.0)
    views = wanted.centred(samples, images)
    corners = [(0, 0, 2, 2), (2, 3, 2, 2), (0, 3, 1, 2), (3, 0, 1, 3), (0, 0, 4, 5), (1, 2, 1, 1), (0, 0, 0, 0), (3, 4, 1, 1)]
    for name, shift in (("erased", 0), ("cutout", 1), ("pasted", 2)):
        for part, values in zip(("top", "left", "height", "width"), np.roll(corners, shift, axis=0).T, strict=True):
            views[f"{name}_{part}"] = values
    views["partner"] = np.roll(np.arange(8), -1)
    views["share"] = 1 - views["pasted_height"] * views["pasted_width"] / 20
    actual = normalise(Bench(mode), images, views, wanted)
    check(mode, actual, expected(images, views, wanted))
    np.testing.assert_array_equal(actual[4], np.zeros((3, 4, 5)))  # wholly erased, and where it is pasted so is its partner


@pytest.mark.parametrize("options", [{"flip": True}, EVERYTHING], ids=["crop", "everything"])
def test_bits_do_not_depend_on_the_vectors_and_storage_rounds_once(options):
    images, samples = draw_images((MANY, 3, 16, 11))
    wanted = Augmentation((3, 16, 11), (12, 9), **options)
    views = wanted.drawn(SEED, EPOCH, samples, images)
    found = {(precision, path): normalise(Bench(Mode(precision, path)), images, views, wanted)
             for precision in ("fp32", "fp16") for path in ("vector", "narrow", "scalar")}  # fmt: skip
    exact = found["fp32", "vector"]
    for (precision, _), actual in found.items():
        np.testing.assert_array_equal(actual, exact if precision == "fp32" else exact.astype(np.float16))
