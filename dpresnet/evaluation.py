"""What a network answers on the test split: how often it is right, how often the right class is among the first five, and which
class it takes for which.

All are counts of images, so they do not depend on who has counted which.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

FIRST = 5  # classes that top-5 looks at
NONE = -1  # the prediction from logits that are no numbers
MOST_CLASSES = 4096  # of a confusion matrix that is written


@dataclass(frozen=True, eq=False)
class Answers:
    """To n images: labels, predictions (or NONE) and whether the label is among the FIRST classes, each [n]."""

    labels: np.ndarray
    predictions: np.ndarray
    among_first: np.ndarray


def answers(logits: np.ndarray, labels: np.ndarray) -> Answers:
    """To images with these logits [n, classes].

    As in kernels/loss.cl, the first of equal logits is the larger one, and an image whose largest logit is not finite has no
    right answer.
    """
    index = np.asarray(labels, np.int64)[:, None]
    finite = np.isfinite(logits.max(axis=1))
    mine = np.take_along_axis(logits, index, axis=1)
    before = (logits > mine) | ((logits == mine) & (np.arange(logits.shape[1]) < index))
    return Answers(index[:, 0], np.where(finite, logits.argmax(axis=1), NONE), finite & (before.sum(axis=1) < FIRST))


def joined(parts: Iterable[Answers]) -> Answers:
    """Those of several sets of images."""
    columns = zip(*((part.labels, part.predictions, part.among_first) for part in parts), strict=True)
    return Answers(*map(np.concatenate, columns))


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The whole test split: sums over its images, and the answers to them. ``culprit`` is the first non-finite value that was
    found, if values were checked.
    """

    classes: int
    loss: float
    answers: Answers
    culprit: str = ""

    @property
    def count(self) -> int:
        """Images."""
        return len(self.answers.labels)

    @property
    def mean_loss(self) -> float:
        """Per image."""
        return self.loss / self.count

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(np.mean(self.answers.predictions == self.answers.labels))

    @property
    def top5(self) -> float:
        """Share of images whose class is among the first five."""
        return float(np.mean(self.answers.among_first))

    @property
    def confusion(self) -> np.ndarray:
        """int64 [classes, classes]: images of the row's class that were taken for the column's."""
        some = self.answers.predictions != NONE
        cells = self.answers.labels[some] * self.classes + self.answers.predictions[some]
        return np.bincount(cells, minlength=self.classes**2).reshape(self.classes, self.classes)

    @property
    def per_class_accuracy(self) -> list[float | None]:
        """Share of right answers to the images of each class, None where there are none."""
        right = self.answers.labels[self.answers.predictions == self.answers.labels]
        rights, images = (np.bincount(labels, minlength=self.classes).tolist() for labels in (right, self.answers.labels))
        return [good / count if count else None for good, count in zip(rights, images, strict=True)]

    def figures(self) -> dict[str, float]:
        """What is said of it in metrics.jsonl and result.json."""
        found = {"test_loss": self.mean_loss, "test_accuracy": self.accuracy}
        return found | ({"test_top5": self.top5} if self.classes > FIRST else {})


Tests = Mapping[str, Evaluation]
"""Evaluations by what goes before the names of their figures: "" for the parameters, "ema_" for their moving averages."""


def figures(tests: Tests) -> dict[str, float]:
    """Those of all evaluations."""
    return {f"{before}{name}": value for before, test in tests.items() for name, value in test.figures().items()}


def per_class(tests: Tests) -> dict[str, list[float | None]]:
    """The accuracy on each class, of all evaluations."""
    return {f"{before}per_class_accuracy": test.per_class_accuracy for before, test in tests.items()}


def confusion_text(tests: Tests, class_names: tuple[str, ...]) -> str:
    """JSON: the names of the classes, and ``matrix`` (and ``ema_matrix``), a line for each row."""
    parts: dict[str, Any] = {"classes": json.dumps(class_names)}
    for before, test in tests.items():
        parts[f"{before}matrix"] = "[\n  " + ",\n  ".join(json.dumps(row) for row in test.confusion.tolist()) + "\n ]"
    return "{\n " + ",\n ".join(f"{json.dumps(name)}: {text}" for name, text in parts.items()) + "\n}\n"
