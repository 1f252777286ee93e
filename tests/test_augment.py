"""What is drawn for a sample: a pure function of (seed, epoch, sample), in its ranges and as often as it should be."""

from math import sqrt

import numpy as np
import pytest

from dpresnet import augment
from dpresnet import reference_augment as ref
from dpresnet.augment import VIEW, Augmentation, Dice
from dpresnet.errors import Refused

MANY = 20_000
EVERYTHING = {"resized": 0.08, "flip": True, "jitter": 0.4, "erase": 0.5, "cutout": 5, "mixup": 0.4, "cutmix": 1.0}


def draw(seed: int = 0, epoch: int = 0, count: int = MANY, stored: tuple[int, int, int] = (3, 24, 40),
         size: tuple[int, int] = (0, 0), **options: object) -> np.ndarray:  # fmt: skip
    indices, images = np.arange(count), np.zeros((count, stored[0], 1, 1), np.uint8)
    return Augmentation(stored, size if any(size) else stored[1:], **options).drawn(seed, epoch, indices, images)


def assert_mean(values: np.ndarray, expected: float) -> None:
    """Within five deviations of the mean of so many."""
    assert abs(values.mean() - expected) < 5 * values.std() / sqrt(len(values)), (values.mean(), expected)


def assert_uniform(values: np.ndarray, low: float, high: float) -> None:
    """All twenty equal parts of the range have their share, and it is not left."""
    counts, _ = np.histogram(values, 20, (low, high))
    assert counts.sum() == len(values)
    assert np.all(np.abs(counts - len(values) / 20) < 5 * sqrt(len(values) / 20))


# The hash, and crop and flip, which recorded runs rely on


def mix_by_definition(x: int) -> int:
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


@pytest.mark.parametrize("mix", [augment.mixed, ref.augment_mix])
def test_hash_equals_its_definition_and_collides_nowhere(mix):
    x = np.array([0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 123456789], dtype=np.uint32)
    assert mix(x).tolist() == [mix_by_definition(int(value)) for value in x]
    assert mix(x.astype(np.int64)).tolist() == mix(x).tolist()
    assert len(np.unique(mix(np.arange(1 << 16)))) == 1 << 16


def test_crop_and_flip_are_a_function_of_the_low_bits_of_seed_epoch_and_index():
    index = np.array([7, 2**32 + 7, 0, 4_000_000_000])
    keys = [mix_by_definition(3 ^ mix_by_definition(5 ^ mix_by_definition(int(i) % 2**32))) for i in index]
    dy, dx, flip = ref.augment_parameters(2**32 + 3, 5, index, padding=4)
    views = Augmentation((3, 24, 40), (24, 40), padding=4, flip=True).drawn(2**32 + 3, 5, index, None)
    assert dy.tolist() == views["crop_top"].tolist() == [mix_by_definition(key ^ 1) % 9 - 4 for key in keys]
    assert dx.tolist() == views["crop_left"].tolist() == [mix_by_definition(key ^ 2) % 9 - 4 for key in keys]
    assert flip.tolist() == views["flip"].tolist() == [mix_by_definition(key ^ 3) & 1 for key in keys]


def test_views_are_pinned():
    """These constants are promises: a run that is resumed by a later version goes on with the same views."""
    images = np.arange(2 * 3 * 32 * 32).reshape(2, 3, 32, 32).astype(np.uint8)
    views = Augmentation((3, 32, 32), (24, 24), **EVERYTHING).drawn(5, 2, np.array([11, 2**31 + 3]), images)
    assert [[round(float(value), 6) for value in row] for row in views.tolist()] == PINNED


PINNED = [
    [2, 11, 20, 18, 1, 1.391107, 1.373598, 1.08784, 127.5, 0, 0, 0, 0, 3, 6, 5, 5, 14, 0, 10, 14, 1, 0.756944],
    [1, 0, 22, 20, 0, 0.690504, 1.031962, 1.138514, 127.5, 11, 8, 6, 16, 14, 5, 5, 5, 0, 0, 18, 20, 0, 0.375],
]  # fmt: skip


