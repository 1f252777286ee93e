"""Makes digits.h5 from scikit-learn's handwritten digits: ``python -m dpresnet.datasets.make_digits [OUT]``.

scikit-learn is needed here only. Source, licence and what is done to the data: README.md in this folder.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np

from dpresnet.data import permutation
from dpresnet.datasets import schema

SOURCE = (
    "E. Alpaydin and C. Kaynak (1998), Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, "
    "https://doi.org/10.24432/C50P49; its test set of 1,797 images as distributed in scikit-learn; "
    "changes: values 0..16 scaled to 0..255, new stratified split"
)
LICENCE = "CC BY 4.0, https://creativecommons.org/licenses/by/4.0/"
CONTENT_SHA256 = "f67d6a29d0e1f70e7f0cd9dcf25816b694881f4b8f27f5cc1db59551f0499fb8"

SPLIT_SEED = 0
CLASSES = 10
CHUNK_BYTES, GZIP = 1 << 20, 9  # a small file, which is read whole
HIGHEST = 16  # a value counts the dark ones of 4 x 4 pixels


def scale(values: np.ndarray) -> np.ndarray:
    """0..16 to 0..255, rounded to the nearest, halves up: uint8 of the same shape."""
    return ((values.astype(np.uint16) * 255 + HIGHEST // 2) // HIGHEST).astype(np.uint8)


def unscale(images: np.ndarray) -> np.ndarray:
    """The inverse of ``scale``."""
    return ((images.astype(np.uint16) * HIGHEST + 127) // 255).astype(np.uint8)


def content_sha256(values: np.ndarray, labels: np.ndarray) -> str:
    """SHA-256 (hex) over the sorted rows of [64 values 0..16, label] as bytes: the same in whatever order they come."""
    rows = np.column_stack([values.reshape(len(labels), -1), labels]).astype(np.uint8)
    return hashlib.sha256(b"".join(sorted(row.tobytes() for row in rows))).hexdigest()


def split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and test samples, each ascending: of every class a fifth, to the nearest, is for testing.

    Which ones is drawn by a permutation that depends on SPLIT_SEED and the class alone.
    """
    test = []
    for label in range(CLASSES):
        members = np.flatnonzero(labels == label)
        drawn = permutation(len(members), (SPLIT_SEED, label))[: (len(members) + 2) // 5]
        test.append(members[drawn])
    chosen = np.zeros(len(labels), bool)
    chosen[np.concatenate(test)] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def build(values: np.ndarray, labels: np.ndarray) -> schema.Dataset:
    """The data set from values 0..16 [N, 8, 8] and labels [N] in scikit-learn's order."""
    if (found := content_sha256(values, labels)) != CONTENT_SHA256:
        raise SystemExit(f"these are not the digits expected: SHA-256 {found} instead of {CONTENT_SHA256}")
    images, labels = scale(values)[:, None], labels.astype(np.int32)
    train, test = (schema.Split(images[part], labels[part]) for part in split(labels))
    return schema.assemble("digits", SOURCE, LICENCE, tuple(map(str, range(CLASSES))), train, test)


def main(arguments: list[str]) -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    path = Path(arguments[0]) if arguments else Path(__file__).with_name("digits.h5")
    dataset = build(bunch.images, bunch.target)
    schema.write(path, dataset, CHUNK_BYTES, GZIP)
    print(f"{path}: {len(dataset.train)} + {len(dataset.test)} samples, fingerprint {dataset.fingerprint}")


if __name__ == "__main__":
    main(sys.argv[1:])
