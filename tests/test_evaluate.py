"""Evaluating and predicting from the command line: the figures of the run, and what does not fit."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from dpresnet import evaluate, predict
from dpresnet.data import load
from dpresnet.datasets import schema
from dpresnet.evaluation import Evaluation, answers
from tests.launching import Finished, python


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    done = python(["-m", "dpresnet.train", "--epochs", "4", "--ema", "0.9", "--out", out])
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def checkpoint(run):
    return max((run / "checkpoints").glob("step-*.h5"))


def called(capfd, command, *words):
    """The command, in this process."""
    capfd.readouterr()
    code = command.main([str(word) for word in words])
    return Finished(code, *capfd.readouterr(), 0.0)


@pytest.mark.parametrize(("flags", "before"), [([], "ema_"), (["--no-ema"], "")])
def test_figures_are_those_of_the_run(capfd, run, checkpoint, tmp_path, flags, before):
    done = called(capfd, evaluate, checkpoint, "--json", tmp_path / "found.json", *flags)
    assert done.returncode == 0, done.stderr
    found, result = (json.loads(path.read_text()) for path in (tmp_path / "found.json", run / "result.json"))
    assert (found["accuracy"], found["top5"]) == (result[f"{before}test_accuracy"], result[f"{before}test_top5"])
    assert found["loss"] == pytest.approx(result[f"{before}test_loss"], rel=1e-6)
    assert found["matrix"] == json.loads((run / "confusion.json").read_text())[f"{before}matrix"]
    assert (found["ema"], found["step"], found["images"]) == (bool(before), result["steps"], 359)
    assert done.stdout.startswith(f"accuracy {result[f'{before}test_accuracy']:.2%}, top-5 ")


def test_other_samples_of_the_same_kind(capfd, checkpoint, tmp_path):
    digits = load("digits")
    some = schema.Split(digits.test.images[:50], digits.test.labels[:50])
    schema.write(tmp_path / "some.h5", schema.assemble("some", "digits", "as digits", digits.class_names, some, some))
    found = tmp_path / "found.json"
    done = called(capfd, evaluate, checkpoint, tmp_path / "some.h5", "--split", "train", "--json", found)
    assert done.returncode == 0, done.stderr
    assert json.loads(found.read_text())["images"] == 50


@pytest.mark.parametrize(("names", "size", "said"), [
    (tuple("abcdefghij"), 8, "has the classes 10 (a, b, c, ...), the network was trained on 10 (0, 1, 2, ...) of digits"),
    (tuple("0123456789"), 9, "has images of [1, 9, 9], the network was trained on [1, 8, 8]"),
])  # fmt: skip
def test_data_of_another_kind_are_refused(capfd, checkpoint, tmp_path, names, size, said):
    split = schema.Split(np.arange(2 * size * size, dtype=np.uint8).reshape(2, 1, size, size), np.array([0, 1], np.int32))
    schema.write(tmp_path / "other.h5", schema.assemble("other", "made", "none", names, split, split))
    done = called(capfd, evaluate, checkpoint, tmp_path / "other.h5")
    assert done.returncode == 78 and done.stderr == f"error: {tmp_path}/other.h5 {said}\n"


def test_what_a_class_is_taken_for_most_is_named():
    logits = np.eye(3)[[0, 1, 1, 2, 1]]
    text = evaluate.report(Evaluation(3, 5.0, answers(logits, np.array([0, 0, 0, 1, 1]))), ["cat", "dog", "frog"])
    assert text.splitlines() == [
        "accuracy 40.00%, loss 1.0000, 5 images",
        "  cat   33.33%, taken for dog 2 times",
        "  dog   50.00%, taken for frog 1 times",
        "  frog no images",
    ]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Test images as they are, and five times as large, which is scaled back exactly to the mean of equal pixels."""
    folder, digits = tmp_path_factory.mktemp("pictures"), load("digits")
    for index in range(6):
        Image.fromarray(digits.test.images[index, 0]).save(folder / f"{index}.png")
    return sorted(folder.iterdir())


def test_predictions_are_the_softmax_of_the_samples(capfd, checkpoint, pictures):
    from dpresnet import Classifier

    done = called(capfd, predict, checkpoint, *pictures, "--json", "--top", "10")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["image"] for line in lines] == list(map(str, pictures))
    shares = Classifier(checkpoint).probabilities(load("digits").test.images[:6])
    for line, row in zip(lines, shares, strict=True):
        assert list(line["classes"].values()) == sorted(line["classes"].values(), reverse=True)
        np.testing.assert_allclose([line["classes"][str(k)] for k in range(10)], row, atol=1e-6)


def test_colour_pictures_of_any_size_are_taken(capfd, checkpoint, pictures, tmp_path):
    with Image.open(pictures[0]) as image:
        image.resize((40, 64)).convert("RGB").save(tmp_path / "large.webp")
    done = called(capfd, predict, checkpoint, tmp_path / "large.webp", "--top", "2")
    assert done.returncode == 0 and done.stdout.count("%") == 2, done.stderr


def broken(path):
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)).save(data, "PNG")
    path.write_bytes(data.getvalue()[:900])
    return path


@pytest.mark.parametrize(("make", "said"), [
    (broken, "picture.png: it is damaged"),
    (lambda path: path, "picture.png cannot be read: No such file or directory"),
    (lambda path: path.mkdir() or path, "picture.png cannot be read: Is a directory"),
    (lambda path: path.with_suffix(".txt"), "picture.txt is no image by its name"),
])  # fmt: skip
def test_pictures_that_cannot_be_used_are_refused(capfd, checkpoint, tmp_path, make, said):
    done = called(capfd, predict, checkpoint, make(tmp_path / "picture.png"))
    assert done.returncode == 78 and said in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [evaluate, predict], ids=["evaluate", "predict"])
def test_what_is_no_checkpoint_is_refused(capfd, tmp_path, command):
    (tmp_path / "other.h5").write_bytes(b"none")
    words = [tmp_path / "other.h5", *([tmp_path] * (command is predict))]
    done = called(capfd, command, *words)
    assert done.returncode == 78 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
