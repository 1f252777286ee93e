"""Choosing a device, building for it, memory that the host and the device share, and where a plan puts its tensors."""

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pyopencl as cl
import pytest
from harness import Bench, Mode, device_for, each_mode

from dpresnet import device as under_test
from dpresnet.device import ALIGNMENT, BuildError, Device, choose_device, list_devices
from dpresnet.errors import Refused
from dpresnet.plan import (
    Constant,
    Launch,
    Memory,
    Plan,
    Tensor,
    aligned,
    device_argument,
    lifetimes,
    place_by_liveness,
    place_in_order,
)

GPU, CPU = cl.device_type.GPU, cl.device_type.CPU


# Which device


def platform(name: str, *devices: tuple[str, int]) -> SimpleNamespace:
    """A driver with devices (name, type)."""
    made = SimpleNamespace(name=name)
    made.devices = [SimpleNamespace(name=f"{device} ", type=kind, platform=made) for device, kind in devices]
    made.get_devices = lambda: made.devices
    return made


@pytest.fixture
def machine(monkeypatch):
    """A node with a CPU runtime, two drivers for GPUs, and one without a device."""
    platforms = [
        platform("Portable", ("Processor", CPU)),
        platform("Nothing"),
        platform("Acme", ("Acme One", GPU), ("Acme Two", GPU)),
        platform("Bolt", ("Bolt Seven", GPU)),
    ]
    monkeypatch.setattr(cl, "get_platforms", lambda: platforms)


def chosen(selector: str, local_rank: int = 0) -> str:
    return choose_device(selector, local_rank).name.strip()


def test_gpus_come_first(machine):
    assert [device.name.strip() for device in list_devices()] == ["Acme One", "Acme Two", "Bolt Seven", "Processor"]


def test_ranks_spread_over_the_devices_of_one_platform(machine):
    assert [chosen("auto", rank) for rank in range(5)] == ["Acme One", "Acme Two"] * 2 + ["Acme One"]


def test_index_is_the_same_device_for_every_rank(machine):
    assert [chosen("2", rank) for rank in range(3)] == ["Bolt Seven"] * 3


def test_name_is_part_of_device_or_platform(machine):
    assert chosen("seven") == "Bolt Seven"
    assert chosen("PORTABLE") == "Processor"
    assert [chosen("acme", rank) for rank in range(3)] == ["Acme One", "Acme Two", "Acme One"]


@pytest.mark.parametrize("selector", ["4", "Zeus"])
def test_refusal_lists_what_there_is(machine, selector):
    with pytest.raises(Refused, match=rf"--device {selector}: .*0: Acme One, 1: Acme Two, 2: Bolt Seven, 3: Processor"):
        choose_device(selector)


def test_a_driver_for_both_kinds_gives_its_gpus_only(monkeypatch):
    monkeypatch.setattr(cl, "get_platforms", lambda: [platform("Both", ("Processor", CPU), ("Big", GPU), ("Bigger", GPU))])
    assert [chosen("auto", rank) for rank in range(3)] == ["Big", "Bigger", "Big"]


def test_a_broken_driver_does_not_hide_the_others(monkeypatch):
    def broken():
        raise cl.LogicError("clGetDeviceIDs failed: OUT_OF_HOST_MEMORY")

    dead = platform("Dead")
    dead.get_devices = broken
    monkeypatch.setattr(cl, "get_platforms", lambda: [dead, platform("Portable", ("Processor", CPU))])
    assert chosen("auto") == "Processor"


def test_no_platform_is_refused_with_a_remedy(monkeypatch):
    def none_installed():
        raise cl.LogicError("clGetPlatformIDs failed: PLATFORM_NOT_FOUND_KHR")

    monkeypatch.setattr(cl, "get_platforms", none_installed)
    with pytest.raises(Refused, match="no OpenCL device found; install"):
        choose_device()


def test_lanes_fit_the_device():
    device = device_for("vector")
    assert device.vector in ((8, 16) if device.host_memory else (1,))
    assert device_for("narrow").vector == min(8, device.vector) and device_for("scalar").vector == 1
    assert device.cl.name.strip() in device.name and device.cl.driver_version in device.name


