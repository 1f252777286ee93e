"""What `dpresnet.tune` tries: every candidate fits, runs and leaves the same bits; and what it picks."""

from collections import Counter
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import test_conv
import test_winograd
from harness import Bench, Mode, device_for, tuned_device
from test_conv import Shape

from dpresnet import tiles, tuning
from dpresnet.ops import winograd
from dpresnet.plan import Local
from dpresnet.resnet import Options
from tests.sweeps import in_sweeps

DIRECT = [
    Shape(3, 40, 20, 7, 5, 1),
    Shape(2, 3, 24, 15, 13, 7, 2, 3),  # the first layer
    Shape(2, 24, 40, 9, 8, 3, 2, 1),
    Shape(1, 32, 32, 9, 7, 3, 1, 1, 8),  # groups of four channels
    Shape(2, 16, 16, 6, 7, 3, 2, 1, 2),  # of eight channels
    Shape(2, 48, 64, 5, 6, 3, 1, 1, 2),  # groups that straddle blocks
]
LARGE = [
    Shape(8, 64, 64, 56, 56, 1),
    Shape(8, 2048, 512, 7, 7, 1),
    Shape(64, 512, 512, 4, 4, 3, 1, 1),
    Shape(8, 3, 64, 224, 224, 7, 2, 3),
    Shape(8, 128, 128, 56, 56, 3, 2, 1, 32),
    Shape(8, 512, 512, 14, 14, 3, 2, 1),
]
MODES = [Mode("fp16", "vector"), Mode("fp16", "narrow")]
each_vector = pytest.mark.parametrize("mode", MODES, ids=str)


def task_of(mode: Mode, shape: Shape, kernel: str, transposed: bool) -> tuning.Task:
    conv = test_conv.conv_of(Bench(mode), shape)
    return tuning.Task(conv, kernel, transposed)


def candidates(task: tuning.Task) -> list[tiles.Sizes]:
    """All that differ from the shipped sizes in one size."""
    shipped = task.conv.sizes(task.kernel, task.transposed)
    return [sizes for size in fields(shipped) for sizes in tuning.choices(task, size.name, shipped) if sizes != shipped]


def columns(mode: Mode, shape: Shape, stem: str) -> list[dict[str, tiles.Sizes]]:
    """Candidates of both kernels of a stem, side by side."""
    gather, weight = (candidates(task_of(mode, shape, f"{stem}_{verb}", False)) for verb in ("gather", "weight"))
    longest = max(len(gather), len(weight))
    return [{f"{stem}_gather": gather[i % len(gather)], f"{stem}_weight": weight[i % len(weight)]} for i in range(longest)]


@each_vector
@pytest.mark.parametrize("shape", [DIRECT[0], *in_sweeps(*DIRECT[1:])], ids=str)
def test_direct_candidates_change_no_bit(mode, shape):
    if mode.device.vector == 1:
        pytest.skip("this device has no register tiles")
    usual = test_conv.passes(mode, shape)
    for sizes in columns(mode, shape, "conv"):
        for bits, others in zip(usual, test_conv.passes(mode, shape, tuned_device(mode, sizes)), strict=True):
            np.testing.assert_array_equal(bits, others, err_msg=str(sizes))


@each_vector
@pytest.mark.parametrize("shape", [Shape(2, 17, 20, 5, 7, 3, 1, 1), *in_sweeps(Shape(3, 144, 80, 6, 13, 3, 1, 1))], ids=str)
def test_winograd_candidates_change_no_bit(mode, shape):
    if mode.device.vector == 1:
        pytest.skip("this device has no register tiles")
    usual = test_winograd.passes(shape, mode=mode)
    for sizes in columns(mode, shape, "winograd"):
        for bits, others in zip(usual, test_winograd.passes(shape, tuned_device(mode, sizes), mode), strict=True):
            np.testing.assert_array_equal(bits, others, err_msg=str(sizes))


@pytest.mark.parametrize("vector", [8, 16])
@pytest.mark.parametrize("local_bytes", [2**18, 2**20])
def test_candidates_fit_large_layers(monkeypatch, vector, local_bytes):
    """Layers of networks, recorded but not run: no launch asks for more local memory than there is."""
    device = device_for("vector")
    for shape in LARGE:
        conv = replace(test_conv.conv_of(Bench(MODES[0]), shape), vector=vector, local_bytes=local_bytes)
        stem = "winograd" if winograd.suits(conv) else "conv"
        for kernel, transposed in ((f"{stem}_gather", False), (f"{stem}_gather", True), (f"{stem}_weight", False)):
            task = tuning.Task(conv, kernel, transposed)
            for sizes in candidates(task):
                launch = tuning.launch_of(tuning.plan_of(device, task, sizes))
                assert sum(a.nbytes for a in launch.args if isinstance(a, Local)) <= local_bytes, sizes


def test_sizes_that_do_not_fit_are_not_used():
    """From a file that someone has edited."""
    conv = replace(test_conv.conv_of(Bench(MODES[0]), Shape(8, 64, 64, 8, 8, 3, 1, 1)), vector=16, local_bytes=160 * 1024)
    assert winograd.possible(conv)
    task, sizes = tuning.Task(conv, "winograd_gather", False), tiles.WinogradGather(31, 1, 1, 512)
    sides = [tuning.launch_of(tuning.plan_of(device_for("vector"), task, s)) for s in (sizes, conv.sizes("winograd_gather"))]
    assert tuning.signature(sides[0]) == tuning.signature(sides[1])
    larger = replace(task, conv=replace(conv, local_bytes=2**20))
    assert dict(tuning.launch_of(tuning.plan_of(device_for("vector"), larger, sizes)).defines)["TILE_P"] == 31


