"""MNIST and what has its format: four IDX files, gzipped or not (LeCun, Cortes and Burges, "The MNIST database")."""

import gzip
import zlib
from pathlib import Path

import numpy as np

from dpresnet.datasets.schema import Split
from dpresnet.errors import Refused

CLASS_NAMES = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
}
PARTS = {"train": "train", "test": "t10k"}
UNSIGNED_BYTES = 0x08
LARGEST_HEADER = 16


def read(folder: Path) -> dict[str, Split]:
    """Both splits, images uint8 [N, 1, H, W]. Refused for a file that is missing, truncated, too long or of another kind."""
    if not folder.is_dir():
        raise Refused(f"{folder} is not a folder: give the one with the four IDX files, such as train-images-idx3-ubyte.gz")
    splits = {}
    for split, part in PARTS.items():
        images, labels = (read_file(find(folder, part, kind, axes), axes) for kind, axes in (("images", 3), ("labels", 1)))
        if len(images) != len(labels):
            raise Refused(f"{folder}: {len(images)} {split} images have {len(labels)} labels")
        splits[split] = Split(images[:, None], labels.astype(np.int32))
    return splits


def find(folder: Path, part: str, kind: str, axes: int) -> Path:
    """The file in one of its usual spellings."""
    names = [f"{part}-{kind}{mark}idx{axes}-ubyte{suffix}" for mark in "-." for suffix in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise Refused(f"{folder} has none of {', '.join(names)}")


def read_file(path: Path, axes: int) -> np.ndarray:
    """The uint8 array of an IDX file. Of a gzipped one no more is expanded than its header announces."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * axes)
            if len(header) < 4 + 4 * axes or header[:4] != bytes([0, 0, UNSIGNED_BYTES, axes]):
                raise Refused(f"{path} is not an IDX file of bytes with {axes} axes")
            shape = np.frombuffer(header, ">u4", offset=4).astype(np.int64)
            size = int(np.prod(shape))
            data = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise Refused(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) != size or not size:
        more = "holds more than" if len(data) > size else f"is truncated: {len(data)} of"
        raise Refused(f"{path} {more} the {size} bytes that its header announces")
    return np.frombuffer(data, np.uint8).reshape(shape)
