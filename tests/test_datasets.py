"""Data sets on disk: the embedded digits are what they claim to be, and damaged and foreign files are refused."""

import hashlib
import random
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from dpresnet import data
from dpresnet.datasets import make_digits, schema
from dpresnet.errors import Refused

# UCI's documentation (optdigits.names, "testing"): how many of each digit its test set has.
UCI_COUNTS = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
# Over the sorted rows of scikit-learn's sklearn/datasets/data/digits.csv.gz (1.9.1).
SKLEARN_SHA256 = "f67d6a29d0e1f70e7f0cd9dcf25816b694881f4b8f27f5cc1db59551f0499fb8"


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load("digits")


def small_dataset() -> schema.Dataset:
    random_bytes = np.random.default_rng(0).integers(0, 256, (9, 3, 4, 4), np.uint8)
    labels = np.arange(9, dtype=np.int32) % 3
    train, test = data.Split(random_bytes[:6], labels[:6]), data.Split(random_bytes[6:], labels[6:])
    return schema.assemble("small", "", "aucune, à ma connaissance", ("a", "b", "ß"), train, test)


def assert_same(a: schema.Dataset, b: schema.Dataset) -> None:
    for name in ("name", "source", "licence", "class_names", "fingerprint"):
        assert getattr(a, name) == getattr(b, name)
    for x, y in ((a.mean, b.mean), (a.std, b.std), (a.train, b.train), (a.test, b.test)):
        pairs = [(x.images, y.images), (x.labels, y.labels)] if isinstance(x, data.Split) else [(x, y)]
        for left, right in pairs:
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)


# The embedded digits


def test_digits_are_scikit_learns(digits):
    images = np.concatenate([digits.train.images, digits.test.images])
    labels = np.concatenate([digits.train.labels, digits.test.labels])
    assert images.shape == (1797, 1, 8, 8)
    assert np.bincount(labels).tolist() == UCI_COUNTS
    assert make_digits.content_sha256(make_digits.unscale(images), labels) == SKLEARN_SHA256
    np.testing.assert_array_equal(make_digits.scale(make_digits.unscale(images)), images)
    assert digits.class_names == tuple("0123456789")
    assert digits.shape == (1, 8, 8)
    assert "C50P49" in digits.source and "CC BY 4.0" in digits.licence


def test_digits_are_split_by_class(digits):
    counts = np.bincount(digits.test.labels, minlength=10)
    assert np.abs(counts - 0.2 * np.array(UCI_COUNTS)).max() <= 0.5
    assert (len(digits.train), len(digits.test)) == (1438, 359)
    assert digits.fingerprint == "50d57127ebb47f0e38a45a05c760c5b960908406159c2bfe311e82e961cccf5e"


def test_the_writer_of_digits_still_makes_the_file_of_this_repository(digits, tmp_path):
    schema.write(tmp_path / "digits.h5", digits, make_digits.CHUNK_BYTES, make_digits.GZIP)
    with h5py.File(tmp_path / "digits.h5") as mine, h5py.File(data.DIGITS) as theirs:
        for name in ("train/images", "train/labels", "test/images", "test/labels"):
            assert mine[name].chunks == theirs[name].chunks and mine[name].compression == theirs[name].compression == "gzip"
            assert mine[name].compression_opts == theirs[name].compression_opts
            np.testing.assert_array_equal(mine[name], theirs[name])


def test_digits_statistics(digits):
    values = digits.train.images.astype(np.float64) / 255
    np.testing.assert_allclose(digits.mean, values.mean(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(digits.std, values.std(axis=(0, 2, 3)), rtol=1e-6)


def test_scale_is_linear_and_invertible():
    values = np.arange(17)
    scaled = make_digits.scale(values)
    assert np.abs(scaled - values * 255 / 16).max() <= 0.5
    assert (scaled[0], scaled[16]) == (0, 255)
    np.testing.assert_array_equal(make_digits.unscale(scaled), values)


def test_split_is_a_partition_in_order_and_drawn_by_class():
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(10), UCI_COUNTS))
    train, test = make_digits.split(labels)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(1797))
    assert (np.diff(train) > 0).all() and (np.diff(test) > 0).all()
    assert np.abs(np.bincount(labels[test]) - 0.2 * np.array(UCI_COUNTS)).max() <= 0.5
    members = np.flatnonzero(labels == 3)
    assert not np.array_equal(np.intersect1d(test, members), members[:37]), "drawn, not the first ones"


def test_make_digits_refuses_other_digits():
    with pytest.raises(SystemExit, match="not the digits expected"):
        make_digits.build(np.zeros((2, 8, 8)), np.array([0, 1]))


# The file format


def test_file_returns_what_was_written_in_equal_bytes(tmp_path):
    dataset = small_dataset()
    schema.write(tmp_path / "a.h5", dataset)
    time.sleep(1.1)  # HDF5 keeps times in whole seconds
    schema.write(tmp_path / "b.h5", dataset)
    assert_same(data.load(str(tmp_path / "a.h5")), dataset)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", "b.h5"]


