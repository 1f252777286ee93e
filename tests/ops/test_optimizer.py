"""The optimizers: several steps in place, norms, averages, and the check for gradients that are no numbers."""

import numpy as np
import pytest
from harness import Bench, Mode, assert_close, each_mode, struct_in, tolerance

from dpresnet import reference_optimizer as reference
from dpresnet.ops import optimizer as ops
from dpresnet.plan import CONTROL, Constant

SIZES = [16, 16 * 35, 16 * 129]  # less than one work-item, a remainder, several full ones
STEPS = 3


def hyper(**fields: float) -> np.ndarray:
    """Those not given are 0."""
    values = np.zeros(1, ops.HYPER)
    for name, value in fields.items():
        values[name] = value
    return values


@each_mode
@pytest.mark.parametrize("elements", SIZES)
@pytest.mark.parametrize("nesterov", [False, True], ids=["plain", "nesterov"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.0625])
def test_steps_in_place(mode, elements, nesterov, weight_decay):
    """Three steps on one gradient, which carries a loss scale of 1024. The constants are exact in fp32."""
    bench = Bench(mode)
    param, grad, buffer = (bench.draw(elements) for _ in range(3))
    tensors = bench.array(param), bench.array(1024 * grad), bench.array(buffer)
    constants = hyper(lr=0.125, momentum=0.75, weight_decay=weight_decay, nesterov=nesterov, grad_factor=1 / 1024)
    settings = bench.array(constants, ops.HYPER)
    for _ in range(STEPS):
        ops.sgd(bench.plan, "sgd", *tensors, settings)
        param, buffer = reference.optimizer_sgd(param, grad, buffer, 0.125, 0.75, weight_decay, nesterov)
    bench.run()
    for tensor, expected in ((tensors[0], param), (tensors[2], buffer)):
        assert_close(bench.read(tensor), expected, tolerance(tensor.dtype, 6 * STEPS))


def adamw_hyper(update: int, **fields: float) -> np.ndarray:
    """What the host computes for the ``update``-th step, from 1: corrections for beta 0.75 and 0.875."""
    correct = {"correct1": 1 / (1 - 0.75**update), "correct2": 1 / np.sqrt(1 - 0.875**update)}
    return hyper(lr=0.125, beta1=0.75, beta2=0.875, fresh1=0.25, fresh2=0.125, eps=2.0**-10, **correct, **fields)


@each_mode
@pytest.mark.parametrize("elements", SIZES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.0625])
def test_adamw_in_place(mode, elements, weight_decay):
    """Moments begin anywhere, as after many steps; the gradient changes its sign on the way."""
    bench = Bench(mode)
    param, grad, first = (bench.draw(elements) for _ in range(3))
    second = np.abs(bench.draw(elements))
    tensors = [bench.array(values) for values in (param, first, second)]
    grads = [bench.array(1024 * sign * grad) for sign in (1, -1)]
    for update in range(1, STEPS + 1):
        settings = bench.array(adamw_hyper(update, weight_decay=weight_decay, grad_factor=1 / 1024), ops.HYPER)
        ops.adamw(bench.plan, "adamw", tensors[0], grads[update % 2], *tensors[1:], settings)
        sign = (1, -1)[update % 2]
        param, first, second = reference.optimizer_adamw(
            param, sign * grad, first, second, update, 0.125, 0.75, 0.875, 2.0**-10, weight_decay)  # fmt: skip
    bench.run()
    for tensor, expected in zip(tensors, (param, first, second), strict=True):
        assert_close(bench.read(tensor), expected, tolerance(tensor.dtype, 8 * STEPS))


PARTS = [(0, 2), (2, 3), (3, 6)]  # slots of three parameters


def table_for(bench: Bench, rates: list[tuple[float, float]]) -> ops.Table:
    owner = np.repeat(np.arange(3, dtype=np.int32), [end - begin for begin, end in PARTS])
    return ops.Table(Constant(owner), bench.array(np.array(rates, ops.RATE), ops.RATE))


