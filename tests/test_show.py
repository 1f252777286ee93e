"""What `python -m dpresnet.datasets.show` takes from the device, and what it refuses; the picture is in tests/peers."""

import importlib.util

import numpy as np
import pytest

from dpresnet.augment import Augmentation
from dpresnet.data import load
from dpresnet.datasets import show
from dpresnet.device import Device, choose_device
from dpresnet.errors import Refused


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_what_is_not_augmented_comes_back_as_it_is_stored(name):
    """Every pixel, normalised and back."""
    dataset = load(name, image=13)
    images = dataset.train.take(np.arange(40))
    plain = Augmentation(dataset.shape, dataset.shape[1:], enabled=False)
    seen = show.look(Device(choose_device()), dataset, plain, images, plain.centred(np.arange(40), images))
    np.testing.assert_array_equal(seen, images)


def test_holes_have_the_mean_colour():
    dataset = load("synthetic", image=6)
    images, whole = dataset.train.take(np.arange(3)), Augmentation((3, 6, 6), (6, 6), cutout=20)
    seen = show.look(Device(choose_device()), dataset, whole, images, whole.drawn(0, 0, np.arange(3), images))
    assert np.array_equal(seen, np.broadcast_to(np.rint(255 * dataset.mean).astype(np.uint8)[:, None, None], (3, 3, 6, 6)))


def test_rows_are_the_first_sample_of_each_class():
    labels = np.array([4, 4, 0, 2, 0, 9])
    assert show.first_of_each(labels, 10).tolist() == [2, 3, 0, 5]
    assert show.first_of_each(labels, 4).tolist() == [2, 3]


@pytest.mark.parametrize(("argv", "words"), [
    (["digits", "--count", "0"], "--count 0 is out of range: it must be at least 1"),
    (["digits", "--epoch", "-1"], "--epoch -1 is out of range: it must be at least 0"),
    (["digit"], "did you mean digits?"),
    (["digits", "--jitter", "2"], "--jitter 2.0 is out of range: it must be at most 1.0"),
    (["digits", "--batch", "3"], "unrecognized arguments: --batch 3"),
    (["digits", "--no-augment", "--mixup", "1"], "--mixup 1.0 has no effect with --no-augment"),
])  # fmt: skip
def test_refusals_are_those_of_training(argv, words, tmp_path):
    with pytest.raises(Refused) as caught:
        show.run([*argv, "-o", str(tmp_path / "sheet.png")])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_without_pillow_it_says_how_to_get_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert show.main(["digits", "-o", str(tmp_path / "sheet.png")]) == 78
    assert "pip install 'dpresnet[bench]'" in capsys.readouterr().err