def test_many_chunks_are_read_in_place(tmp_path):
    rng = np.random.default_rng(2)
    splits = [data.Split(rng.integers(0, 256, (n, 1, 600, 600), np.uint8), np.zeros(n, np.int32)) for n in (5, 2)]
    dataset = schema.assemble("large", "nowhere", "none", ("only",), *splits)
    schema.write(tmp_path / "a.h5", dataset)
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["train/images"].chunks[0] == 1
    assert_same(schema.read(tmp_path / "a.h5"), dataset)


def test_fingerprint_is_that_of_the_documentation():
    dataset, digest = small_dataset(), hashlib.sha256()
    digest.update(b"train/images u1 6x3x4x4\n" + dataset.train.images.tobytes())
    digest.update(b"train/labels <i4 6\n" + dataset.train.labels.astype("<i4").tobytes())
    digest.update(b"test/images u1 3x3x4x4\n" + dataset.test.images.tobytes())
    digest.update(b"test/labels <i4 3\n" + dataset.test.labels.astype("<i4").tobytes())
    assert dataset.fingerprint == digest.hexdigest()


def test_constant_channel_keeps_a_usable_deviation():
    mean, std = schema.statistics(np.full((4, 2, 3, 3), 51, np.uint8))
    np.testing.assert_array_equal(mean, np.float32([0.2, 0.2]))
    np.testing.assert_array_equal(std, np.float32([1, 1]))


def test_statistics_of_more_images_than_a_block():
    images = np.random.default_rng(3).integers(0, 256, (2500, 2, 2, 3), np.uint8)
    mean, std = schema.statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(std, (images / 255).std(axis=(0, 2, 3)), rtol=1e-6)


def replace(file: h5py.File, name: str, array: np.ndarray, **options: object) -> None:
    del file[name]
    file.create_dataset(name, data=array, **({"chunks": array.shape, "fletcher32": True} | options))


def unwritten(file: h5py.File) -> None:
    del file["train/images"]
    file["train"].create_dataset("images", (10**9, 3, 4, 4), "u1", chunks=(1, 3, 4, 4), fletcher32=True)


def external_link(file: h5py.File) -> None:
    del file["train/images"]
    file["train/images"] = h5py.ExternalLink("secret.h5", "/data")


def soft_link(file: h5py.File) -> None:
    del file["test/labels"]
    file["test/labels"] = h5py.SoftLink("/train/labels")


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((6, 3, 4, 4), "u1")
    layout[:] = h5py.VirtualSource("secret.h5", "data", (6, 3, 4, 4))
    del file["train/images"]
    file.create_virtual_dataset("train/images", layout)


def external_storage(file: h5py.File) -> None:
    del file["train/labels"]
    file.create_dataset("train/labels", (6,), "i4", external=[("secret.h5", 0, 24)])


def empty_split(file: h5py.File) -> None:
    for name, array in (("test/images", IMAGES), ("test/labels", LABELS)):
        replace(file, name, array[:0], chunks=array.shape, maxshape=array.shape)


def group_for_dataset(file: h5py.File) -> None:
    del file["train/images"]
    file.create_group("train/images")