def test_segments_do_not_follow_sizes():
    """They decide in which order a gradient is summed."""
    for shape in (*DIRECT, Shape(32, 64, 64, 16, 16, 3, 1, 1)):
        conv = test_conv.conv_of(Bench(MODES[0]), shape)
        sizes = {"conv_weight": tiles.DirectWeight(4, 8, 16, 1), "winograd_weight": tiles.WinogradWeight(4, 8, 16)}
        other = test_conv.conv_of(Bench(MODES[0], tuned_device(MODES[0], sizes)), shape)
        assert other.sizes("conv_weight").pixels == 8
        assert (conv.segments, winograd.segments(conv)) == (other.segments, winograd.segments(other))
        assert winograd.suits(conv) == winograd.suits(other)


def tasks(arch: str, infer: bool) -> dict[str, tuning.Task]:
    found = tuning.tasks_of(device_for("vector"), arch, Options(10, "cifar"), 32, 8, "fp16", infer)
    assert "tuned" in vars(device_for("vector")) and not device_for("vector").tuned.entries
    return {task.key: task for task in found}


def test_tasks_are_the_launches_of_a_network():
    if device_for("vector").vector == 1:
        pytest.skip("this device has no register tiles")
    found = tasks("resnet20", False)
    assert "conv_gather forward fp16 8x3x32x32 to 16, 3x3 stride 1 padding 1 groups 1" in found
    assert "winograd_weight weight fp16 8x16x32x32 to 16, 3x3 stride 1 padding 1 groups 1" in found
    assert "conv_gather data fp16 8x16x32x32 to 32, 3x3 stride 2 padding 1 groups 1" in found
    assert not [key for key in found if "8x3x32x32" in key and " data " in key], "nobody needs the gradient of the images"
    forward = tasks("resnet20", True)
    assert forward.keys() == {key for key in found if " forward " in key}


def test_a_device_without_register_tiles_has_no_tasks():
    assert tuning.tasks_of(device_for("scalar"), "resnet20", Options(10, "cifar"), 8, 2, "fp32", False) == []


# ---- what is picked, of made-up times


class Clock:
    """In place of `tuning.Bench`: seconds from a function of the sizes; counts how often each is measured."""

    def __init__(self, seconds):
        self.seconds, self.tried, self.measured = seconds, 0, []

    def bound(self, sizes):
        return sizes

    def time(self, sizes):
        self.measured.append(sizes)
        return self.seconds(sizes)

    compare = tuning.Bench.compare


def chosen(monkeypatch, seconds, rounds=3):
    clock = Clock(seconds)
    monkeypatch.setattr(tuning, "Bench", lambda device, task: clock)
    shipped = tiles.DirectGather(14, 384, 32)
    conv = SimpleNamespace(sizes=lambda *launch: shipped, tile_vectors=lambda t: 2, small_group=0, vector=16)
    return tuning.choose(None, tuning.Task(conv, "conv_gather", False), rounds), clock


def test_sizes_are_chosen_one_after_the_other(monkeypatch):
    found, _ = chosen(monkeypatch, lambda s: 1 + 0.1 * (s.rows != 7) + 0.1 * (s.pixels != 192) + 0.1 * (s.groups != 8))
    assert found.better == tiles.DirectGather(7, 192, 8)
    assert (found.shipped_s, found.chosen_s) == pytest.approx((1.3, 1.0))
    assert found.gain == pytest.approx(0.3 / 1.3)


@pytest.mark.parametrize(("gain", "kept"), [(0.019, False), (0.021, True)])
def test_noise_is_not_a_gain(monkeypatch, gain, kept):
    found, _ = chosen(monkeypatch, lambda s: 1 - gain * (s.rows == 8))
    assert (found.better is not None) == kept
    assert found.gain == pytest.approx(gain if kept else 0)


def test_rounds_are_compared_not_times(monkeypatch):
    """A machine whose speed changes from round to round, and that once disturbs the better candidate: in its median time that
    is the slower one.
    """
    speed, calls = (1.4, 1.0, 1.6), Counter()

    def seconds(sizes):
        now = calls[sizes] % 3
        calls[sizes] += 1
        return speed[now] * (1 if sizes.rows != 12 else 1.45 if now == 1 else 0.9)

    found, _ = chosen(monkeypatch, seconds)
    assert found.better == tiles.DirectGather(12, 384, 32), "and where all are equal, the shipped size"


def test_hopeless_candidates_are_measured_once(monkeypatch):
    _, clock = chosen(monkeypatch, lambda s: 1.0 if s.rows == 14 else 1.6 if s.rows == 4 else 1.4)
    assert clock.measured.count(tiles.DirectGather(4, 384, 32)) == 1
    assert clock.measured.count(tiles.DirectGather(8, 384, 32)) == 3


def test_picked_from_a_slow_beginning(monkeypatch):
    """Shipped sizes that are hopeless beside a candidate are measured in all rounds nevertheless: those it has to beat."""
    found, clock = chosen(monkeypatch, lambda s: 1.0 if s.rows == 7 else 2.0)
    assert (found.better, found.gain) == (tiles.DirectGather(7, 384, 32), pytest.approx(0.5))
    assert clock.measured.count(found.shipped) == 3 + 7


def test_picked_of_equal_launches_is_the_one_closest_to_the_shipped(monkeypatch):
    monkeypatch.setattr(Clock, "bound", lambda self, sizes: replace(sizes, pixels=min(sizes.pixels, 384)))
    found, _ = chosen(monkeypatch, lambda s: 1.0 if s.rows == 7 else 2.0)
    assert found.better == tiles.DirectGather(7, 384, 32)