def test_crops_are_spread_evenly_and_differ_between_seeds_and_epochs():
    draws = [draw(seed, epoch, 9000, padding=1, flip=True)[["crop_top", "crop_left", "flip"]]
             for seed, epoch in ((0, 0), (0, 1), (1, 0))]  # fmt: skip
    for kinds, counts in (np.unique(kind, return_counts=True) for kind in draws):
        assert len(kinds) == 18  # 3 rows, 3 columns, flipped or not: 500 of each, with a deviation of 22
        assert np.all(np.abs(counts - 500) < 5 * 22)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs((draws[one] == draws[other]).mean() - 1 / 18) < 0.02


@pytest.mark.parametrize(("options", "border"), [
    ({}, 3), ({"padding": 0}, 0), ({"padding": 7}, 7), ({"size": (20, 20)}, 0), ({"size": (24, 24)}, 0),
    ({"size": (20, 20), "padding": 2}, 2), ({"stored": (1, 5, 5)}, 1),
])  # fmt: skip
def test_crops_reach_the_whole_border_and_nothing_beyond(options, border):
    """By default an eighth of the image, at least a pixel, where it is taken whole."""
    views = draw(count=5000, **options)
    stored = options.get("stored", (3, 24, 40))
    size = options.get("size", stored[1:])
    for axis, field in enumerate(("crop_top", "crop_left")):
        assert {*views[field]} == {*range(-border, stored[1 + axis] - size[axis] + border + 1)}


# A row depends on its own sample


@pytest.mark.parametrize("options", [EVERYTHING, {"jitter": 0.4, "cutout": 2}])
def test_a_sample_looks_the_same_in_any_batch_but_for_its_partner(options):
    indices = np.random.default_rng(1).permutation(500)
    images = np.random.default_rng(2).integers(0, 256, (500, 3, 9, 7), np.uint8)
    wanted = Augmentation((3, 9, 7), (9, 7), **options)
    whole = wanted.drawn(3, 4, indices, images)
    parts = np.concatenate([wanted.drawn(3, 4, indices[n : n + 7], images[n : n + 7]) for n in range(0, 500, 7)])
    for name in VIEW.names:
        if name != "partner":
            np.testing.assert_array_equal(whole[name], parts[name], err_msg=name)
    for other in (wanted.drawn(3, 5, indices, images), wanted.drawn(4, 4, indices, images)):
        assert (other == whole).mean() < 0.01


def test_partners_are_neighbours_in_a_ring():
    assert draw(count=4, mixup=1.0)["partner"].tolist() == [1, 2, 3, 0]
    assert draw(count=1, mixup=1.0)["partner"].tolist() == [0]
    assert len(draw(count=0, **EVERYTHING)) == 0


@pytest.mark.parametrize("options", [EVERYTHING, {}])
def test_disabled_is_the_middle_of_the_image_and_nothing_else(options):
    views = draw(count=9, size=(20, 30), enabled=False, **options)
    wanted = Augmentation((3, 24, 40), (20, 30), enabled=False, **options)
    np.testing.assert_array_equal(views, wanted.centred(np.arange(9), None))
    assert not any(wanted.features.values()) and not wanted.mixes
    assert views[0].tolist() == (2, 5, 20, 30, 0, 1, 1, 1, 0, *[0] * 12, 0, 1)


def test_views_larger_than_the_images_are_refused():
    with pytest.raises(Refused, match="--crop-size 33 is larger than the stored images of 32 x 48 pixels: use at most 32"):
        Augmentation((3, 32, 48), (33, 33))


# Statistics


@pytest.mark.parametrize("stored", [(3, 224, 224), (3, 200, 300)])
def test_resized_crops_have_the_area_and_aspect_of_the_paper(stored):
    views = draw(stored=stored, resized=0.08)
    height, width = (views[f"crop_{part}"].astype(float) for part in ("height", "width"))
    whole = stored[1] * stored[2]
    aspect, area = width / height, height * width / whole
    assert np.all((area > 0.078) & (area <= 1)) and np.all((aspect > 0.74) & (aspect < 1.36))  # of whole pixels
    assert np.all(views["crop_top"] >= 0) and np.all(views["crop_top"] + height <= stored[1])
    assert np.all(views["crop_left"] >= 0) and np.all(views["crop_left"] + width <= stored[2])
    small = area < 0.5  # those always fit
    assert_uniform(area[small], 0.078, 0.5)
    lying = aspect[small & (aspect > 1)]
    assert_uniform(np.minimum(lying, 4 / 3), 1, 4 / 3)
    assert abs(len(lying) / small.sum() - 0.5) < 0.02
    room = stored[1] - height[small]
    assert_mean(views["crop_top"][small] / room, 0.5)


