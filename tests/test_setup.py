"""What ranks tell each other before and between steps."""

from dataclasses import replace

import pytest

from dpresnet.config import Config
from dpresnet.data import load
from dpresnet.errors import Refused
from dpresnet.setup import augmentation_of, odd_ranks, resolve, straggler

A, B, C = b"a", b"b", b"c"


@pytest.mark.parametrize(("fingerprints", "said"), [
    ([A], ""),
    ([A, A, A], ""),
    ([A, B, A], "rank 1 on node1 holds other parameters than the other 2 ranks"),
    ([B, A, A, C, A], "rank 0 on node0, rank 3 on node3 hold other parameters than the other 3 ranks"),
    ([A, B], "rank 0 on node0, rank 1 on node1 hold different parameters, and no majority tells which are right"),
    ([A, B, B, A, C], "rank 0 on node0, rank 1 on node1, rank 2 on node2, rank 3 on node3, rank 4 on node4 hold different "
                      "parameters, and no majority tells which are right"),
])  # fmt: skip
def test_the_minority_is_named_with_its_host(fingerprints, said):
    assert odd_ranks([(fingerprint, f"node{rank}") for rank, fingerprint in enumerate(fingerprints)]) == said


@pytest.mark.parametrize(
    ("busy_s", "expected"),
    [([1.0, 1.0, 3.0], (2, 3.0)), ([2.0, 1.0], (0, 2.0)), ([0.0, 0.0, 5.0], (2, 1.0)), ([4.0], (0, 1.0))],
)
def test_straggler_is_the_busiest_against_the_median(busy_s, expected):
    assert straggler(busy_s) == pytest.approx(expected)


# Which flags do what to which images


@pytest.mark.parametrize(("flags", "stored", "border", "flip", "size"), [
    ({}, (3, 32, 40), 4, True, (32, 40)),
    ({}, (1, 8, 8), 1, False, (8, 8)),
    ({"crop_padding": 0, "flip": "off"}, (3, 32, 32), 0, False, (32, 32)),
    ({"flip": "on"}, (1, 7, 7), 1, True, (7, 7)),
    ({"crop_size": 24}, (3, 32, 40), 0, True, (24, 24)),
    ({"crop_size": 24, "crop_padding": 3}, (3, 32, 40), 3, True, (24, 24)),
    ({"resized_crop": 0.08}, (3, 32, 40), 0, True, (32, 40)),
])  # fmt: skip
def test_flags_of_augmentation_depend_on_the_images(flags, stored, border, flip, size):
    found = augmentation_of(Config(**flags), stored)
    assert (found.border, found.flip, found.size) == (border, flip, size)
    assert found.features == {"RESIZE": int("resized_crop" in flags), "JITTER": 0, "HOLES": 0, "MIX": 0}


def test_every_flag_of_augmentation_arrives():
    values = {"jitter": 0.4, "erase": 0.25, "cutout": 3, "mixup": 0.2, "cutmix": 1.0}
    found = augmentation_of(Config(resized_crop=0.08, **values), (3, 32, 32))
    assert found.resized == 0.08 and {name: getattr(found, name) for name in values} == values
    assert found.enabled and not augmentation_of(Config(augment=False), (3, 32, 32)).enabled


def test_crops_larger_than_the_images_are_refused_before_anything_is_done():
    cfg, digits = Config(crop_size=9), load("digits")
    with pytest.raises(Refused, match="--crop-size 9 is larger than the stored images of 8 x 8 pixels: use at most 8"):
        resolve(cfg, digits, 1, None)
    assert resolve(replace(cfg, crop_size=8), digits, 1, None).crop_size == 8
