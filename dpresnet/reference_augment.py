"""Augmentation in float64 numpy, as the papers define it: what kernels/augment.cl and dpresnet/augment.py are tested against.

Crops and resizing are products with dense matrices, holes are masks; nothing here is written as the kernel is. There is no
stream of random numbers: what a sample gets is a function of (seed, epoch, its index), so a resumed run repeats it.
"""

import numpy as np
from numpy.typing import ArrayLike

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601


def augment_mix(x: ArrayLike) -> np.ndarray:
    """uint32 -> uint32, one to one: lowbias32 of C. Wellons, "Prospecting for Hash Functions"."""
    x = np.asarray(x, dtype=np.uint64)  # 64 bits hold the products, so no wrap-around is left to chance
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & 0xFFFFFFFF
    return (x ^ (x >> 16)).astype(np.uint32)


def augment_parameters(
    seed: int, epoch: int, sample_index: ArrayLike, padding: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(dy[N], dx[N], flip[N]): shifts in -padding..padding, and 0 or 1, from the low 32 bits of seed, epoch and index.

    The crop starts at row padding + dy, column padding + dx of the padded image, so shifts of 0 are the image itself.
    """
    low = 0xFFFFFFFF
    sample = augment_mix(np.asarray(sample_index, dtype=np.int64) & low)
    key = augment_mix((seed & low) ^ augment_mix((epoch & low) ^ sample))
    span = 2 * padding + 1
    dy, dx = (augment_mix(key ^ draw).astype(np.int64) % span - padding for draw in (1, 2))
    return dy, dx, augment_mix(key ^ 3).astype(np.int64) & 1


def augment_crop(first: int, size: int, stored: int, flip: bool = False) -> np.ndarray:
    """The matrix [size, stored] that takes the elements first..first+size-1, backwards if ``flip``; 0 where there are none."""
    taken = np.arange(first, first + size)[:: -1 if flip else 1]
    return (taken[:, None] == np.arange(stored)).astype(np.float64)


def augment_resize(first: int, length: int, size: int, stored: int, flip: bool = False) -> np.ndarray:
    """The matrix [size, stored] that resizes the elements first..first+length-1 to ``size``.

    Bilinear with antialiasing: a triangle around (i + 1/2) length / size, as wide as the scale where that reduces, cut off at
    the ends of the box and normalised. That is the triangle filter of image libraries.
    """
    scale = length / size
    centre = (np.arange(size) + 0.5) * scale
    distance = np.abs(np.arange(length) + 0.5 - centre[:, None]) / max(scale, 1.0)
    weights = np.clip(1 - distance, 0, None)
    whole = np.zeros((size, stored))
    whole[:, first : first + length] = weights / weights.sum(axis=1, keepdims=True)
    return whole[::-1] if flip else whole


def augment_luma(images: np.ndarray) -> np.ndarray:
    """Grey values of [..., C, H, W]: [..., 1, H, W]. Channels count alike unless there are three."""
    channels = images.shape[-3]
    weights = np.array(LUMA if channels == 3 else [1 / channels] * channels)
    return (images * weights[:, None, None]).sum(axis=-3, keepdims=True)


def augment_jitter(image: np.ndarray, brightness: float, contrast: float, saturation: float, grey: float) -> np.ndarray:
    """Blends of [C, H, W] in 0..255 with black, with the value ``grey`` and with its own grey values, each clipped."""
    image = np.clip(brightness * image, 0, 255)
    image = np.clip(contrast * image + (1 - contrast) * grey, 0, 255)
    return np.clip(saturation * image + (1 - saturation) * augment_luma(image), 0, 255)


def augment_inside(top: int, left: int, height: int, width: int, size: tuple[int, int]) -> np.ndarray:
    """1 in the rectangle of an array [H, W], else 0."""
    mask = np.zeros(size)
    mask[top : top + height, left : left + width] = 1
    return mask


def augment_look(image: ArrayLike, view: np.void, size: tuple[int, int], mean: ArrayLike, std: ArrayLike, resize: bool,
                 jitter: bool) -> np.ndarray:  # fmt: skip
    """One u8 image[C,H,W] -> [C, *size], without its partner; ``view`` is a row of `dpresnet.augment.VIEW`."""
    image = np.asarray(image, np.float64)
    boxes = ("crop", "erased", "cutout")
    crop, *holes = ([int(view[f"{name}_{part}"]) for part in ("top", "left", "height", "width")] for name in boxes)
    (top, left, height, width), flip = crop, bool(view["flip"])
    if resize:
        rows = augment_resize(top, height, size[0], image.shape[1])
        columns = augment_resize(left, width, size[1], image.shape[2], flip)
    else:
        rows, columns = augment_crop(top, size[0], image.shape[1]), augment_crop(left, size[1], image.shape[2], flip)
    seen, inside = rows @ image @ columns.T, np.outer(rows.sum(axis=1), columns.sum(axis=1)) > 0.5
    if jitter:
        factors = (float(view[name]) for name in ("brightness", "contrast", "saturation", "grey"))
        seen = augment_jitter(seen, *factors) * inside
    normal = (seen / 255 - np.asarray(mean, np.float64)[:, None, None]) / np.asarray(std, np.float64)[:, None, None]
    for hole in holes:
        normal = normal * (1 - augment_inside(*hole, size))
    return normal


def augment_apply(images: ArrayLike, views: np.ndarray, size: tuple[int, int], mean: ArrayLike, std: ArrayLike,
                  resize: bool = False, jitter: bool = False) -> np.ndarray:  # fmt: skip
    """u8 images[N,C,H,W] -> [N, C, *size] as the table says: normalised by mean[C] and std[C] in units of 0..1, then mixed.

    Beyond the border images are black, not of the mean; holes are of the mean, that is 0.
    """
    images = np.asarray(images)
    seen = [augment_look(image, view, size, mean, std, resize, jitter) for image, view in zip(images, views, strict=True)]
    mixed = []
    for own, view in zip(seen, views, strict=True):
        pasted = [int(view[f"pasted_{part}"]) for part in ("top", "left", "height", "width")]
        kept = 1 - augment_inside(*pasted, size) if pasted[2] else float(view["share"])
        mixed.append(kept * own + (1 - kept) * seen[view["partner"]])
    return np.array(mixed).reshape(images.shape[:2] + size)


def augment_targets(labels: ArrayLike, views: np.ndarray, classes: int, smoothing: float = 0.0) -> np.ndarray:
    """Target distributions [N, K]: of two labels by their shares, smoothed as Szegedy et al. 2016, section 7, do."""
    labels = np.asarray(labels)
    own, other = np.eye(classes)[labels], np.eye(classes)[labels[views["partner"]]]
    share = views["share"][:, None].astype(np.float64)
    return (1 - smoothing) * (share * own + (1 - share) * other) + smoothing / classes
