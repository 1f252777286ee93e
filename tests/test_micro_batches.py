"""Steps of several micro-batches, and groups of replicas that share statistics: one process, to the bit where it can be."""

import numpy as np
import pytest
from test_trainer import HYPER, gradients, make, samples, split, worst

from dpresnet.amp import LossScaler
from dpresnet.device import Device, choose_device
from dpresnet.errors import GaveUp
from dpresnet.optimizer import Hyper
from dpresnet.trail import Trail


@pytest.fixture(scope="module")
def device() -> Device:
    return Device(choose_device())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("micro_batches", "count"), [(2, 8), (3, 12), (3, 10)])
@pytest.mark.parametrize("buckets", [{}, {"first_bucket_mb": 0.01, "bucket_mb": 0.05}], ids=["one bucket", "many"])
def test_micro_batches_are_added_like_replicas_that_normalise_apart(device, precision, micro_batches, count, buckets):
    """Up to three, the tree over replicas adds in the order of micro-batches, so every bit of the parameters is the same."""
    replicas = make(device, 4, micro_batches, precision, group=1)
    accumulating = make(device, 4, 1, precision, accumulate=True, **buckets)
    for seed in range(3):
        images, labels = samples(count, seed)
        one = replicas.step(split(images, labels, 4, micro_batches), count, 0.1, HYPER)
        other = accumulating.step(split(images, labels, 4, 1, micro_batches), count, 0.1, HYPER)
        assert one == other
    arrays = [{n: a for n, a in t.arrays().items() if not n.startswith("buffer/")} for t in (replicas, accumulating)]
    assert all(np.array_equal(arrays[0][name], arrays[1][name]) for name in arrays[0])


def test_fewer_micro_batches_than_before_leave_nothing_behind(device):
    """The last step of an epoch may have one; what the steps before have accumulated does not enter."""
    used, fresh = (make(device, 4, 1, accumulate=True) for _ in range(2))
    used.step(split(*samples(12), 4, 1, 3), 12, 0.0, Hyper(momentum=0.0))
    fresh.restore(used.arrays())
    for trainer in (used, fresh):
        trainer.step(split(*samples(4, 1), 4, 1), 4, 0.1, HYPER)
    assert used.digest() == fresh.digest()


@pytest.mark.parametrize("group", [0, 1])
def test_running_statistics_follow_every_micro_batch(device, group):
    """The first norm sees the images through the same weights, so each step of its statistics can be told by itself."""
    both = make(device, 4, 2, group=group, accumulate=True)
    both.step(split(*samples(16), 4, 2, 2), 16, 0.0, HYPER)
    parts = []
    for half in range(2):
        images, labels = (array[8 * half : 8 * half + 8] for array in samples(16))
        alone = make(device, 4, 2, group=group)
        alone.step(split(images, labels, 4, 2), 8, 0.0, HYPER)
        parts.append({part: alone.replicas.buffer(f"bn1.running_{part}").copy() for part in ("mean", "var")})
    for part, start in (("mean", 0.0), ("var", 1.0)):
        first, second = parts[0][part], parts[1][part]
        expected = 0.9 * first + (second - 0.9 * start)
        assert np.allclose(both.replicas.buffer(f"bn1.running_{part}"), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [0, 1])
def test_overflow_in_any_micro_batch_drops_the_step(device, bad):
    trainer = make(device, 4, 1, "fp16", accumulate=True)
    before = trainer.arrays()
    images, labels = samples(8)
    images[4 * bad] = 3e4
    images[4 * bad, :, ::2] = -3e4
    assert trainer.step(split(images * 2, labels, 4, 1, 2), 8, 0.1, HYPER).skipped
    after = trainer.arrays()
    assert all(np.array_equal(after[name], before[name]) for name in before)


def test_give_up_names_the_micro_batch(device):
    trainer = make(device, 4, 1, scaler=LossScaler.disabled(), accumulate=True)
    images, labels = samples(12)
    images[5, 0, 0, 0] = np.nan
    with pytest.raises(GaveUp, match=r"entry 0 \(input\) of replica 0 wrote .* into input in micro-batch 1$"):
        trainer.step(split(images, labels, 4, 1, 3), 12, 0.1, HYPER)


# Groups that share statistics


@pytest.mark.parametrize("group", [1, 2])
def test_running_statistics_of_groups_are_those_of_the_whole_batch_for_the_first_layer(device, group):
    """The first norm sees the same input whoever shares; only what it normalises with differs."""
    all_share, some_share = (make(device, 2, 4, group=size) for size in (0, group))
    for trainer in (all_share, some_share):
        trainer.step(split(*samples(8), 2, 4), 8, 0.1, HYPER)
    assert np.array_equal(all_share.replicas.buffer("bn1.running_var"), some_share.replicas.buffer("bn1.running_var"))
    assert not np.array_equal(*(t.replicas.buffer("layer1.0.bn2.running_var") for t in (all_share, some_share)))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_group_of_all_is_sync_and_of_one_is_local(device, precision):
    for same in ((0, 4), (1, 1)):
        one, other = (make(device, 2, 4, precision, group=group) for group in same)
        for trainer in (one, other):
            trainer.step(split(*samples(7), 2, 4), 7, 0.1, HYPER)
        assert one.digest() == other.digest()


def test_groups_normalise_apart(device):
    """Two groups of two replicas that share give the mean of the gradients of two separate runs."""
    images, labels = samples(8)
    both = gradients(make(device, 2, 4, group=2), images, labels)
    alone = make(device, 2, 2)
    first, second = (gradients(alone, images[cut], labels[cut]) for cut in (slice(0, 4), slice(4, 8)))
    assert worst(both, {name: (first[name] + second[name]) / 2 for name in first}) < 1e-6
    for other in (0, 1):
        assert worst(both, gradients(make(device, 2, 4, group=other), images, labels)) > 1e-3


# Trails


@pytest.mark.parametrize(("arch", "precision"), [("resnet20", "fp16"), ("resnext50_32x4d", "fp32")])
def test_digests_follow_from_state_and_samples_alone(device, arch, precision):
    """Whatever memory held before: a run that is repeated from a checkpoint on has not been where the recorded one was."""
    facts = {"arch": arch, "precision": precision, "accumulate": True}
    trails = []
    for garbage in (0, 0xFF):  # zeros, and numbers that are none
        trainer = make(device, 4, 2, **facts)
        for replica in trainer.replicas.all:
            for arena in replica.memory.homes["work"] + replica.memory.homes["statistic"]:
                arena.view(0, (arena.nbytes,), np.uint8)[:] = garbage
        trainer.trail = Trail()
        trainer.step(split(*samples(11), 4, 2, 2), 11, 0.1, HYPER)  # one replica without images in the end
        trails.append(trainer.trail.marks)
    assert len(trails[0]) > 1000
    assert [mark for mark, other in zip(*trails, strict=True) if mark != other] == []
