"""The contact sheet of a data set, read back with Pillow."""

import numpy as np
from PIL import Image

from dpresnet.data import load
from dpresnet.datasets import show
from tests.launching import python


def test_the_first_column_is_what_is_stored_and_the_others_are_what_training_sees(tmp_path):
    """Without augmentation all are the same; every pixel is found again, ten times as large."""
    flags = ["digits", "--count", "2", "--classes", "3", "-o"]
    sheets = []
    for name, more in (("plain.png", ["--no-augment"]), ("cropped.png", ["--epoch", "4"])):
        done = python(["-m", "dpresnet.datasets.show", *flags, tmp_path / name, *more])
        assert done.returncode == 0 and "3 images of digits" in done.stdout, done.stderr
        sheets.append(np.array(Image.open(tmp_path / name).convert("L")))
    plain, cropped = sheets
    digits, margin = load("digits").train, 2 * show.GAP + show.LETTER
    assert plain.shape == cropped.shape == (show.GAP + 3 * 84, margin + 3 * 84)
    for row, index in enumerate(show.first_of_each(digits.labels, 3)):
        cells = [sheet[show.GAP + 84 * row :, margin + 84 * column :][:80, :80] for sheet in sheets for column in range(3)]
        for cell in cells[:4]:
            np.testing.assert_array_equal(cell, digits.images[index, 0].repeat(10, axis=0).repeat(10, axis=1))
        assert any(not np.array_equal(cell, cells[0]) for cell in cells[4:])


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    for name in ("sheet.unknown", "missing/sheet.png"):
        done = python(["-m", "dpresnet.datasets.show", "digits", "-o", tmp_path / name])
        assert done.returncode == 78 and "the picture cannot be written" in done.stderr and done.stderr.count("\n") == 1
