"""Counts of answers against loops over images: ties, logits that are no numbers, classes without images, several ranks."""

import json
from itertools import pairwise

import numpy as np
import pytest
import test_trainer

from dpresnet import reference
from dpresnet.device import Device, choose_device
from dpresnet.evaluation import NONE, Evaluation, answers, confusion_text, figures, joined, per_class

CLASSES = 9


def draw(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits with many ties, some NaN and infinities, and labels without class 4."""
    rng = np.random.default_rng(seed)
    logits = rng.integers(-2, 3, (count, CLASSES)).astype(np.float32)
    logits[::11, 3] = np.nan
    logits[5::17, 6] = np.inf
    logits[7::19, 2] = -np.inf
    labels = rng.integers(0, CLASSES - 1, count).astype(np.int32)
    return logits, labels + (labels >= 4)


def by_hand(row: np.ndarray) -> list[int]:
    """Classes from the largest logit to the smallest, the first of equals first; none where the largest is not finite."""
    if np.isnan(row).any() or row.max() == np.inf:
        return []
    return sorted(range(CLASSES), key=lambda k: (-row[k], k))


def whole(logits: np.ndarray, labels: np.ndarray) -> Evaluation:
    return Evaluation(CLASSES, 3.0, answers(logits, labels))


def test_counts_equal_those_of_a_loop_over_images():
    logits, labels = draw(500)
    ranked = [by_hand(row) for row in logits]
    test = whole(logits, labels)
    matrix = np.zeros((CLASSES, CLASSES), int)
    for order, label in zip(ranked, labels, strict=True):
        if order:
            matrix[label, order[0]] += 1
    np.testing.assert_array_equal(test.confusion, matrix)
    assert test.confusion.dtype.kind == "i" and 0 < matrix.sum() < 500  # some have no prediction
    assert test.answers.predictions.tolist() == [order[0] if order else NONE for order in ranked]
    assert test.top5 == sum(label in order[:5] for order, label in zip(ranked, labels, strict=True)) / 500
    assert test.accuracy == np.trace(matrix) / 500 < test.top5
    images = np.bincount(labels, minlength=CLASSES)
    expected = [matrix[k, k] / images[k] if images[k] else None for k in range(CLASSES)]
    assert test.per_class_accuracy == expected and expected[4] is None


def test_right_answers_are_those_of_the_loss():
    """The kernel counts them as well; its reference knows no infinities."""
    logits, labels = draw(300)
    finite = np.where(np.isposinf(logits), 2, logits)
    right = answers(finite, labels)
    assert (right.predictions == right.labels).tolist() == reference.loss_correct(finite, labels).astype(bool).tolist()


@pytest.mark.parametrize("biases", [[0, 2, 2, 1, 2], [1, np.nan, 0, 0, 0], [0, np.inf, 0, 0, 0], [-np.inf, 0, 1, 1, 0]])
def test_the_device_counts_the_same_answers_as_right(biases):
    """Without weights the logits are the biases of the classifier."""
    trainer = test_trainer.make(Device(choose_device()), batch=4, replicas=2)
    trainer.replicas.parameter("fc.weight")[...] = 0
    trainer.replicas.parameter("fc.bias")[...] = biases
    trainer.replicas.push_state()
    images, _ = test_trainer.samples(5)
    [batches] = test_trainer.split(images, np.arange(5, dtype=np.int32), 4, 2)
    outcome = trainer.evaluate(batches)
    found = joined(answers(logits, labels) for logits, (_, labels, _) in zip(trainer.logits(batches), batches, strict=True))
    assert outcome.correct == (found.predictions == found.labels).sum() == int(np.isfinite(np.max(biases)))
    assert found.labels.tolist() == [0, 1, 2, 3, 4]


def test_the_lowest_index_wins_a_tie():
    logits = np.zeros((8, CLASSES), np.float32)
    logits[7] = [0, 0, 0, 0, 0, 0, 0, 1, 0]
    found = answers(logits, [0, 1, 4, 5, 8, 3, 2, 3])
    assert found.predictions.tolist() == [0] * 7 + [7]
    assert found.among_first.tolist() == [True, True, True, False, False, True, True, True]  # 7, 0, 1, 2, 3 in the last


@pytest.mark.parametrize("cuts", [[0, 500], [0, 1, 499, 500], [0, 200, 200, 500]])
def test_nothing_depends_on_who_has_counted_what(cuts):
    logits, labels = draw(500)
    parts = [answers(logits[a:b], labels[a:b]) for a, b in pairwise(cuts)]
    together, apart = whole(logits, labels), Evaluation(CLASSES, 3.0, joined(parts[::-1]))
    assert together.figures() == apart.figures() and together.per_class_accuracy == apart.per_class_accuracy
    np.testing.assert_array_equal(together.confusion, apart.confusion)


def test_names_of_the_figures():
    """Five classes are all among the first five: then there is nothing to tell."""
    logits, labels = draw(50)
    tests = {"": whole(logits, labels), "ema_": whole(logits[::-1], labels)}
    names = ["test_loss", "test_accuracy", "test_top5"]
    assert list(figures(tests)) == names + [f"ema_{name}" for name in names]
    assert figures(tests)["test_loss"] == 3.0 / 50
    assert list(per_class(tests)) == ["per_class_accuracy", "ema_per_class_accuracy"]
    few = Evaluation(5, 3.0, answers(logits[:, :5], labels % 5))
    assert list(few.figures()) == names[:2]


def test_the_written_matrix_is_read_back():
    logits, labels = draw(120)
    tests = {"": whole(logits, labels), "ema_": whole(logits[::-1], labels)}
    names = tuple(f'"{k}" é' for k in range(CLASSES))
    text = confusion_text(tests, names)
    read = json.loads(text)
    assert list(read) == ["classes", "matrix", "ema_matrix"] and read["classes"] == list(names)
    for key, before in (("matrix", ""), ("ema_matrix", "ema_")):
        np.testing.assert_array_equal(read[key], tests[before].confusion)
    assert len(text.splitlines()) == 3 + 2 * (CLASSES + 2)
