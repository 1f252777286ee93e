"""One image file to pixels, by Pillow."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from dpresnet.errors import Refused

FORMATS = {"jpg": ("JPEG", "MPO"), "jpeg": ("JPEG", "MPO"), "png": ("PNG",), "webp": ("WEBP",)}  # MPO: several JPEG in one file
BYTES_PER_PIXEL = 4  # of the largest image admitted, that its file may have


class Unusable(Exception):
    """An image that cannot be part of a data set; the message says why."""


@dataclass(frozen=True)
class Shaping:
    """What becomes of an image: ``channels`` 1 or 3; ``size`` x ``size`` pixels (0: those it has), either the largest
    ``fit`` "shorter" centre square scaled, or the whole image squeezed ("fixed"). Images of more than ``most_pixels`` are
    not decoded.
    """

    channels: int = 3
    size: int = 0
    fit: str = "shorter"
    most_pixels: int = 64_000_000

    @property
    def most_bytes(self) -> int:
        """The largest file that is read."""
        return BYTES_PER_PIXEL * self.most_pixels + 2**20


def pillow() -> ModuleType:
    """The module PIL.Image; Refused with the remedy where it is not installed."""
    try:
        from PIL import Image
    except ImportError:
        raise Refused("images are decoded by Pillow, which is not installed: pip install 'dpresnet[images]'") from None
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `decode` counts the pixels itself
    return Image


def suffix(name: str) -> str:
    """The part of a file name behind its last dot, in small letters; "" if it has none."""
    stem, dot, last = name.rpartition(".")
    return last.lower() if dot and stem else ""


def decode(content: bytes, name: str, shaping: Shaping) -> np.ndarray:
    """The pixels of an image file, uint8 [C, H, W]; Unusable with the reason.

    The orientation in EXIF is applied; of an animation the first frame counts. 16 bits of grey become 8 by v * 255 / 65535,
    rounded; alpha is left out; colours become grey by ITU-R BT.601's luma.
    """
    image_module = pillow()
    image_module.MAX_IMAGE_PIXELS = shaping.most_pixels  # above it Pillow warns, above twice as many it raises
    try:
        with image_module.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP")) as image:
            _admit(image, name, shaping)
            return _pixels(image, shaping)
    except Unusable:
        raise
    except image_module.UnidentifiedImageError:
        raise Unusable("it is empty" if not content else "its content is no JPEG, PNG or WebP image") from None
    except image_module.DecompressionBombError:
        raise Unusable(f"it has more than {shaping.most_pixels:,} pixels (--max-pixels)") from None
    except Exception as error:  # Pillow's plugins raise what they meet: OSError, SyntaxError, struct.error, IndexError, ...
        raise Unusable(" ".join(f"it is damaged ({error})".split())) from None


def _admit(image: Any, name: str, shaping: Shaping) -> None:
    """Looks at the header only."""
    if image.format not in FORMATS[suffix(name)]:
        raise Unusable(f"its content is {image.format}, its name says {suffix(name)}")
    width, height = image.size
    if width * height > shaping.most_pixels:
        raise Unusable(f"it has {width} x {height} pixels, more than {shaping.most_pixels:,} (--max-pixels)")


def _pixels(image: Any, shaping: Shaping) -> np.ndarray:
    from PIL import ImageOps

    image.load()
    image = _reduced(ImageOps.exif_transpose(image), shaping.channels)
    if shaping.size:
        image = _resized(image, shaping)
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _reduced(image: Any, channels: int) -> Any:
    """The same with 8 bits per value and 1 or 3 channels."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = pillow().fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # a palette may have alpha, which the next step leaves out
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _resized(image: Any, shaping: Shaping) -> Any:
    """``size`` x ``size`` pixels by bilinear interpolation over all pixels that a new one covers. Cropping first keeps
    long and narrow images from growing.
    """
    width, height = image.size
    if shaping.fit == "shorter":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return image.resize((shaping.size, shaping.size), pillow().Resampling.BILINEAR)