@pytest.mark.parametrize("lanes", [-1, 2, 32])
def test_lanes_without_kernels_are_refused(lanes):
    with pytest.raises(Refused, match=f"vectors of {lanes} lanes on .*: choose 1, 8 or 16, at most"):
        _ = Device(choose_device(), vector=lanes).vector


# Programs


def test_build_error_holds_options_and_log(monkeypatch):
    monkeypatch.setattr(under_test, "kernel_source", lambda stem: "__kernel void broken() { undeclared_thing = 1; }")
    with pytest.raises(BuildError) as caught:
        device_for("vector").program("broken", HALF=1, VEC=8)
    for part in ("kernels/broken", "-DHALF=1", "-DVEC=8", device_for("vector").name, "undeclared_thing"):
        assert part in str(caught.value)


def test_program_is_built_once_for_the_same_defines():
    device = device_for("scalar")
    one, two = device.program("residual", HALF=0, VEC=1), device.program("residual", VEC=1, HALF=0)
    assert one is two
    assert device.program("residual", HALF=1, VEC=1) is not one


# Memory


@pytest.mark.parametrize("path", ["vector", "scalar"])
def test_arena_is_zeroed_and_aligned(path):
    arena = device_for(path).arena(3 * ALIGNMENT)
    arena.pull(0, arena.nbytes)
    host = arena.view(0, (arena.nbytes,), np.uint8)
    assert host.nbytes == 3 * ALIGNMENT and not host.any()
    assert host.ctypes.data % ALIGNMENT == 0
    assert device_for(path).arena(1).nbytes >= 1


def test_alignment_is_what_the_device_asks_for():
    assert device_for("vector").cl.mem_base_addr_align <= 8 * ALIGNMENT  # bits
    assert [aligned(n) for n in (1, ALIGNMENT, ALIGNMENT + 1)] == [ALIGNMENT, ALIGNMENT, 2 * ALIGNMENT]


def test_range_of_an_arena_is_one_buffer():
    arena = device_for("vector").arena(4 * ALIGNMENT)
    assert arena.buffer(ALIGNMENT, 64) is arena.buffer(ALIGNMENT, 64)
    assert arena.buffer(ALIGNMENT, 64) is not arena.buffer(2 * ALIGNMENT, 64)
    assert arena.buffer(ALIGNMENT, 64).size == 64


def test_host_and_device_see_the_same_range():
    """What is pushed arrives, what the device writes comes back, and neighbours stay as they are."""
    device = device_for("vector")
    arena = device.arena(4 * ALIGNMENT)
    arena.view(ALIGNMENT, (2, 8), np.float32)[:] = np.arange(16).reshape(2, 8)
    arena.push(ALIGNMENT, 64)
    cl.enqueue_copy(device.queue, arena.buffer(2 * ALIGNMENT, 64), arena.buffer(ALIGNMENT, 64))
    arena.pull(0, arena.nbytes)
    copied = arena.view(2 * ALIGNMENT, (4, 4), np.float32)
    np.testing.assert_array_equal(copied, np.arange(16).reshape(4, 4))
    assert not arena.view(2 * ALIGNMENT + 64, (ALIGNMENT - 64,), np.uint8).any()


def test_impossible_allocation_is_refused_with_a_remedy():
    with pytest.raises(Refused, match=r"cannot allocate 1099511627776 MiB .*use a smaller --batch"):
        device_for("vector").arena(2**60)


def test_constant_is_uploaded_once_for_all_replicas():
    device, table, constants = device_for("scalar"), Constant(np.arange(4, dtype=np.int32)), {}
    first, second = (device_argument(device, table, Memory({}), constants) for _ in range(2))
    assert first is second
    read_back = np.empty(4, np.int32)
    cl.enqueue_copy(device.queue, read_back, first)
    assert read_back.tolist() == [0, 1, 2, 3]


# Where tensors lie


def random_plan(seed: int) -> Plan:
    """Launches that touch up to four of forty tensors, most of them early and late ones of a sliding window."""
    draw = random.Random(seed)
    tensors = [Tensor(f"t{i}", (draw.choice([1, 16, 100, 128, 1000, 4096]),), np.dtype(np.float32)) for i in range(40)]
    kept = Tensor("kept", (64,), np.dtype(np.float32), home="parameters")
    plan = Plan(device_for("scalar"), "fp32")
    for i in range(37):
        near = draw.sample(tensors[i : i + 4], draw.randint(1, 4))
        far = [draw.choice(tensors)] if draw.random() < 0.2 else []
        plan.launch(f"e{i}", "residual_add", (1,), [*near, *far, kept], near[:1])
    return plan