def each_part() -> list[slice]:
    return [slice(begin * ops.SLOT, end * ops.SLOT) for begin, end in PARTS]


@each_mode
def test_lars_gives_each_parameter_its_own_rate(mode):
    """The rate is the host's, of the norms; the second parameter is excluded, the gradient of the third is 0."""
    bench = Bench(mode)
    param, grad, buffer = (bench.draw(6 * ops.SLOT) for _ in range(3))
    grad[each_part()[2]] = 0
    expected, rates = [], []
    for number, part in enumerate(each_part()):
        decay, trust = (0.0, None) if number == 1 else (0.0625, 0.5)
        size, slope = (np.linalg.norm(values[part]) for values in (param, grad))
        rates.append((trust * size / (slope + decay * size) if trust and slope else 1.0, decay))
        if trust:
            expected.append(reference.optimizer_lars(param[part], grad[part], buffer[part], 0.125, 0.75, decay, trust))
        else:
            plain = reference.optimizer_sgd(param[part], 0.125 * grad[part], buffer[part], 1.0, 0.75)
            expected.append(plain)
    tensors = [bench.array(values) for values in (param, 1024 * grad, buffer)]
    settings = bench.array(hyper(lr=0.125, momentum=0.75, weight_decay=9.0, grad_factor=1 / 1024), ops.HYPER)
    ops.lars(bench.plan, "lars", *tensors, settings, table_for(bench, rates))
    bench.run()
    for tensor, wanted in ((tensors[0], 0), (tensors[2], 1)):
        assert_close(bench.read(tensor), np.concatenate([each[wanted] for each in expected]), tolerance(tensor.dtype, 8))


@each_mode
@pytest.mark.parametrize("adaptive", [False, True], ids=["sgd", "adamw"])
def test_a_table_decays_some_parameters_only(mode, adaptive):
    """To the bit what the same kernel without a table does with and without decay; 9 in the constants is not looked at."""
    decays = [0.0625, 0.0, 0.0625]
    found = []
    for weight_decay, tabled in ((9.0, True), (0.0625, False), (0.0, False)):
        bench = Bench(mode)
        arenas = [bench.array(np.abs(bench.draw(6 * ops.SLOT))) for _ in range(4 if adaptive else 3)]
        constants = adamw_hyper(1, weight_decay=weight_decay, grad_factor=1, momentum=0.75)
        table = table_for(bench, [(1.0, decay) for decay in decays]) if tabled else None
        (ops.adamw if adaptive else ops.sgd)(bench.plan, "step", *arenas, bench.array(constants, ops.HYPER), table)
        bench.run()
        found.append(bench.read(arenas[0]))
    apart, everywhere, nowhere = found
    for decay, part in zip(decays, each_part(), strict=True):
        np.testing.assert_array_equal(apart[part], (everywhere if decay else nowhere)[part])
        assert (everywhere[part] != nowhere[part]).mean() > 0.9


@each_mode
@pytest.mark.parametrize("elements", SIZES)
def test_averages_follow(mode, elements):
    bench = Bench(mode)
    average, values = bench.draw(elements), bench.draw(elements)
    tensors = bench.array(average), bench.array(values)
    for _ in range(STEPS):
        ops.average(bench.plan, "average", *tensors, bench.array(hyper(share=0.125), ops.HYPER))
        average = reference.optimizer_average(average, values, 0.875)
    bench.run()
    assert_close(bench.read(tensors[0]), average, tolerance(tensors[0].dtype, 3 * STEPS))


@each_mode
def test_squares_of_each_range(mode):
    """Ranges of one block, of a whole chunk and beyond one; what lies between parameters belongs to none."""
    bench = Bench(mode)
    sizes = {0: 16, 128: 5000, 5248: ops.CHUNK, 5248 + ops.CHUNK: 7}
    values = bench.draw(5248 + ops.CHUNK + 16)
    chunks = [ops.cut(begin, size) for begin, size in sizes.items()]
    assert [len(each) for each in chunks] == [1, 2, 1, 1]
    flat = [chunk for each in chunks for chunk in each]
    assert max(end - begin for begin, end in flat) == ops.CHUNK
    sums = bench.out_array(len(flat))
    ops.squares(bench.plan, "squares", bench.array(values), Constant(np.array(flat, np.int32)), sums)
    bench.run()
    expected = [reference.optimizer_squares(values[begin:end]) for begin, end in flat]
    assert_close(bench.read(sums), expected, tolerance(sums.dtype, ops.CHUNK))


