"""Augmentation against PyTorch where it has the same thing: the project's float64 reference, by which the kernel is tested."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dpresnet import reference_augment as reference
from dpresnet.augment import VIEW


@pytest.mark.parametrize("size", [(32, 32), (7, 5), (1, 1), (64, 48), (13, 40)])
@pytest.mark.parametrize("box", [(0, 0, 40, 36), (3, 5, 17, 24), (10, 0, 1, 36), (39, 35, 1, 1), (2, 2, 32, 32)])
def test_resizing_a_box_is_antialiased_interpolation_of_what_was_cut_out(box, size):
    image = np.random.default_rng(0).integers(0, 256, (3, 40, 36)).astype(np.float64)
    top, left, height, width = box
    rows = reference.augment_resize(top, height, size[0], 40)
    columns = reference.augment_resize(left, width, size[1], 36)
    cut = torch.from_numpy(image[None, :, top : top + height, left : left + width])
    expected = F.interpolate(cut, size=size, mode="bilinear", align_corners=False, antialias=True)[0]
    np.testing.assert_allclose(rows @ image @ columns.T, expected.numpy(), rtol=1e-12, atol=1e-12 * 255)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_of_mixed_samples_give_its_cross_entropy_with_probabilities(smoothing):
    """PyTorch smooths what it is given; its loss is the mean of both labels' losses as well."""
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(5, 7)), np.array([0, 6, 6, 3, 2])
    views = np.zeros(5, VIEW)
    views["partner"], views["share"] = [1, 2, 3, 4, 0], [0.25, 1, 0, 0.5, 0.875]
    targets = torch.from_numpy(reference.augment_targets(labels, views, 7))
    smoothed = torch.from_numpy(reference.augment_targets(labels, views, 7, smoothing))
    ours = F.cross_entropy(torch.from_numpy(logits), smoothed, reduction="none")
    theirs = F.cross_entropy(torch.from_numpy(logits), targets, reduction="none", label_smoothing=smoothing)
    both = [F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(named), reduction="none", label_smoothing=smoothing)
            for named in (labels, labels[views["partner"]])]  # fmt: skip
    share = torch.from_numpy(views["share"].astype(np.float64))
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    np.testing.assert_allclose(ours, share * both[0] + (1 - share) * both[1], rtol=1e-12)
