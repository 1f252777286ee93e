"""Mixed samples in a whole network, stored images of another size than its input, and evaluation that sees neither."""

import numpy as np
import pytest

from dpresnet.augment import Augmentation
from dpresnet.comm import Solo
from dpresnet.device import Device, choose_device
from dpresnet.errors import GaveUp
from dpresnet.initial import initial_state
from dpresnet.model import Model, Pixels
from dpresnet.plan import Launch
from dpresnet.resnet import Options
from dpresnet.trainer import Hyper, Trainer

STORED, SIZE, CLASSES, BATCH = (3, 9, 12), (8, 8), 4, 6
EVERYTHING = {"flip": True, "jitter": 0.4, "erase": 0.5, "cutout": 3, "mixup": 0.4, "cutmix": 1.0}


@pytest.fixture(scope="module")
def device() -> Device:
    return Device(choose_device())


def make(device: Device, replicas: int = 1, batch: int = BATCH, **options: object) -> Trainer:
    pixels = Pixels(np.full(3, 0.5), np.full(3, 0.25), Augmentation(STORED, SIZE, **options))
    variant = Options(CLASSES, stem="cifar", shortcut="A")
    model = Model(device, "resnet20", variant, (3, *SIZE), batch, "fp32", 0.1, pixels)
    trainer = Trainer(model, Solo(), replicas)
    trainer.restore(initial_state(model.state, seed=1))
    return trainer


def draw(count: int = BATCH) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, *STORED), np.uint8), rng.integers(0, CLASSES, count).astype(np.int32)


def gradients(trainer: Trainer, images: np.ndarray, labels: np.ndarray, views: np.ndarray) -> dict[str, np.ndarray]:
    trainer.forward_backward([[(images, labels, views)]], len(images))
    return {p.name: trainer.replicas.parameter(p.name, "grad").astype(np.float64) for p in trainer.model.parameters}


def test_gradients_are_those_of_both_labels_by_their_shares(device):
    """Of pairs of equal images, so that blending changes no pixel, with a label each; a training step is linear in targets."""
    images, _ = draw()
    images[1::2], labels = images[::2], np.arange(BATCH) % CLASSES
    mixing, plain = make(device, mixup=1.0), make(device)
    views = mixing.model.pixels.augmentation.centred(np.arange(BATCH), images)
    partners = np.array([1, 1, 3, 3, 5, 5])
    own, others = gradients(plain, images, labels, views), gradients(plain, images, labels[partners], views)
    views["partner"], views["share"] = partners, 0.75
    mixed = gradients(mixing, images, labels, views)
    for name, gradient in mixed.items():
        expected = 0.75 * own[name] + 0.25 * others[name]
        assert np.abs(gradient - expected).max() < 1e-5 * max(np.abs(own[name]).max(), np.abs(others[name]).max()), name
    assert not np.allclose(mixed["fc.bias"], own["fc.bias"], rtol=0.01)
    assert not np.allclose(mixed["fc.bias"], others["fc.bias"], rtol=0.01)


def test_evaluation_sees_the_middle_of_images_with_one_label(device):
    images, labels = draw()
    outcomes = []
    for options in ({}, EVERYTHING):
        trainer = make(device, **options)
        views = trainer.model.pixels.augmentation.centred(np.arange(BATCH), images)
        outcomes.append(trainer.evaluate([(images, labels, views)]))
        images[:, :, :, :2] = images[:, :, :, 10:] = images[:, :, 8:] = 77  # columns 2 to 9 and rows 0 to 7 are the middle
    assert outcomes[0] == outcomes[1]


def test_nobody_pays_for_what_is_off(device):
    """Evaluation, and training that crops and flips, take the kernel that can do no more, and the loss of one label."""
    for options, expected in (({"flip": True}, ("normalise", False)), (EVERYTHING, ("transform", True)),
                              (EVERYTHING | {"enabled": False}, ("normalise", False))):  # fmt: skip
        model = make(device, **options).model
        for plan, kinds in ((model.train.plan, expected), (model.evaluate.plan, ("normalise", False))):
            launches = {entry.name: entry for entry in plan if isinstance(entry, Launch)}
            assert (launches["input"].verb, ("MIXED", 1) in launches["loss"].defines) == kinds


def test_a_short_batch_is_mixed_within_itself(device):
    """What an earlier batch left beyond the samples that count is seen by nobody."""
    trainer = make(device, **EVERYTHING)
    augmentation, (images, labels) = trainer.model.pixels.augmentation, draw()
    found = []
    for other in (images, 255 - images):
        trainer.forward_backward([[(other, labels, augmentation.drawn(0, 1, np.arange(BATCH), other))]], BATCH)
        short = images[:4], labels[:4], augmentation.drawn(0, 0, np.arange(4), images[:4])
        found.append(gradients(trainer, *short))
    for name, gradient in found[0].items():
        np.testing.assert_array_equal(gradient, found[1][name])


def test_an_overflow_is_explained_with_the_same_views(device):
    """Replaying a batch needs nothing but the batch."""
    trainer = make(device, 2, 3, **EVERYTHING)
    images, labels = draw()
    views = trainer.model.pixels.augmentation.drawn(0, 0, np.arange(3), images[:3])
    trainer.replicas.parameter("fc.bias")[0] = np.inf
    trainer.replicas.push_state()
    batches = [[(images[:3], labels[:3], views), (images[3:], labels[3:], views)]]
    with pytest.raises(GaveUp, match="fc\\) of replica 0 wrote a non-finite value"):
        trainer.step(batches, 6, 0.1, Hyper())
