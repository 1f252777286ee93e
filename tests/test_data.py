"""Samples: their order, the batches of every rank, prefetching, and the synthetic set.

Which samples a step should have is worked out here from the definition, sample by sample, not from the loader's slices.
"""

import gc
import random
import threading
import time

import numpy as np
import pytest

from dpresnet import data
from tests.launching import python


def numbered(n: int) -> data.Split:
    """Samples that can be told apart by their pixels and by their labels."""
    values = np.arange(n)
    images = np.stack([values % 256, values // 256], axis=1).astype(np.uint8).reshape(n, 2, 1, 1)
    return data.Split(images, (values * 7 % 11).astype(np.int32))


# The synthetic set


def test_synthetic_is_a_function_of_its_arguments():
    indices = np.array([0, 5, 2047, 5])
    one, two = (data.load("synthetic", seed=1, image=9, channels=2, classes=3) for _ in range(2))
    np.testing.assert_array_equal(one.train.take(indices), two.train.take(indices))
    assert one.fingerprint == two.fingerprint
    assert (one.shape, one.classes, len(one.train), len(one.test)) == ((2, 9, 9), 3, 2048, 512)
    assert one.train.take(indices).dtype == np.uint8 and one.train.take(indices[:0]).shape == (0, 2, 9, 9)
    other = data.load("synthetic", seed=2, image=9, channels=2, classes=3)
    assert other.fingerprint != one.fingerprint
    assert (other.train.take(indices) != one.train.take(indices)).mean() > 0.9


def test_synthetic_is_pinned():
    dataset = data.load("synthetic", image=4, channels=1)
    pixels = [147, 129, 74, 143, 66, 217, 125, 111, 219, 230, 32, 220, 177, 93, 47, 75]
    assert dataset.train.take(np.array([12])).ravel().tolist() == pixels
    assert dataset.train.labels[12] == 2 and dataset.test.labels[0] == 8


def test_synthetic_samples_do_not_depend_on_their_company():
    split = data.load("synthetic", image=8).train
    together = split.take(np.arange(100))
    for index in (0, 17, 99):
        np.testing.assert_array_equal(split.take(np.array([index]))[0], together[index])


def test_synthetic_can_be_learnt_and_not_by_heart():
    """The nearest class mean, worked out from training samples, tells every test sample; no two samples are equal."""
    dataset = data.load("synthetic", seed=5, image=16)
    train, test = (split.take(np.arange(len(split))).reshape(len(split), -1) for split in (dataset.train, dataset.test))
    means = np.stack([train[dataset.train.labels == k].mean(axis=0) for k in range(10)])
    distances = ((test[:, None].astype(np.float32) - means) ** 2).sum(axis=2)
    np.testing.assert_array_equal(distances.argmin(axis=1), dataset.test.labels)
    assert len({row.tobytes() for row in np.concatenate([train, test])}) > 2400
    np.testing.assert_allclose(dataset.mean, (train.reshape(-1, 3, 256) / 255).mean(axis=(0, 2)), atol=0.01)


def test_synthetic_of_large_images_is_small():
    dataset = data.load("synthetic", image=224, classes=0)
    assert dataset.classes == 10
    assert sum(array.nbytes for array in vars(dataset.train).values() if isinstance(array, np.ndarray)) < 1e6


# The order of samples


def test_order_is_pinned():
    """These constants are promises: a run that is resumed by a later version goes on with the same samples."""
    assert data.order(0, 0, 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert data.order(0, 1, 10).tolist() == [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]
    assert data.order(1, 0, 10).tolist() == [3, 5, 2, 9, 7, 0, 8, 6, 1, 4]
    assert data.order(0, 0, 1438)[:8].tolist() == [1051, 998, 162, 670, 664, 185, 322, 431]


@pytest.mark.parametrize("n", [1, 2, 1438, 5000])
def test_order_is_a_permutation(n):
    order = data.order(3, 4, n)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(n))


def test_order_is_uniform():
    """Every sample comes first equally often: chi-squared with 9 degrees of freedom, the 99.9 % point is 27.9."""
    first = np.bincount([data.order(7, epoch, 10)[0] for epoch in range(2000)], minlength=10)
    assert ((first - 200) ** 2 / 200).sum() < 27.9


# Batches


def expected_replica(position: int, replicas: int, batch: int) -> tuple[int, int]:
    """Which (step, replica) the sample at ``position`` in the order belongs to."""
    return position // (replicas * batch), position % (replicas * batch) // batch


def combinations(count: int) -> list[tuple[int, int, int, int]]:
    """(n, V, b, P) at random, with P a divisor of V; the first few have a last batch with empty replicas."""
    rng = random.Random(8)
    fixed = [(17, 4, 4, 2), (33, 4, 8, 4), (1, 3, 2, 3), (24, 4, 3, 2)]
    drawn = [(rng.randrange(1, 150), rng.randrange(1, 7), rng.randrange(1, 9)) for _ in range(count)]
    return fixed + [(n, v, b, rng.choice([p for p in range(1, v + 1) if v % p == 0])) for n, v, b in drawn]


def ranks_of(split: data.Split, order: np.ndarray, replicas: int, batch: int, ranks: int, start: int = 0) -> list:
    """What each of ``ranks`` iterates over."""
    share = replicas // ranks
    owned = [range(rank * share, (rank + 1) * share) for rank in range(ranks)]
    return [list(data.Loader(split, order, replicas, batch, local, start)) for local in owned]


@pytest.mark.parametrize(("n", "replicas", "batch", "ranks"), combinations(40))
def test_every_sample_once_in_its_place(n, replicas, batch, ranks):
    split, order = numbered(n), data.order(1, 2, n)
    seen = {}
    for rank, batches in enumerate(ranks_of(split, order, replicas, batch, ranks)):
        for step, shards, count in batches:
            assert count == min(replicas * batch, n - step * replicas * batch)
            assert len(shards) == replicas // ranks
            for local, shard in enumerate(shards):
                seen[step, rank * len(shards) + local] = shard.indices.tolist()
                np.testing.assert_array_equal(shard.images, split.images[shard.indices])
                np.testing.assert_array_equal(shard.labels, split.labels[shard.indices])
                assert shard.images.shape[1:] == (2, 1, 1) and shard.labels.dtype == np.int32
    expected = {key: [] for key in seen}
    for position, sample in enumerate(order.tolist()):
        expected[expected_replica(position, replicas, batch)].append(sample)
    assert seen == expected


@pytest.mark.parametrize("start", [0, 1, 3, 6, 7])
def test_resuming_gives_exactly_the_tail(start):
    split, order = numbered(50), data.order(0, 0, 50)
    whole, tail = (ranks_of(split, order, 4, 2, 2, at) for at in (0, start))
    for all_batches, last_batches in zip(whole, tail, strict=True):
        assert [batch.step for batch in last_batches] == list(range(start, 7))
        for one, other in zip(all_batches[start:], last_batches, strict=True):
            assert [s.indices.tolist() for s in one.shards] == [s.indices.tolist() for s in other.shards]
    assert len(data.Loader(split, order, 4, 2, range(4), start)) == 7 - start


def test_start_outside_the_epoch_is_an_error():
    for start in (-1, 8):
        with pytest.raises(ValueError, match=f"start {start} is outside an epoch of 7 steps"):
            data.Loader(numbered(50), np.arange(50), 4, 2, range(4), start)


def test_loader_serves_the_synthetic_set():
    split = data.load("synthetic", image=6).test
    (batches,) = ranks_of(split, np.arange(512), 3, 50, 1)
    indices = [shard.indices for batch in batches for shard in batch.shards]
    images = np.concatenate([shard.images for batch in batches for shard in batch.shards])
    np.testing.assert_array_equal(np.concatenate(indices), np.arange(512))
    np.testing.assert_array_equal(images, split.take(np.arange(512)))


def test_views_are_drawn_of_the_samples_and_images_of_a_shard_in_the_thread_that_makes_it():
    split, threads = numbered(50), set()

    def draw(indices, images):
        threads.add(threading.current_thread().name)
        return np.stack([indices, images[:, 0, 0, 0] + 256 * images[:, 1, 0, 0].astype(int)], axis=1)

    loader = data.Loader(split, data.order(0, 0, 50), 4, 2, range(2, 4), draw=draw)
    for shard in (shard for batch in loader for shard in batch.shards):
        np.testing.assert_array_equal(shard.views, np.stack([shard.indices] * 2, axis=1))
    assert threads == {"dpresnet-prefetch_0"}


# Prefetching


class Recorder(data.Split):
    """Notes what is taken and fails at one sample."""

    def __init__(self, n: int, fail_at: int = -1):
        base = numbered(n)
        super().__init__(base.images, base.labels)
        vars(self).update(fail_at=fail_at, taken=[], threads=set())

    def take(self, indices: np.ndarray) -> np.ndarray:
        self.taken.extend(indices.tolist())
        self.threads.add(threading.current_thread().name)
        if self.fail_at in indices:
            raise OSError("disk on fire")
        return super().take(indices)


def prefetchers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("dpresnet-prefetch")]


def wait_until(condition, seconds: float = 5.0) -> None:
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.005)