IMAGES, LABELS = np.zeros((6, 3, 4, 4), np.uint8), np.zeros(6, np.int32)
BAD_FILES = {
    "format": (lambda f: f.attrs.create("format", "other"), "\"format\" is 'other', not 'dpresnet-dataset'"),
    "no format": (lambda f: f.attrs.pop("format"), 'no attribute "format"'),
    "format is a number": (lambda f: f.attrs.create("format", 3), '"format" is not text'),
    "version": (lambda f: f.attrs.create("version", 2), "format version 2, this program reads version 1"),
    "no fingerprint": (lambda f: f.attrs.pop("fingerprint"), 'no attribute "fingerprint"'),
    "no split": (lambda f: f.pop("test"), "no /test"),
    "no labels": (lambda f: f.pop("train/labels"), "no /train/labels"),
    "a group": (group_for_dataset, "/train/images is a Group, not a Dataset"),
    "image type": (lambda f: replace(f, "train/images", IMAGES.astype("f4")), "/train/images is float32"),
    "image rank": (lambda f: replace(f, "train/images", IMAGES[0]), r"/train/images is uint8 \(3, 4, 4\)"),
    "label type": (lambda f: replace(f, "train/labels", LABELS.astype("i8")), "/train/labels is int64"),
    "label count": (lambda f: replace(f, "train/labels", LABELS[1:]), r"\(6, 3, 4, 4\) and labels int32 \(5,\)"),
    "label too large": (lambda f: replace(f, "test/labels", LABELS[:3] + 3), "test has the label 3 at sample 0"),
    "label negative": (lambda f: replace(f, "test/labels", LABELS[:3] - 1), "test has the label -1"),
    "image size": (lambda f: replace(f, "test/images", IMAGES[:3, :, :2]), r"test has images of shape \(3, 3, 2, 4\)"),
    "empty": (empty_split, r"test has images of shape \(0, 3, 4, 4\)"),
    "class names": (lambda f: f.attrs.create("class_names", "{}"), "class_names"),
    "class names type": (lambda f: f.attrs.create("class_names", "[1, 2, 3]"), "not a list of names"),
    "class names text": (lambda f: f.attrs.create("class_names", "[a"), "Expecting value"),
    "mean shape": (lambda f: f.attrs.create("mean", np.zeros(99, np.float32)), "mean is .* not 3 finite float32"),
    "mean nan": (lambda f: f.attrs.create("mean", np.float32([0, 0, np.nan])), "mean is .* not 3 finite float32"),
    "std zero": (lambda f: f.attrs.create("std", np.float32([1, 0, 1])), "std is .* not positive"),
    "other images": (lambda f: replace(f, "train/images", IMAGES), "content has the fingerprint"),
    "other fingerprint": (lambda f: f.attrs.modify("fingerprint", "0" * 64), "the file says 0000"),
    "no checksum": (lambda f: replace(f, "train/images", IMAGES, fletcher32=False), r"filters \[\], not fletcher32"),
    "other filter": (lambda f: replace(f, "train/images", IMAGES, compression="lzf"), r"filters \[3, 32000\], not"),
    "not chunked": (lambda f: replace(f, "train/images", IMAGES, chunks=None, fletcher32=None), "not stored in"),
    "never written": (unwritten, "has 0 chunks instead of 1000000000"),
    "external link": (external_link, "/train/images is a ExternalLink, only hard links"),
    "soft link": (soft_link, "/test/labels is a SoftLink, only hard links"),
    "virtual": (virtual, "/train/images is not stored in chunks in this file"),
    "external storage": (external_storage, "/train/labels is not stored in chunks in this file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file_is_refused(kind, tmp_path):
    damage, message = BAD_FILES[kind]
    path = tmp_path / "bad.h5"
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["data"] = IMAGES
    schema.write(path, small_dataset())
    with h5py.File(path, "r+") as file:
        damage(file)
    with pytest.raises(Refused, match=message) as refusal:
        data.load(str(path))
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"text", b"\xff\xd8\xff\xe0 JPEG" * 99])
def test_foreign_file_is_refused(content, tmp_path):
    (tmp_path / "bad.h5").write_bytes(content)
    with pytest.raises(Refused, match="not an HDF5 file"):
        data.load(str(tmp_path / "bad.h5"))


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(Refused, match=r"'digit' does not exist: give digits, synthetic or"):
        data.load("digit")
    with pytest.raises(Refused, match="cannot be opened: Is a directory"):
        data.load(str(tmp_path))


def test_damaged_chunk_is_named(tmp_path, digits):
    content = data.DIGITS.read_bytes()
    with h5py.File(data.DIGITS) as file:
        chunk = file["test/images"].id.get_chunk_info(0)
    middle = chunk.byte_offset + chunk.size // 2
    path = tmp_path / "digits.h5"
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(Refused, match="/test/images is damaged in rows 0 to 358: "):
        data.load(str(path))


def test_flipped_bits_and_truncation_never_pass(tmp_path, digits):
    """A flipped bit is refused or lies where nothing is kept; that is little space, so nearly all are refused."""
    path, rng, refused = tmp_path / "digits.h5", random.Random(4), 0
    schema.write(path, digits)
    content = path.read_bytes()
    flips = [rng.randrange(len(content)) for _ in range(100)] + [rng.randrange(6000) for _ in range(100)]
    for position in flips:  # the first 6000 bytes are mostly metadata
        flipped = bytes([content[position] ^ 1 << rng.randrange(8)])
        path.write_bytes(content[:position] + flipped + content[position + 1 :])
        try:
            assert_same(data.load(str(path)), digits)
        except Refused:
            refused += 1
    assert refused > 0.85 * len(flips)
    for length in (1, 511, 512, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(Refused):
            data.load(str(path))


def test_file_is_closed_after_reading(tmp_path):
    schema.write(tmp_path / "a.h5", small_dataset())
    data.load(str(tmp_path / "a.h5"))
    assert not [link for link in Path("/proc/self/fd").glob("*") if link.resolve() == tmp_path / "a.h5"]
    schema.write(tmp_path / "a.h5", small_dataset())


def test_writer_refuses_what_the_reader_would(tmp_path):
    dataset = small_dataset()
    wrong = schema.Split(dataset.test.images, dataset.test.labels + 1)
    with pytest.raises(ValueError, match="test has the label 3 at sample 2"):
        schema.write(tmp_path / "a.h5", schema.assemble("x", "x", "x", dataset.class_names, dataset.train, wrong))
    assert not list(tmp_path.iterdir())