STRIPS = {(1, 1, 1): (0, 0, 1, 1), (1, 3, 40): (0, 18, 3, 4), (1, 40, 3): (18, 0, 4, 3)}


@pytest.mark.parametrize(("stored", "box"), STRIPS.items())
def test_resized_crops_that_cannot_fit_take_the_middle(stored, box):
    """1 pixel, and strips of which all is much too wide, or too tall."""
    views = draw(stored=stored, resized=1.0)
    assert {row.tolist()[:4] for row in views} == {box}


def test_factors_are_uniform_and_independent():
    views = draw(jitter=0.4)
    for name in ("brightness", "contrast", "saturation"):
        assert_uniform(views[name], np.float32(0.6), np.float32(1.4))
    found = np.corrcoef([views[name] for name in ("brightness", "contrast", "saturation")])
    assert np.all(np.abs(found - np.eye(3)) < 5 / sqrt(MANY))


@pytest.mark.parametrize("channels", [1, 2, 3, 16])
def test_grey_is_the_mean_luma_of_the_stored_image(channels):
    images = np.random.default_rng(0).integers(0, 256, (5, channels, 9, 7), np.uint8)
    views = Augmentation((channels, 9, 7), (4, 4), jitter=0.1).drawn(0, 0, np.arange(5), images)
    expected = ref.augment_luma(images.astype(float)).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(views["grey"], expected, rtol=2.0**-23)


def test_erased_boxes_are_those_of_the_paper():
    views = draw(stored=(3, 200, 240), erase=0.3)
    erased = views[views["erased_height"] > 0]
    assert abs(len(erased) / MANY - 0.3) < 5 * sqrt(0.3 * 0.7 / MANY)
    top, left, height, width = (erased[f"erased_{part}"].astype(float) for part in ("top", "left", "height", "width"))
    area, aspect = height * width / (200 * 240), height / width
    assert np.all((top >= 0) & (left >= 0) & (top + height <= 200) & (left + width <= 240))
    assert np.all((area > 0.019) & (area < 0.41) & (aspect > 0.29) & (aspect < 3.5))
    assert area.min() < 0.025 and area.max() > 0.35 and aspect.min() < 0.35 and aspect.max() > 3


def test_erasing_takes_the_first_box_that_fits():
    """Zhong et al. 2017, algorithm 1, one sample at a time."""
    size, found = (32, 20), draw(9, 8, 300, (3, 32, 20), erase=1.0)
    dice = Dice(9, 8, np.arange(300))
    numbers = {k: [int(v) for v in dice.bits(k)] for k in range(128, 256)}
    for n, view in enumerate(found):
        expected = (0, 0, 0, 0)
        for first in range(128, 256, 4):
            area, aspect, y, x = (numbers[first + k][n] for k in range(4))
            area, aspect = (0.02 + 0.38 * area / 2**32) * 640, 0.3 + (1 / 0.3 - 0.3) * aspect / 2**32
            h, w, y, x = round(sqrt(area * aspect)), round(sqrt(area / aspect)), y % 32, x % 20
            if y + h <= size[0] and x + w <= size[1]:
                expected = (y, x, h, w)
                break
        assert tuple(int(view[f"erased_{part}"]) for part in ("top", "left", "height", "width")) == expected