def test_two_batches_are_made_ahead_in_another_thread():
    split = Recorder(40)
    batches = iter(data.Loader(split, np.arange(40), 1, 4, range(1)))
    for used in (1, 2, 3):
        assert next(batches).step == used - 1
        wait_until(lambda expected=4 * (used + 2): len(split.taken) == expected)
        time.sleep(0.02)
        assert len(split.taken) == 4 * (used + 2)
    assert split.threads == {"dpresnet-prefetch_0"}
    batches.close()


def test_exception_comes_out_at_its_batch_with_its_traceback():
    batches = iter(data.Loader(Recorder(40, fail_at=9), np.arange(40), 1, 4, range(1)))
    assert [next(batches).step, next(batches).step] == [0, 1]
    with pytest.raises(OSError, match="disk on fire") as error:
        next(batches)
    assert "take" in [entry.name for entry in error.traceback]
    with pytest.raises(StopIteration):
        next(batches)
    assert not prefetchers()


@pytest.mark.parametrize("leave", ["exhausted", "break", "raise", "close"])
def test_no_thread_is_left(leave):
    loader = data.Loader(numbered(400), np.arange(400), 2, 4, range(2))
    if leave == "exhausted":
        assert len(list(loader)) == 50
    elif leave == "break":
        for _ in loader:
            assert prefetchers()
            break
    elif leave == "raise":
        with pytest.raises(ZeroDivisionError):
            for _ in loader:
                raise ZeroDivisionError
    else:
        batches = iter(loader)
        next(batches)
        batches.close()
    gc.collect()
    assert not prefetchers()


EXIT_SCRIPT = """
import sys, time
import numpy as np
from dpresnet import data

class Slow(data.Split):
    def take(self, indices):
        time.sleep(0.1)
        return super().take(indices)

split = Slow(np.zeros((1000, 1, 2, 2), np.uint8), np.zeros(1000, np.int32))
batches = iter(data.Loader(split, np.arange(1000), 1, 2, range(1)))
print(next(batches).step, flush=True)
if sys.argv[1] == "raise":
    raise KeyError("boom")
"""


@pytest.mark.parametrize(("how", "code"), [("end", 0), ("raise", 1)])
def test_interpreter_exits_in_mid_epoch(how, code):
    done = python(["-c", EXIT_SCRIPT, how], timeout=30)
    assert (done.returncode, done.stdout) == (code, "0\n"), done.stderr
    assert ("boom" in done.stderr) == (how == "raise")
