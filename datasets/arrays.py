"""NumPy's .npz files with images and labels."""

import zipfile
from pathlib import Path

import numpy as np

from dpresnet.datasets.schema import Split
from dpresnet.errors import Refused

LAYOUTS = ("HW", "HWC", "CHW")
KEYS = ("train_images", "train_labels", "test_images", "test_labels")


def read(path: Path, layout: str = "", held_out: float = 0.0) -> dict[str, Split]:
    """Both splits, images uint8 [N, C, H, W], from train_images, train_labels, test_images and test_labels, or from images and
    labels, of which every n-th then becomes a test image.

    ``layout`` says what follows N in the arrays; "" where only one fits. Refused for what is missing or of another kind.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {key: file[key] for key in (*KEYS, "images", "labels") if key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise Refused(f"{path} cannot be read as an .npz file of plain arrays: {error}") from None
    if "images" in found and "labels" in found:
        found = _held_out(path, found["images"], found["labels"], held_out)
    if missing := [key for key in KEYS if key not in found]:
        raise Refused(f"{path} has no {', '.join(missing)}: it needs {', '.join(KEYS)}, or images and labels")
    return {split: Split(_images(path, f"{split}_images", found[f"{split}_images"], layout),
                         _labels(path, f"{split}_labels", found[f"{split}_labels"], len(found[f"{split}_images"])))
            for split in ("train", "test")}  # fmt: skip


def _held_out(path: Path, images: np.ndarray, labels: np.ndarray, share: float) -> dict[str, np.ndarray]:
    if not share:
        raise Refused(f"{path} has no test split: --test-fraction 0.1 takes every tenth image")
    test = np.zeros(len(images), bool)
    test[:: round(1 / share)] = True
    found = {}
    for split, part in (("train", ~test), ("test", test)):
        found |= {f"{split}_images": images[part], f"{split}_labels": labels[part]}
    return found


def _images(path: Path, key: str, array: np.ndarray, layout: str) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or not array.size:
        raise Refused(f"{path}: {key} is {array.dtype} {list(array.shape)}, not uint8 [N, H, W], [N, H, W, C] or [N, C, H, W]")
    fitting = ["HW"] if array.ndim == 3 else [name for name in LAYOUTS[1:] if array.shape[3 if name == "HWC" else 1] in (1, 3)]
    if not layout and len(fitting) != 1:
        raise Refused(f"{path}: {key} is {list(array.shape)}, which may be HWC or CHW: say which with --layout")
    chosen = layout or fitting[0]
    if len(chosen) != array.ndim - 1:
        raise Refused(f"--layout {chosen}: {key} of {path} is {list(array.shape)}")
    return array[:, None] if chosen == "HW" else array.transpose(0, 3, 1, 2) if chosen == "HWC" else array


def _labels(path: Path, key: str, array: np.ndarray, count: int) -> np.ndarray:
    if array.dtype.kind not in "iu" or array.shape != (count,) or array.min() < 0 or array.max() >= 2**31:
        raise Refused(f"{path}: {key} is {array.dtype} {list(array.shape)}, not class indices [{count}] from 0 on")
    return array.astype(np.int32)
