"""A recorded run repeated in PyTorch: two trainings that have nothing in common but what they were asked to do."""

import numpy as np
import pytest

from dpresnet import report
from dpresnet.augment import Augmentation
from dpresnet.bench.torch_train import cropped
from dpresnet.data import Shard
from dpresnet.reference_augment import augment_crop
from tests.launching import python

EQUAL_STEPS = 3  # into the second epoch; rounding errors grow from step to step


def train(folder, *flags):
    done = python(["-m", "dpresnet.train", "--threads", "1", "--precision", "fp32", "--replicas", "2", "--out", folder, *flags])
    assert done.returncode == 0, done.stderr


def repeat(folder):
    return python(["-m", "dpresnet.bench.torch_train", folder, "--threads", "1"])


def train_both(folder, *flags):
    """The runs that both have left."""
    train(folder / "run", *flags)
    done = repeat(folder / "run")
    assert done.returncode == 0, done.stderr
    return [report.load(folder / name) for name in ("run", "run-torch")]


@pytest.mark.parametrize("flags", [
    ("--lr", "0.05"),
    ("--optimizer", "adamw", "--lr", "0.002", "--weight-decay", "50", "--flip", "on", "--schedule", "step"),
    ("--no-nesterov", "--no-augment", "--decay", "weights", "--label-smoothing", "0", "--weight-decay", "0.5", "--lr", "0.2",
     "--clip-norm", "0.5"),
], ids=["sgd", "adamw", "plain"])  # fmt: skip
def test_losses_are_those_of_pytorch(tmp_path, flags):
    """Initial parameters, order, views, learning rates, the update: whatever differed would show."""
    runs = train_both(tmp_path, "--epochs", "4", "--batch", "360", *flags)
    plans = [[tuple(line[key] for key in ("step", "epoch", "samples", "lr")) for line in run.steps] for run in runs]
    assert plans[0] == plans[1]
    losses = [[line["loss"] for line in run.steps[:EQUAL_STEPS]] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_both_learn_alike(tmp_path):
    ours, theirs = train_both(tmp_path, "--epochs", "5")
    for key in ("train_accuracy", "test_accuracy"):
        assert ours.epochs[-1][key] == pytest.approx(theirs.epochs[-1][key], abs=0.03)
    matrix = np.array(theirs.confusion["matrix"])
    assert matrix.trace() / matrix.sum() == theirs.result["test_accuracy"] == theirs.epochs[-1]["test_accuracy"]
    assert matrix.sum() == np.array(ours.confusion["matrix"]).sum()


@pytest.mark.parametrize(("flags", "said"), [
    (("--optimizer", "lars"), "--optimizer lars"),
    (("--accumulate", "2"), "--accumulate 2"),
    (("--bn", "local"), "--bn local"),
    (("--mixup", "0.2"), "views beyond crops and mirrors"),
])  # fmt: skip
def test_what_is_not_repeated_is_refused(tmp_path, flags, said):
    train(tmp_path / "run", "--steps", "1", *flags)
    done = repeat(tmp_path / "run")
    assert done.returncode == 78 and f"the run has {said}, which is not repeated" in done.stderr
    assert not (tmp_path / "run-torch").exists()


def test_crops_and_mirrors_are_those_of_the_reference():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (40, 3, 9, 7)).astype(np.uint8)
    augmentation = Augmentation((3, 9, 7), (9, 7), padding=3, flip=True)
    indices = np.arange(40)
    views = augmentation.drawn(0, 1, indices, images)
    found = cropped(Shard(images, indices, indices, views), augmentation)
    for image, view, ours in zip(images, views, found, strict=True):
        rows = augment_crop(view["crop_top"], 9, 9)
        columns = augment_crop(view["crop_left"], 7, 7, bool(view["flip"]))
        np.testing.assert_array_equal(ours, rows @ image @ columns.T)
