"""Arrays in an .npz file: every pixel in every layout; what is not clear, or not what it should be, is refused."""

import io
import zipfile

import numpy as np
import pytest

from tests.preparing import prepared, refusal

RNG = np.random.default_rng(0)
IMAGES = {split: RNG.integers(0, 256, (n, 3, 5, 7), np.uint8) for split, n in (("train", 30), ("test", 9))}
LABELS = {split: np.arange(len(images)) % 4 for split, images in IMAGES.items()}


def arrays(**others: np.ndarray) -> dict[str, np.ndarray]:
    made = {f"{split}_images": images for split, images in IMAGES.items()}
    return made | {f"{split}_labels": labels for split, labels in LABELS.items()} | others


def saved(path, **values: np.ndarray):
    np.savez_compressed(path, **values)
    return path


@pytest.mark.parametrize("layout", ["", "--layout"])
@pytest.mark.parametrize("name, change, back", [
    ("NCHW", lambda x: x, lambda x: x),
    ("NHWC", lambda x: x.transpose(0, 2, 3, 1), lambda x: x),
    ("NHW", lambda x: x[:, 0], lambda x: x[:, :1]),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_every_pixel_in_every_layout(tmp_path, layout, name, change, back, dtype):
    values = {f"{split}_images": change(images) for split, images in IMAGES.items()}
    values |= {f"{split}_labels": labels.astype(dtype) for split, labels in LABELS.items()}
    dataset = prepared("numpy", saved(tmp_path / "a.npz", **values), tmp_path / "o.h5", *((layout, name) if layout else ()))
    for split in ("train", "test"):
        np.testing.assert_array_equal(getattr(dataset, split).images, back(IMAGES[split]))
        np.testing.assert_array_equal(getattr(dataset, split).labels, LABELS[split])
    assert dataset.class_names == tuple("0123") and dataset.licence == "not stated"


def test_held_out_whatever_the_order(tmp_path):
    order = RNG.permutation(30)
    one = saved(tmp_path / "1.npz", images=IMAGES["train"], labels=LABELS["train"])
    two = saved(tmp_path / "2.npz", images=IMAGES["train"][order], labels=LABELS["train"][order])
    made = [prepared("numpy", path, tmp_path / f"{path.stem}.h5", "--test-fraction", 0.25) for path in (one, two)]
    sets = [{image.tobytes() for image in dataset.test.images} for dataset in made]
    assert sets[0] == sets[1]
    assert np.bincount(made[0].test.labels).tolist() == [2, 2, 2, 2]
    everything = np.concatenate([made[0].train.images, made[0].test.images])
    assert {image.tobytes() for image in everything} == {image.tobytes() for image in IMAGES["train"]}
    where = {image.tobytes(): label for image, label in zip(IMAGES["train"], LABELS["train"], strict=True)}
    for split in (made[0].train, made[0].test):
        assert [where[image.tobytes()] for image in split.images] == split.labels.tolist()


def test_names_allow_for_classes_without_samples(tmp_path, capsys):
    path = saved(tmp_path / "a.npz", **arrays(train_labels=LABELS["train"] % 3, test_labels=LABELS["test"] % 3 + 1))
    assert "labels up to 3, but none to train is 3" in refusal(capsys, "numpy", path, tmp_path / "o.h5")
    dataset = prepared("numpy", path, tmp_path / "o.h5", "--class-names", "a,b,c,d,e")
    assert dataset.class_names == tuple("abcde")
    line = refusal(capsys, "numpy", path, tmp_path / "p.h5", "--class-names", "a,b,c")
    assert "has the label 3, --class-names gives 3" in line
    path = saved(tmp_path / "b.npz", **arrays(train_labels=LABELS["train"] + 1))
    assert "none to train is 0" in refusal(capsys, "numpy", path, tmp_path / "p.h5")
    path = saved(tmp_path / "c.npz", **arrays(train_labels=LABELS["train"] + (LABELS["train"] > 2) * 2_000_000_000))
    assert "none to train is 3" in refusal(capsys, "numpy", path, tmp_path / "p.h5")


TRAIN = IMAGES["train"]
BAD = {
    "floats": (arrays(train_images=TRAIN / 255), "train_images are float64 (30, 3, 5, 7): save uint8"),
    "flat": (arrays(train_images=TRAIN.reshape(30, -1)), "train_images are uint8 (30, 105)"),
    "no images": (arrays(test_images=TRAIN[:0], test_labels=LABELS["train"][:0]), "test_images are uint8 (0, 3, 5, 7)"),
    "float labels": (arrays(test_labels=LABELS["test"] / 1), "test_labels are float64 (9,): save a whole number"),
    "column": (arrays(test_labels=LABELS["test"][:, None]), "test_labels are int64 (9, 1)"),
    "fewer labels": (arrays(test_labels=LABELS["test"][1:]), "test_labels are int64 (8,)"),
    "negative": (arrays(test_labels=LABELS["test"] - 1), "test_labels go from -1 to 2"),
    "beyond": (arrays(test_labels=LABELS["test"] + 2**32), "number the classes from 0"),
    "other shape": (arrays(test_images=IMAGES["test"][:, :, :4]), "have shape (3, 5, 7), to test (3, 4, 7)"),
    "both first and last": (arrays(train_images=TRAIN[..., :3]), "give --layout NCHW or NHWC"),
    "neither": (arrays(train_images=np.repeat(TRAIN, 2, axis=1)), "give --layout NCHW or NHWC"),
    "other names": ({"x": TRAIN, "y": LABELS["train"]}, "has the arrays none: save train_images"),
    "a half": ({"train_images": TRAIN, "train_labels": LABELS["train"]}, "has the arrays train_images, train_labels: save"),
    "no test split": ({"images": TRAIN, "labels": LABELS["train"]}, "--test-fraction 0.1"),
    "objects": (arrays(train_labels=np.array([None] * 30)), "cannot be read as an .npz file: Object arrays"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_arrays_are_refused(tmp_path, capsys, kind):
    values, reason = BAD[kind]
    assert reason in refusal(capsys, "numpy", saved(tmp_path / "a.npz", **values), tmp_path / "o.h5")


def test_flags_that_do_not_fit_are_refused(tmp_path, capsys):
    path = saved(tmp_path / "a.npz", **arrays())
    assert "has a test split already" in refusal(capsys, "numpy", path, tmp_path / "o.h5", "--test-fraction", "0.1")
    assert "images have 4 dimensions" in refusal(capsys, "numpy", path, tmp_path / "o.h5", "--layout", "NHW")


def member(content: bytes) -> bytes:
    """A zip file of all arrays, in which the images to train are ``content``."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, array in arrays().items():
            file = io.BytesIO()
            np.save(file, array)
            archive.writestr(f"{name}.npy", content if name == "train_images" else file.getvalue())
    return made.getvalue()


def marked(content: bytes, place: int, value: int) -> bytes:
    """A zip file of which every member says so at this place of its entry: 8 the flags, 10 the compression."""
    for mark, before in ((b"PK\1\2", 0), (b"PK\3\4", 2)):
        parts = content.split(mark)
        at = place - before - len(mark)
        content = mark.join([parts[0], *(part[:at] + bytes([value]) + part[at + 1 :] for part in parts[1:])])
    return content


def header(shape: str) -> bytes:
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


ARRAY = io.BytesIO()
np.save(ARRAY, TRAIN)
FILES = {
    "missing": (None, "cannot be read as an .npz file: [Errno 2]"),
    "empty": (b"", "is not an .npz file"),
    "single": (ARRAY.getvalue(), "is not an .npz file: save images and labels together by np.savez"),
    "torn": (member(ARRAY.getvalue())[:-99], "is not an .npz file"),
    "damaged": (member(ARRAY.getvalue()).replace(TRAIN[5].tobytes(), bytes(105)), "cannot be read as an .npz file: Bad CRC-32"),
    "cut": (member(ARRAY.getvalue()[:-1]), "cannot be read as an .npz file"),
    "announces too much": (member(header("(1099511627776, 1024, 1024)") + b"x" * 99), "cannot be read as an .npz file"),
    "encrypted": (marked(member(ARRAY.getvalue()), 8, 1), "cannot be read as an .npz file: File"),
    "packed in another way": (marked(member(ARRAY.getvalue()), 10, 1), "cannot be read as an .npz file: That compression"),
    "text": (member(b"hello"), "train_images is not an array"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_bad_files_are_refused(tmp_path, capsys, kind):
    content, reason = FILES[kind]
    if content is not None:
        (tmp_path / "a.npz").write_bytes(content)
    assert reason in refusal(capsys, "numpy", tmp_path / "a.npz", tmp_path / "o.h5")
