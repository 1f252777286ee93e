"""Image files as arrays: decoded, turned, resized by Pillow, which is loaded when it is needed."""

import importlib.util
import io
from pathlib import Path

import numpy as np

from dpresnet.errors import Refused

FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}  # by the suffix of a name
MOST_PIXELS = 64_000_000  # of an image, before it is resized
FITS = ("shorter", "fixed")


class BadPicture(ValueError):
    """Why an image file cannot be used."""


def check() -> None:
    """Refuses when there is no Pillow."""
    if importlib.util.find_spec("PIL") is None:
        raise Refused("Pillow is not installed here, and image files cannot be read: pip install 'dpresnet[images]'")


def decode(data: bytes, name: str, channels: int = 3, size: int = 0, fit: str = "shorter",
           most_pixels: int = MOST_PIXELS) -> np.ndarray:  # fmt: skip
    """The image as uint8 [channels, H, W], grey or RGB, the right way up as its EXIF orientation says.

    With ``size`` it becomes a square: the shorter side is scaled to it and the middle is cut out, or (``fit`` "fixed") both
    sides are scaled, antialiased either way. Raises BadPicture for what is truncated, too large, no image, or of another
    format than the suffix of ``name`` says.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as image:
            _admit(image, name, most_pixels)
            if size:
                image.draft(None, (2 * size, 2 * size))  # a JPEG need not be decoded much larger than it is used
            turned = _in_channels(ImageOps.exif_transpose(image), channels)
        if size and fit == "shorter":
            turned = ImageOps.fit(turned, (size, size), Image.Resampling.BILINEAR)
        elif size:
            turned = turned.resize((size, size), Image.Resampling.BILINEAR)
        pixels = np.asarray(turned)
    except BadPicture:
        raise
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        raise BadPicture(f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}") from error
    return np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1))


def _admit(image, name: str, most_pixels: int) -> None:
    """What the header tells, before anything is decoded."""
    expected = FORMATS.get(Path(name).suffix.lower())
    if image.format != expected:
        raise BadPicture(f"is {image.format}, where its name says {expected or 'no image'}")
    if image.width * image.height > most_pixels:
        raise BadPicture(f"has {image.width} x {image.height} pixels, more than the limit of {most_pixels}")


def _in_channels(image, channels: int):
    """Grey or RGB, 8 bits: of 16-bit greys the upper ones."""
    from PIL import Image

    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("L" if channels == 1 else "RGB")