def live_at(plan: Plan, index: int) -> list[Tensor]:
    """Tensors touched at or before an entry, and at or after it: by looking at every entry."""

    def touched(entries: list[Launch]) -> set[Tensor]:
        return {t for entry in entries for t in entry.tensors if t.home == "work"}

    return list(touched(plan.entries[: index + 1]) & touched(plan.entries[index:]))


@pytest.mark.parametrize("seed", range(30))
def test_no_two_live_tensors_overlap(seed):
    plan, limit = random_plan(seed), random.Random(seed).choice([2**14, 20000, 2**16, 2**20])
    sizes = place_by_liveness(plan, limit)
    for index in range(len(plan.entries)):
        for a, b in itertools.combinations(live_at(plan, index), 2):
            (chunk, start), (other, begin) = a.place, b.place
            assert chunk != other or start + a.nbytes <= begin or begin + b.nbytes <= start
    for tensor in lifetimes(plan):
        chunk, start = tensor.place
        assert start % ALIGNMENT == 0 and start + tensor.nbytes <= sizes[chunk]
    assert max(sizes) <= limit
    assert all(t.place is None for t in plan.tensors() if t.home != "work")


@pytest.mark.parametrize("seed", range(5))
def test_placement_wastes_little(seed):
    """No placement needs less than the most that is alive at once; greedy by size stays within a quarter of it."""
    plan = random_plan(seed)
    [size] = place_by_liveness(plan, 2**30)
    least = max(sum(aligned(t.nbytes) for t in live_at(plan, i)) for i in range(len(plan.entries)))
    assert least <= size <= 1.25 * least


def test_chain_needs_memory_for_two():
    plan = Plan(device_for("scalar"), "fp32")
    chain = [plan.image(f"x{i}", 1, 16, 8, 8) for i in range(10)]
    for a, b in itertools.pairwise(chain):
        plan.launch("next", "residual_add", (1,), [a, b], [b])
    assert place_by_liveness(plan, 2**20) == [2 * chain[0].nbytes]


def test_tensor_beyond_the_limit_gets_its_own_chunk():
    """The allocation then fails with its own message; placing does not."""
    plan = Plan(device_for("scalar"), "fp32")
    large, small = plan.image("large", 1, 16, 32, 32), plan.image("small", 1, 16, 8, 8)
    plan.launch("both", "residual_add", (1,), [large, small], [small])
    assert place_by_liveness(plan, 2**12) == [large.nbytes, small.nbytes]


@each_mode
def test_tensors_in_order_do_not_touch(mode):
    tensors = [Tensor("t", (n,), mode.storage) for n in (1, 256, 257, 5)]
    assert place_in_order(tensors) == sum(aligned(t.nbytes) for t in tensors)
    ends = [t.place[1] + aligned(t.nbytes) for t in tensors]
    assert [t.place[1] for t in tensors] == [0, *ends[:-1]]


# The bench itself: what it promises to notice


@pytest.mark.parametrize(("elements", "complaint"), [(128, "nan instead of"), (320, "wrote outside")])
def test_bench_notices_missing_and_stray_writes(elements, complaint):
    """256 elements should be written."""
    bench = Bench(Mode("fp32", "scalar"))
    x, y = np.abs(bench.draw(1, 16, 4, 4)), bench.out_image((1, 16, 4, 4))
    bench.plan.elementwise("add", "residual_add", elements, [bench.image(x), bench.image(0 * x), y], [y])
    with pytest.raises(AssertionError, match=complaint):
        bench.run()
        bench.assert_close(y, x, 1)


def test_bench_notices_padding_that_is_not_zero():
    bench = Bench(Mode("fp32", "scalar"))
    ones, zeros = (bench.array(np.full((1, 1, 2, 2, 16), value)) for value in (1, 0))
    y = bench.out_image((1, 15, 2, 2))
    bench.plan.elementwise("add", "residual_add", 64, [ones, zeros, y], [y])
    bench.run()
    with pytest.raises(AssertionError, match="padding lanes"):
        bench.read(y)
