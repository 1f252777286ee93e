"""A checkpoint as a classifier: the run's own figures, from its file alone."""

import json

import numpy as np
import pytest

import dpresnet
from dpresnet.data import load
from dpresnet.errors import Refused
from tests.launching import python


@pytest.fixture(scope="module", params=["fp16", "fp32"])
def run(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / request.param
    done = python(["-m", "dpresnet.train", "--epochs", "3", "--precision", request.param, "--out", out])
    assert done.returncode == 0, done.stderr
    return out


def newest(run):
    return max((run / "checkpoints").glob("step-*.h5"))


@pytest.mark.parametrize(("batch", "tolerance"), [(0, 1e-6), (7, 1e-3)])
def test_accuracy_and_loss_are_those_of_the_run(run, batch, tolerance):
    """A short last batch counts what it has. Fewer images at a time may be convolved, and so rounded, in another way."""
    classifier, test = dpresnet.Classifier(newest(run), batch), load("digits").test
    result = json.loads((run / "result.json").read_text())
    found = classifier.evaluate(classifier.batches(test))
    assert found.accuracy == result["test_accuracy"]
    assert found.mean_loss == pytest.approx(result["test_loss"], rel=tolerance)
    np.testing.assert_array_equal(classifier.logits(test.images).argmax(axis=1), found.answers.predictions)


def test_of_a_run_the_best_epoch_is_taken(run):
    assert dpresnet.Classifier(run).saved.path == run / "checkpoints" / "best.h5"


def test_probabilities_are_the_softmax_in_any_order(run):
    classifier, test = dpresnet.Classifier(newest(run), 16), load("digits").test
    shares = classifier.probabilities(test.images[:20])
    logits = classifier.logits(test.images[:20]).astype(np.float64)
    np.testing.assert_allclose(shares, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), rtol=1e-6)
    np.testing.assert_array_equal(classifier.probabilities(test.images[:20][::-1]), shares[::-1])
    assert classifier.class_names == tuple("0123456789")
    assert classifier.probabilities(test.images[:0]).shape == (0, 10)


def test_what_does_not_fit_is_refused(run, tmp_path):
    classifier = dpresnet.Classifier(newest(run))
    with pytest.raises(ValueError, match=r"images are uint8 \[1, 3, 8, 8\], not uint8 \[N, 1, 8, 8\]"):
        classifier.logits(np.zeros((1, 3, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="images are float64"):
        classifier.logits(np.zeros((1, 1, 8, 8)))
    with pytest.raises(Refused, match="batch -1"):
        dpresnet.Classifier(newest(run), -1)


def test_checkpoints_that_do_not_know_their_classes_are_refused(run, tmp_path):
    saved = dpresnet.checkpoint.load(newest(run))
    path = dpresnet.checkpoint.save(tmp_path, 1, saved.arrays, {k: v for k, v in saved.meta.items() if k != "data"}, 1, False)
    with pytest.raises(Refused, match="does not say what its classes are"):
        dpresnet.Classifier(path)
