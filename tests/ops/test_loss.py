"""Softmax cross-entropy: loss, hits and gradient, in fp32 whatever the storage."""

import numpy as np
import pytest
from harness import Bench, assert_close, each_mode, tolerance

from dpresnet import reference
from dpresnet.ops import loss as ops

SCALE = 65536 / 48  # loss scale over the images of a global batch


def softmax(
    bench: Bench, logits: np.ndarray, labels: np.ndarray, valid: int, smoothing: float = 0.0
) -> list[np.ndarray]:
    """Loss, hits and gradient from the device."""
    images, classes = logits.shape
    outputs = bench.out_array(images), bench.out_array(images), bench.out_rows(images, classes)
    control = bench.control(valid=valid, grad_scale=SCALE)
    inputs = bench.rows(logits), bench.array(labels, np.int32)
    ops.softmax(bench.plan, "loss", *inputs, *outputs, control, classes, smoothing)
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
