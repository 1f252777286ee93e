"""How training looks at a stored image: the random numbers of augmentation, in a table with one row per sample.

There is no stream of random numbers: whatever is random about a sample is a hash of (seed, epoch, its index), so a resumed run
repeats it, and it does not matter which rank draws it. The table is made where batches are made; kernels/augment.cl applies it.
Nothing here depends on the mathematical library of a machine, but for quantiles that are rounded (`beta_quantiles`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from dpresnet.errors import Refused

Draws = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (indices, images) of n samples -> VIEW [n]


def box(name: str) -> list[tuple[str, type]]:
    """The fields of a rectangle in pixels: rows top to top + height, columns left to left + width."""
    return [(f"{name}_{part}", np.int32) for part in ("top", "left", "height", "width")]


VIEW = np.dtype([  # the struct of kernels/view.cl
    *box("crop"),  # of the stored image; beyond its border all is black
    ("flip", np.int32),
    ("brightness", np.float32), ("contrast", np.float32), ("saturation", np.float32),  # factors
    ("grey", np.float32),  # mean luma of the stored image, in 0..255; 0 without jitter
    *box("erased"), *box("cutout"),  # of the view; empty where there is none
    *box("pasted"),  # of the view, taken from the partner (cutmix); empty: all pixels are blended (mixup)
    ("partner", np.int32),  # index in the batch of the replica
    ("share", np.float32),  # of this sample in the target: 1 without a partner
])  # fmt: skip

MARGIN = -1  # padding: an eighth of the image, unless it is cropped in another way
CROP_ASPECT = 4 / 3  # Szegedy et al. 2015, section 6
ERASED_AREA, ERASED_ASPECT = (0.02, 0.4), (0.3, 1 / 0.3)  # Zhong et al. 2017, section 4.2
SHARES = 2**12  # steps of a share drawn from the beta distribution
LUMA = 299, 587, 114  # of red, green and blue, in thousandths: ITU-R BT.601

# What a number is drawn for. They are promises: a run that is resumed by a later version goes on with the same views.
ROW, COLUMN, FLIP = 1, 2, 3
BRIGHTNESS, CONTRAST, SATURATION = 4, 5, 6
CUTOUT_ROW, CUTOUT_COLUMN, ERASE = 7, 8, 9
METHOD, SHARE, PASTE_ROW, PASTE_COLUMN = 10, 11, 12, 13
CROP_TRIES = np.arange(64, 104, 4)[:, None]  # to find a box that fits, with four numbers each
ERASE_TRIES = np.arange(128, 256, 4)[:, None]  # of which about a quarter fits


@dataclass(frozen=True)
class Augmentation:
    """What training does to stored images of shape ``stored`` = (C, H, W); a network gets views of ``size`` = (height, width).

    ``padding``: black pixels around the image that random crops may reach, or MARGIN. ``resized``: smallest share of the
    area that a random resized crop takes; 0: none. ``jitter``: largest relative change of brightness, contrast and
    saturation. ``erase``: probability of random erasing. ``cutout``: side of a square hole. ``mixup``, ``cutmix``: parameter
    of the beta distribution. 0 turns each off, and ``enabled`` all of them together. Refused if the stored images are smaller
    than ``size``.
    """

    stored: tuple[int, int, int]
    size: tuple[int, int]
    enabled: bool = True
    padding: int = MARGIN
    resized: float = 0.0
    flip: bool = False
    jitter: float = 0.0
    erase: float = 0.0
    cutout: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        height, width = self.stored[1:]
        if self.size[0] > height or self.size[1] > width:
            raise Refused(f"--crop-size {max(self.size)} is larger than the stored images of {height} x {width} pixels: "
                          f"use at most {min(height, width)}, or 0 for all of them")  # fmt: skip

    @property
    def mixes(self) -> bool:
        """Whether samples are mixed, and so have two labels."""
        return self.enabled and (self.mixup > 0 or self.cutmix > 0)

    @property
    def features(self) -> dict[str, int]:
        """Which parts of the general kernel are needed: its defines. Crops and flips alone need none."""
        wanted = {
            "RESIZE": self.resized > 0,
            "JITTER": self.jitter > 0,
            "HOLES": self.erase > 0 or self.cutout > 0,
            "MIX": self.mixes,
        }
        return {name: int(self.enabled and value) for name, value in wanted.items()}

    @property
    def border(self) -> int:
        """Black pixels that crops may reach."""
        if self.padding != MARGIN:
            return self.padding
        whole = self.resized == 0 and self.size == self.stored[1:]
        return max(1, self.stored[1] // 8) if whole else 0

    def centred(self, indices: np.ndarray, images: np.ndarray) -> np.ndarray:
        """The middle of each image as it is, for evaluation: VIEW [n]."""
        views = np.zeros(len(indices), VIEW)
        for name in ("brightness", "contrast", "saturation", "share"):
            views[name] = 1
        stored, size = np.array(self.stored[1:]), np.array(self.size)
        views["crop_top"], views["crop_left"] = (stored - size) // 2
        views["crop_height"], views["crop_width"] = size
        views["partner"] = np.arange(len(indices))
        return views

    def drawn(self, seed: int, epoch: int, indices: np.ndarray, images: np.ndarray) -> np.ndarray:
        """How the samples ``indices`` int64 [n] look in an epoch: VIEW [n]; ``images`` uint8 [n, C, H, W] are theirs, stored.

        Mixing aside, a row depends on its own sample only; partners are neighbours in this batch.
        """
        views = self.centred(indices, images)
        if not self.enabled:
            return views
        dice = Dice(seed, epoch, indices)
        self._crop(views, dice)
        if self.flip:
            views["flip"] = dice.bits(FLIP) & 1
        if self.jitter:
            self._colour(views, dice, images)
        if self.cutout:
            self._square_hole(views, dice)
        if self.erase:
            self._random_hole(views, dice)
        if self.mixes:
            self._partners(views, dice)
        return views

    def _crop(self, views: np.ndarray, dice: Dice) -> None:
        if self.resized:
            set_box(views, "crop", resized_crops(dice, self.stored[1:], self.resized))
            return
        height, width = self.stored[1:]
        views["crop_top"] = dice.below(ROW, height - self.size[0] + 2 * self.border + 1) - self.border
        views["crop_left"] = dice.below(COLUMN, width - self.size[1] + 2 * self.border + 1) - self.border

    def _colour(self, views: np.ndarray, dice: Dice, images: np.ndarray) -> None:
        for name, number in (("brightness", BRIGHTNESS), ("contrast", CONTRAST), ("saturation", SATURATION)):
            views[name] = 1 + self.jitter * (2 * dice.uniform(number) - 1)
        views["grey"] = mean_luma(images)

    def _square_hole(self, views: np.ndarray, dice: Dice) -> None:
        """DeVries and Taylor 2017, section 3: centred anywhere in the image, and cut off at its border."""
        for part, extent, number, limit in (("top", "height", CUTOUT_ROW, self.size[0]),
                                            ("left", "width", CUTOUT_COLUMN, self.size[1])):  # fmt: skip
            centre = dice.below(number, limit)
            views[f"cutout_{part}"], views[f"cutout_{extent}"] = clipped(centre - self.cutout // 2, self.cutout, limit)

    def _random_hole(self, views: np.ndarray, dice: Dice) -> None:
        set_box(views, "erased", erased_boxes(dice, self.size) * (dice.uniform(ERASE) < self.erase))

    def _partners(self, views: np.ndarray, dice: Dice) -> None:
        """Mixup (Zhang et al. 2018, eq. 1) or cutmix (Yun et al. 2019, eq. 1 and 2) with the next sample of the batch."""
        views["partner"] = np.roll(np.arange(len(views)), -1)
        if self.mixup:
            views["share"] = beta(self.mixup, dice.bits(SHARE))
        if self.cutmix:
            pastes = dice.bits(METHOD) & 1 if self.mixup else np.ones(len(views), np.int64)
            side = np.sqrt(1 - beta(self.cutmix, dice.bits(SHARE)))
            for part, extent, number, limit in (("top", "height", PASTE_ROW, self.size[0]),
                                                ("left", "width", PASTE_COLUMN, self.size[1])):  # fmt: skip
                length = np.rint(side * limit).astype(np.int64)
                first, rest = clipped(dice.below(number, limit) - length // 2, length, limit)
                views[f"pasted_{part}"], views[f"pasted_{extent}"] = first * pastes, rest * pastes
            area = views["pasted_height"].astype(np.int64) * views["pasted_width"]
            views["share"] = np.where(pastes, 1 - area / (self.size[0] * self.size[1]), views["share"])


class Dice:
    """Random numbers of samples: 32 bits for every (seed, epoch, sample, number), the low 32 bits of each counting."""

    def __init__(self, seed: int, epoch: int, indices: np.ndarray):
        low = 0xFFFFFFFF
        sample = mixed(np.asarray(indices).astype(np.int64) & low)
        self._key = mixed((seed & low) ^ mixed((epoch & low) ^ sample))

    def bits(self, number: int | np.ndarray) -> np.ndarray:
        """int64 [n] in 0..2^32-1; for numbers [k, 1], [k, n]."""
        return mixed(self._key ^ number).astype(np.int64)

    def below(self, number: int | np.ndarray, limit: int | np.ndarray) -> np.ndarray:
        """The same in 0..limit-1; a value is likelier than another by at most limit / 2^32 of its chance."""
        return self.bits(number) % limit

    def uniform(self, number: int | np.ndarray) -> np.ndarray:
        """The same as float64 in [0, 1), multiples of 2^-32."""
        return self.bits(number) / 2**32


def mixed(x: np.ndarray) -> np.ndarray:
    """A full-avalanche hash of 32 bits: uint32 values in any integer type -> uint32.

    C. Wellons, "Prospecting for Hash Functions", lowbias32.
    """
    x = np.asarray(x).astype(np.uint32)
    x = (x ^ x >> np.uint32(16)) * np.uint32(0x7FEB352D)
    x = (x ^ x >> np.uint32(15)) * np.uint32(0x846CA68B)
    return x ^ x >> np.uint32(16)


def clipped(first: np.ndarray, length: int | np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The part of ``length`` pixels from ``first`` on that lies in 0..limit-1: its first pixel and length."""
    begin, end = np.clip(first, 0, limit), np.clip(first + length, 0, limit)
    return begin, end - begin