@pytest.mark.parametrize("side", [1, 4, 5, 100])
def test_cutout_is_a_square_around_every_pixel_alike_and_cut_off_at_the_border(side):
    views = draw(stored=(3, 6, 8), cutout=side)
    for part, extent, limit in (("top", "height", 6), ("left", "width", 8)):
        whole = [range(centre - side // 2, centre - side // 2 + side) for centre in range(limit)]
        seen = [[pixel for pixel in pixels if 0 <= pixel < limit] for pixels in whole]
        expected, counts = np.unique([(pixels[0], len(pixels)) for pixels in seen], axis=0, return_counts=True)
        pairs = np.stack([views[f"cutout_{part}"], views[f"cutout_{extent}"]], axis=1)
        found, frequency = np.unique(pairs, axis=0, return_counts=True)
        np.testing.assert_array_equal(found, expected)
        assert np.all(np.abs(frequency / MANY - counts / limit) < 5 * sqrt(0.25 / MANY))


DISTRIBUTIONS = {
    0.5: lambda x: 2 / np.pi * np.arcsin(np.sqrt(x)),
    1.0: lambda x: x,
    2.0: lambda x: 3 * x**2 - 2 * x**3,
    3.0: lambda x: 10 * x**3 - 15 * x**4 + 6 * x**5,
}


@pytest.mark.parametrize("a", DISTRIBUTIONS)
def test_beta_has_its_distribution_function(a):
    """To the last of 32 bits."""
    edges = (np.arange(4096) + 0.5) / 4096
    np.testing.assert_allclose(augment.beta_quantiles(a), DISTRIBUTIONS[a](edges) * 2**32, atol=0.75, rtol=0)


@pytest.mark.parametrize("a", [0.01, 0.2, 1.0, 4.0, 100.0])
def test_shares_of_mixup_have_the_moments_of_beta(a):
    share = draw(mixup=a)["share"].astype(float)
    np.testing.assert_array_equal(share, np.rint(share * 4096) / 4096)
    assert share.min() >= 0 and share.max() <= 1
    assert_mean(share, 0.5)
    assert_mean((share - 0.5) ** 2, 1 / (4 * (2 * a + 1)))
    assert_mean((share - 0.5) ** 4, 3 / (16 * (2 * a + 1) * (2 * a + 3)))


@pytest.mark.parametrize("size", [(24, 40), (1, 1), (7, 3)])
def test_shares_of_cutmix_are_the_areas_that_are_left(size):
    views = draw(stored=(3, *size), cutmix=1.0)
    mask = [ref.augment_inside(*(int(view[f"pasted_{part}"]) for part in ("top", "left", "height", "width")), size).mean()
            for view in views[:500]]  # fmt: skip
    np.testing.assert_array_equal(views["share"][:500], np.float32(1 - np.array(mask)))
    for part, extent, limit in (("top", "height", size[0]), ("left", "width", size[1])):
        assert np.all((views[f"pasted_{part}"] >= 0) & (views[f"pasted_{part}"] + views[f"pasted_{extent}"] <= limit))


def test_cutmix_boxes_have_the_size_of_the_paper():
    """Where the border cuts nothing off, the area is 1 - lambda of the image, and lambda is uniform for Beta(1, 1)."""
    views = draw(stored=(3, 400, 600), cutmix=1.0)
    height, width = views["pasted_height"] / 400, views["pasted_width"] / 600
    clear = (views["pasted_top"] > 0) & (views["pasted_left"] > 0) & (height * 400 + views["pasted_top"] < 400)
    clear &= width * 600 + views["pasted_left"] < 600
    assert clear.sum() > 1000
    np.testing.assert_allclose(height[clear], width[clear], atol=0.002)
    lam = augment.beta(1.0, Dice(0, 0, np.arange(MANY)).bits(augment.SHARE))
    np.testing.assert_allclose((height * width)[clear], 1 - lam[clear], atol=0.002)
    assert np.all(height * width <= 1 - lam + 0.002)


def test_of_both_mixes_each_sample_gets_one():
    views, blended, pasted = draw(mixup=0.4, cutmix=1.0), draw(mixup=0.4), draw(cutmix=1.0)
    from_mixup, from_cutmix = views == blended, views == pasted
    assert np.all(from_mixup | from_cutmix)
    assert abs(from_cutmix.mean() - 0.5) < 5 * sqrt(0.25 / MANY)
