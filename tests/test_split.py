"""Data sets larger than memory: a file gives the same samples as memory does, reads little, and tells where it is damaged."""

import json
import random
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest

from dpresnet import data
from dpresnet.datasets import schema
from dpresnet.datasets.split import FileSplit
from dpresnet.errors import Refused
from tests.launching import python

TRAIN, TEST = 1203, 77


def numbered(n: int, shape: tuple[int, int, int] = (3, 8, 8)) -> schema.Split:
    """Samples of random pixels, the first two of which tell their number."""
    images = np.random.default_rng(n).integers(0, 256, (n, *shape), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.arange(n) % 256, np.arange(n) // 256
    return schema.Split(images, (np.arange(n) * 7 % 11).astype(np.int32))


@pytest.fixture(scope="module")
def dataset() -> schema.Dataset:
    return schema.assemble("numbered", "", "", tuple("abcdefghijk"), numbered(TRAIN), numbered(TEST))


@pytest.fixture(scope="module")
def path(dataset, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "numbered.h5"
    schema.write(path, dataset)
    return path


@pytest.mark.parametrize("chunk_bytes, gzip", [(1, None), (16384, None), (50_000, 4), (10**9, 1)])
def test_a_file_split_has_what_the_resident_one_has(dataset, tmp_path, chunk_bytes, gzip):
    schema.write(tmp_path / "a.h5", dataset, chunk_bytes, gzip)
    found, rng = schema.read(tmp_path / "a.h5", budget_bytes=0), np.random.default_rng(0)
    for name in schema.SPLITS:
        mine, theirs = getattr(found, name), getattr(dataset, name)
        assert isinstance(mine, FileSplit) and (mine.shape, len(mine)) == ((3, 8, 8), len(theirs))
        np.testing.assert_array_equal(mine.labels, theirs.labels)
        for size in (0, 1, 5, len(theirs), 3000):  # repeated ones too
            indices = rng.integers(0, len(theirs), size)
            taken = mine.take(indices)
            assert taken.dtype == np.uint8
            np.testing.assert_array_equal(taken, theirs.images[indices])
    for name in ("name", "source", "licence", "class_names", "fingerprint"):
        assert getattr(found, name) == getattr(dataset, name)
    np.testing.assert_array_equal(found.mean, dataset.mean)


def test_chunks_are_small_checksummed_and_not_compressed(path, dataset, tmp_path):
    with h5py.File(path) as file:
        for name in schema.SPLITS:
            images, labels = file[f"{name}/images"], file[f"{name}/labels"]
            assert images.chunks == (min(16384 // 192, len(images)), 3, 8, 8)
            assert [d.fletcher32 and d.compression is None for d in (images, labels)] == [True, True]
    large = schema.assemble("large", "", "", ("a",), *(schema.Split(np.zeros((2, 3, 100, 99), np.uint8), np.zeros(2, np.int32))
                                                       for _ in range(2)))  # fmt: skip
    schema.write(tmp_path / "large.h5", large)
    with h5py.File(tmp_path / "large.h5") as file:
        assert file["train/images"].chunks == (1, 3, 100, 99)


def test_the_budget_decides_at_the_byte(path):
    need = (TRAIN + TEST) * 192
    assert isinstance(schema.read(path, need).train, schema.Split)
    assert isinstance(schema.read(path, need - 1).test, FileSplit)
    assert isinstance(data.load(str(path)).train, schema.Split)
    assert isinstance(data.load(str(path), budget_bytes=1).train, FileSplit)


def test_each_chunk_of_a_call_is_read_once_in_the_order_of_the_file(path, monkeypatch):
    split, read = schema.read(path, 0).train, []
    rows, original = split.images.chunks[0], FileSplit._rows

    def noted(self, first, stop, sample):
        assert first <= sample < stop <= min(first + rows, TRAIN)
        read.append(first)
        return original(self, first, stop, sample)

    monkeypatch.setattr(FileSplit, "_rows", noted)
    indices = np.random.default_rng(1).integers(0, TRAIN, 300)
    split.take(indices)
    assert read == sorted({int(i) // rows * rows for i in indices})


def combinations(count: int) -> list[tuple[int, int, int, int]]:
    rng = random.Random(5)
    return [(rng.randrange(1, TRAIN), rng.randrange(1, 7), rng.randrange(1, 40), seed) for seed in range(count)]


@pytest.mark.parametrize("n, replicas, batch, seed", combinations(25))
@pytest.mark.parametrize("shuffled", [True, False], ids=["training", "evaluation"])
def test_each_sample_once_per_epoch_from_the_file(path, dataset, n, replicas, batch, seed, shuffled):
    split, order = schema.read(path, 0).train, data.order(seed, 0, n) if shuffled else np.arange(n)
    seen, counted = Counter(), 0
    for rank in range(replicas):  # as many ranks as replicas
        for made in data.Loader(split, order, replicas, batch, range(rank, rank + 1)):
            (shard,) = made.shards
            counted += made.count if rank == 0 else 0
            numbers = shard.images[:, 0, 0, 0].astype(int) + 256 * shard.images[:, 0, 0, 1].astype(int)
            np.testing.assert_array_equal(numbers, shard.indices)
            np.testing.assert_array_equal(shard.images, dataset.train.images[shard.indices])
            np.testing.assert_array_equal(shard.labels, dataset.train.labels[shard.indices])
            seen.update(numbers.tolist())
    assert seen == Counter(range(n)) and counted == n


def test_a_damaged_chunk_is_refused_where_it_is_read(path, tmp_path):
    content = bytearray(path.read_bytes())
    with h5py.File(path) as file:
        rows, chunk = file["train/images"].chunks[0], file["train/images"].id.get_chunk_info(3)
    content[chunk.byte_offset + 100] ^= 1
    (tmp_path / "bad.h5").write_bytes(content)
    split = schema.read(tmp_path / "bad.h5", 0).train
    split.take(np.arange(3 * rows))
    expected = rf"{tmp_path}/bad.h5: /train/images is damaged at sample {3 * rows + 2}, in rows {3 * rows} to {4 * rows - 1} "
    with pytest.raises(Refused, match=expected) as refusal:
        split.take(np.array([0, 3 * rows + 2, TRAIN - 1]))
    assert "\n" not in str(refusal.value)


def test_labels_are_verified_without_reading_images(path, tmp_path):
    (tmp_path / "bad.h5").write_bytes(path.read_bytes())
    with h5py.File(tmp_path / "bad.h5", "r+") as file:
        file["test/labels"][5] = 11
    with pytest.raises(Refused, match="test has the label 11 at sample 5"):
        schema.read(tmp_path / "bad.h5", 0)


def test_chunks_too_large_to_read_samples_from_are_refused(tmp_path, dataset, monkeypatch):
    schema.write(tmp_path / "a.h5", dataset, chunk_bytes=100_000)
    monkeypatch.setattr(schema, "_LARGEST_CHUNK_BYTES", 99_000)
    with pytest.raises(Refused, match=r"--data-mb.*chunks of \(520, 3, 8, 8\), too large"):
        schema.read(tmp_path / "a.h5", 0)
    schema.read(tmp_path / "a.h5")


def test_writing_takes_what_is_put_together_as_it_is_asked_for(dataset, tmp_path, monkeypatch):
    """Rows in other memory orders, mapped from a file, and in blocks smaller than a chunk: the same bytes."""
    schema.write(tmp_path / "plain.h5", dataset)
    mapped = np.memmap(tmp_path / "rows", np.uint8, "w+", shape=(TRAIN, 8, 8, 3))
    mapped[:] = dataset.train.images.transpose(0, 2, 3, 1)
    train = schema.Split(mapped.transpose(0, 3, 1, 2), dataset.train.labels)
    monkeypatch.setattr(schema, "_BLOCK_BYTES", 5000)
    again = schema.assemble("numbered", "", "", dataset.class_names, train, dataset.test)
    schema.write(tmp_path / "again.h5", again)
    assert (tmp_path / "again.h5").read_bytes() == (tmp_path / "plain.h5").read_bytes()


def test_a_writer_that_fails_leaves_nothing(dataset, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(schema, "_write_split", full)
    with pytest.raises(OSError, match="no space left"):
        schema.write(tmp_path / "a.h5", dataset)
    assert not list(tmp_path.iterdir())


# In processes of their own

MEASURED = r"""
import re, sys
import numpy as np
from dpresnet import data

def resident():  # at its peak; getrusage would count what the process that started this one had
    return int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1]) * 1024

budget = 32 << 20
data.load("digits", budget_bytes=0).test.take(np.arange(9))
before, total = resident(), 0
split = data.load(sys.argv[1], budget_bytes=budget).train
for batch in data.Loader(split, data.order(0, 0, len(split)), 2, 64, range(2)):
    total += sum(shard.images[:, 0, 0, 0].sum(dtype=np.int64) for shard in batch.shards)
print(type(split).__name__, total, resident() - before)
"""
SLACK = 24 << 20  # labels, the order, HDF5's index of 20,000 chunks, batches under way


class Made:
    """Images that are made when they are asked for: zeros but for the first pixel, which is the number modulo 251."""

    dtype, ndim = np.dtype("u1"), 4

    def __init__(self, n: int):
        self.shape, self.size = (n, 3, 32, 32), n * 3072

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        numbers = np.arange(len(self))[rows]
        images = np.zeros((len(numbers), 3, 32, 32), np.uint8)
        images[:, 0, 0, 0] = numbers % 251
        return images


def test_memory_stays_within_the_budget(tmp_path):
    """100,000 images, 293 MiB."""
    images = Made(100_000)
    train, test = schema.Split(images, np.zeros(100_000, np.int32)), schema.Split(Made(1), np.zeros(1, np.int32))
    schema.write(tmp_path / "a.h5", schema.assemble("many", "", "", ("a",), train, test))
    done = python(["-c", MEASURED, str(tmp_path / "a.h5")])
    assert done.returncode == 0, done.stderr
    kind, total, growth = done.stdout.split()
    assert (kind, int(total)) == ("FileSplit", int((np.arange(100_000) % 251).sum()))
    assert int(growth) < (32 << 20) + SLACK


def test_damage_ends_a_run_that_reads_from_the_file_with_the_sample(path, tmp_path):
    content = bytearray(path.read_bytes())
    with h5py.File(path) as file:
        chunk = file["test/images"].id.get_chunk_info(0)
    content[chunk.byte_offset + 100] ^= 1
    (tmp_path / "bad.h5").write_bytes(content)
    flags = ("--dataset", tmp_path / "bad.h5", "--out", tmp_path / "run", "--epochs", "1", "--batch", "600")
    done = python(["-m", "dpresnet.train", *flags, "--data-mb", "0.01"])
    assert done.returncode == Refused.exit_code
    assert "/test/images is damaged at sample 0, in rows 0 to 76" in done.stderr and "Traceback" not in done.stderr
    assert '"loss"' in (tmp_path / "run" / "metrics.jsonl").read_text(), "the training split is whole"


def test_the_bits_of_a_run_do_not_depend_on_the_budget(path, tmp_path):
    results = []
    for name, flags in (("memory", ()), ("file", ("--data-mb", "0.001"))):
        out = tmp_path / name
        argv = ["-m", "dpresnet.train", "--dataset", path, "--replicas", "2", "--steps", "10", "--out", out, *flags]
        done = python(argv)
        assert done.returncode == 0, done.stderr
        results.append(json.loads((out / "result.json").read_text()))
        steps = [line for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
        assert len(steps) == 10
        assert all(0 <= line["input_ms"] <= 1e3 * 64 / line["images_per_s"] + 1 for line in steps)
    assert results[0]["params_sha256"] == results[1]["params_sha256"]
    assert results[0]["test_loss"] == results[1]["test_loss"]