@pytest.mark.parametrize("kernel", ["adamw", "lars", "average", "squares"])
def test_bits_do_not_depend_on_the_lanes(kernel):
    """Vectors of as many lanes as there are, of 8, and none."""
    found = []
    for path in ("vector", "narrow", "scalar"):
        bench = Bench(Mode("fp32", path))
        arenas = [bench.array(np.abs(np.random.default_rng(n).normal(size=6 * ops.SLOT))) for n in range(4)]
        settings = bench.array(adamw_hyper(3, weight_decay=0.1, grad_factor=0.3, momentum=0.9, share=0.1), ops.HYPER)
        table, sums = table_for(bench, [(0.3, 0.1)] * 3), bench.out_array(1)
        ops.squares(bench.plan, "squares", arenas[1], Constant(np.array([(0, 6 * ops.SLOT)], np.int32)), sums)
        if kernel == "adamw":
            ops.adamw(bench.plan, kernel, *arenas, settings)
        elif kernel == "lars":
            ops.lars(bench.plan, kernel, *arenas[:3], settings, table)
        elif kernel == "average":
            ops.average(bench.plan, kernel, *arenas[:2], settings)
        bench.run()
        found.append([bench.read(tensor) for tensor in (*arenas, sums)])
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@each_mode
@pytest.mark.parametrize("elements", SIZES)
@pytest.mark.parametrize("micro_batches", [2, 3])
def test_micro_batches_are_added_in_their_order(mode, elements, micro_batches):
    """To the bit: one rounding for each addition, nothing of what the sum held before."""
    bench = Bench(mode)
    grads = [bench.draw(elements).astype(np.float32) for _ in range(micro_batches)]
    total = bench.array(np.full(elements, np.nan, np.float32))
    tensors = [bench.array(grad) for grad in grads]
    for number, tensor in enumerate(tensors[:-1]):
        ops.accumulate(bench.plan, "accumulate", tensor, total, fresh=number == 0)
    ops.complete(bench.plan, "complete", tensors[-1], total)
    bench.run()
    expected = grads[0]
    for grad in grads[1:]:
        expected = expected + grad
    np.testing.assert_array_equal(bench.read(tensors[-1]), expected)


@each_mode
@pytest.mark.parametrize("elements", SIZES)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_check_finds_one_bad_gradient(mode, elements, bad):
    found = [check(mode, elements, {place: bad}) for place in (0, elements // 2 + 3, elements // 2 + 6, elements - 1)]
    assert [each.sum() for each in found] == [1] * 4
    assert found[0][0] == found[-1][-1] == 1


@each_mode
@pytest.mark.parametrize("elements", SIZES)
def test_check_passes_every_number(mode, elements):
    largest = float(np.finfo(np.float32).max)
    assert not check(mode, elements, {0: largest, 1: -largest, 2: 1e-45, 3: -0.0, elements - 1: largest}).any()


def check(mode, elements: int, special: dict[int, float]) -> np.ndarray:
    bench = Bench(mode)
    grad = bench.draw(elements)
    for place, value in special.items():
        grad[place] = value
    found = bench.out_array(ops.check_items(bench.plan, elements), dtype=np.int32)
    ops.check(bench.plan, "check", bench.array(grad), found)
    bench.run()
    return bench.read(found)


@pytest.mark.parametrize(("name", "dtype"), [("Hyper", ops.HYPER), ("Rate", ops.RATE), ("Control", CONTROL)])
def test_host_and_kernels_agree_on_structs(name, dtype):
    struct = struct_in("optimizer", name)
    assert struct.descr == dtype.descr and struct.itemsize == dtype.itemsize