def set_box(views: np.ndarray, name: str, values: np.ndarray) -> None:
    """Sets the four fields of a rectangle: values [4, n]."""
    for (part, _), column in zip(box(name), values, strict=True):
        views[part] = column


def resized_crops(dice: Dice, stored: tuple[int, int], smallest: float) -> np.ndarray:
    """Top, left, height, width [4, n] of random crops, Szegedy et al. 2015, section 6: the area is uniform in smallest..1 of
    the image, the aspect (width / height) r or 1 / r, equally often, with r uniform in 1..4/3.

    Boxes that do not fit are drawn again; after ten, the largest box in the middle whose aspect is allowed is taken.
    """
    height, width = stored
    whole_h, whole_w = min(height, round(width * CROP_ASPECT)), min(width, round(height * CROP_ASPECT))
    area = (smallest + (1 - smallest) * dice.uniform(CROP_TRIES)) * height * width
    turn = 2 * dice.uniform(CROP_TRIES + 1) - 1
    stretch = 1 + (CROP_ASPECT - 1) * np.abs(turn)
    aspect = np.where(turn < 0, stretch, 1 / stretch)
    h, w = (np.rint(np.sqrt(side)).astype(np.int64) for side in (area / aspect, area * aspect))
    top = dice.below(CROP_TRIES + 2, np.maximum(height - h, 0) + 1)
    left = dice.below(CROP_TRIES + 3, np.maximum(width - w, 0) + 1)
    return first_that_fits(np.stack([top, left, h, w]), stored,
                           ((height - whole_h) // 2, (width - whole_w) // 2, whole_h, whole_w))  # fmt: skip


def erased_boxes(dice: Dice, size: tuple[int, int]) -> np.ndarray:
    """Top, left, height, width [4, n] of the boxes of random erasing, Zhong et al. 2017, algorithm 1: area and aspect
    (height / width) uniform in their ranges, the corner anywhere in the image, drawn again where the box does not fit.

    After 32 there is none. Sides are rounded to whole pixels.
    """
    height, width = size
    (low, high), (flat, tall) = ERASED_AREA, ERASED_ASPECT
    area = (low + (high - low) * dice.uniform(ERASE_TRIES)) * height * width
    aspect = flat + (tall - flat) * dice.uniform(ERASE_TRIES + 1)
    h, w = (np.rint(np.sqrt(side)).astype(np.int64) for side in (area * aspect, area / aspect))
    top, left = dice.below(ERASE_TRIES + 2, height), dice.below(ERASE_TRIES + 3, width)
    return first_that_fits(np.stack([top, left, h, w]), size, (0, 0, 0, 0))


def first_that_fits(boxes: np.ndarray, size: tuple[int, int], fallback: tuple[int, int, int, int]) -> np.ndarray:
    """Of boxes [4, tries, n], for each sample the first that holds a pixel and lies in the image, or the fallback: [4, n]."""
    top, left, h, w = boxes
    fits = (h > 0) & (w > 0) & (top + h <= size[0]) & (left + w <= size[1])
    first = boxes[:, fits.argmax(axis=0), np.arange(fits.shape[1])]
    return np.where(fits.any(axis=0), first, np.array(fallback)[:, None])


def mean_luma(images: np.ndarray) -> np.ndarray:
    """The mean over all pixels of uint8 [n, C, H, W] of `LUMA`, or of all channels alike unless there are 3: float32 [n]."""
    channels, height, width = images.shape[1:]
    weights = np.array(LUMA if channels == 3 else [1] * channels)
    sums = images.sum(axis=(2, 3), dtype=np.int64)  # exact, and rounded once
    return (sums @ weights / (height * width * weights.sum())).astype(np.float32)


def beta(a: float, bits: np.ndarray) -> np.ndarray:
    """Beta(a, a), rounded to multiples of 1 / SHARES, from 32 random bits each: float64 [n] in 0..1."""
    return np.searchsorted(beta_quantiles(a), bits, side="right") / SHARES


@cache
def beta_quantiles(a: float) -> np.ndarray:
    """Where the 32-bit numbers whose share is k / SHARES end, for k in 0..SHARES-1: int64, 2^32 times the distribution function
    of Beta(a, a) at (k + 1/2) / SHARES.

    With t = x^a the density x^(a-1) (1-x)^(a-1) dx becomes (1-x)^(a-1) dt / a, which is smooth on 0 <= x <= 1/2 and is
    integrated from one edge to the next (Gauss-Legendre, 8 points); the other half follows by symmetry.
    """
    edges = np.array([0, *(np.arange(SHARES // 2) + 0.5), SHARES // 2]) / SHARES
    t = edges**a
    nodes, weights = np.polynomial.legendre.leggauss(8)
    middle, half = (t[1:] + t[:-1]) / 2, (t[1:] - t[:-1]) / 2
    x = (middle[:, None] + half[:, None] * nodes) ** (1 / a)
    below = np.cumsum(((1 - x) ** (a - 1) @ weights) * half)
    lower = below[:-1] / below[-1] / 2
    return np.rint(np.concatenate([lower, 1 - lower[::-1]]) * 2**32).astype(np.int64)
