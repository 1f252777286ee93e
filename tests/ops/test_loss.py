"""Softmax cross-entropy: loss, hits and gradient, in fp32 whatever the storage."""

import numpy as np
import pytest
from harness import Bench, assert_close, each_mode, tolerance

from dpresnet import reference
from dpresnet import reference_augment as mixing
from dpresnet.augment import VIEW
from dpresnet.ops import loss as ops

SCALE = 65536 / 48  # loss scale over the images of a global batch


def softmax(
    bench: Bench, logits: np.ndarray, labels: np.ndarray, valid: int, smoothing: float = 0.0, views: np.ndarray | None = None
) -> list[np.ndarray]:
    """Loss, hits and gradient from the device."""
    images, classes = logits.shape
    outputs = bench.out_array(images), bench.out_array(images), bench.out_rows(images, classes)
    control = bench.control(valid=valid, grad_scale=SCALE)
    inputs = bench.rows(logits), bench.array(labels, np.int32)
    table = None if views is None else bench.array(views, VIEW)
    ops.softmax(bench.plan, "loss", *inputs, *outputs, control, classes, smoothing, table)
    bench.run()
    return [bench.read(tensor) for tensor in outputs]


def check(bench: Bench, logits: np.ndarray, labels: np.ndarray, valid: int, smoothing: float = 0.0) -> None:
    loss, correct, dlogits = softmax(bench, logits, labels, valid, smoothing)
    smoothing = float(np.float32(smoothing))
    allowed = tolerance(np.float32, logits.shape[1])
    assert_close(loss, reference.loss_forward(logits, labels, smoothing, valid), allowed)
    np.testing.assert_array_equal(correct, reference.loss_correct(logits, labels, valid))
    assert_close(dlogits, reference.loss_backward(logits, labels, smoothing, SCALE, valid), allowed)


@each_mode
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("valid", [6, 4, 0])
@pytest.mark.parametrize("classes", [2, 10, 16, 100])
def test_loss(mode, classes, valid, smoothing):
    bench = Bench(mode)
    check(bench, bench.draw(6, classes, deviation=3.0), np.arange(6) % classes, valid, smoothing)


@each_mode
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_logits(mode, size, smoothing):
    """exp would overflow at 89; one image is right, one wrong, one undecided."""
    logits = np.float32(size) * np.array([[1.0, -1.0, 0.0], [1.0, -1.0, 0.0], [1.0, 1.0, -1.0]])
    check(Bench(mode), logits, np.array([0, 1, 1]), 3, smoothing)


@each_mode
def test_first_largest_logit_is_the_answer(mode):
    logits = np.array([[1.0, 2.0, 2.0], [1.0, 2.0, 2.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    labels = np.array([1, 2, 0, 2])
    _, correct, _ = softmax(Bench(mode), logits, labels, 4)
    assert correct.tolist() == [1, 0, 1, 0]
    assert correct.tolist() == reference.loss_correct(logits, labels).tolist()


@each_mode
@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_is_no_hit_and_stays_visible(mode, place):
    logits = np.array([[1.0, 2.0, 0.0]] * 3)
    logits[:, place] = np.nan
    labels = np.arange(3)
    loss, correct, dlogits = softmax(Bench(mode), logits, labels, 3)
    assert np.isnan(loss).all() and np.isnan(dlogits).all()
    np.testing.assert_array_equal(correct, reference.loss_correct(logits, labels))


# Two labels: mixup and cutmix


def pairs(partners: list[int], shares: list[float]) -> np.ndarray:
    views = np.zeros(len(partners), VIEW)
    views["partner"], views["share"] = partners, shares
    return views


def soft_loss(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Cross-entropy with any distribution, by its definition."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return (targets * (np.log(np.exp(shifted).sum(axis=1, keepdims=True)) - shifted)).sum(axis=1)


@each_mode
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("valid", [6, 4, 0])
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_mixed_labels(mode, classes, valid, smoothing):
    bench = Bench(mode)
    logits, labels = bench.draw(6, classes, deviation=3.0), np.arange(6) * 7 % classes
    views = pairs([1, 2, 3, 0, 5, 4], [0.25, 0.5, 1.0, 0.0, 1 / 3, 0.875])
    loss, _, dlogits = softmax(bench, logits, labels, valid, smoothing, views)
    targets = mixing.augment_targets(labels, views, classes, float(np.float32(smoothing)))
    expected, softmaxes = soft_loss(logits, targets), np.exp(-soft_loss_of_each(logits))
    expected[valid:], softmaxes[valid:] = 0, targets[valid:]
    assert_close(loss, expected, tolerance(np.float32, classes))
    assert_close(dlogits, SCALE * (softmaxes - targets), tolerance(np.float32, classes))


def soft_loss_of_each(logits: np.ndarray) -> np.ndarray:
    """[N, K]: the loss if a class were the label."""
    return np.stack([soft_loss(logits, np.eye(logits.shape[1])[[k] * len(logits)]) for k in range(logits.shape[1])], axis=1)


@each_mode
def test_gradient_of_mixed_labels_is_the_slope_of_the_loss(mode):
    """By central differences of the device's own losses; the step is large, for they are fp32."""
    classes, step, rng = 5, 0.05, np.random.default_rng(4)
    logits, labels = rng.normal(size=(4, classes)), np.array([0, 3, 3, 1])
    views = pairs([1, 2, 3, 0], [0.25, 0.7, 0.5, 0.9])
    gradient = softmax(Bench(mode), logits, labels, 4, 0.1, views)[2] / SCALE
    for k in range(classes):
        up, down = (softmax(Bench(mode), logits + sign * step * np.eye(classes)[k], labels, 4, 0.1, views)[0]
                    for sign in (1, -1))  # fmt: skip
        np.testing.assert_allclose((up - down) / (2 * step), gradient[:, k], atol=step**2 / 6)


@each_mode
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_a_partner_the_bits_are_those_of_one_label(mode, smoothing):
    logits, labels = np.random.default_rng(5).normal(size=(6, 10)), np.arange(6)
    alone = softmax(Bench(mode), logits, labels, 5, smoothing)
    for with_table, without in zip(softmax(Bench(mode), logits, labels, 5, smoothing, pairs([0] * 6, [1.0] * 6)), alone,
                                   strict=True):  # fmt: skip
        np.testing.assert_array_equal(with_table, without)


@each_mode
def test_the_label_with_the_larger_share_counts(mode):
    """Both images are taken for class 1: the first image's label is 0 and its partner's 1, and the other way round."""
    logits, labels = np.array([[0.0, 1.0]] * 6), np.array([0, 1] * 3)
    views = pairs([1, 0, 1, 0, 1, 0], [0.75, 0.75, 0.25, 0.25, 0.5, 0.5])
    _, correct, _ = softmax(Bench(mode), logits, labels, 6, views=views)
    assert correct.tolist() == [0, 1, 1, 0, 0, 1]
    _, correct, _ = softmax(Bench(mode), np.where(logits == 1, np.nan, logits), labels, 6, views=views)
    assert not correct.any()
