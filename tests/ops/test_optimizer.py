"""The optimizer: several steps in place, and the check for gradients that are no numbers."""

import numpy as np
import pytest
from harness import Bench, assert_close, each_mode, struct_in, tolerance

from dpresnet import reference
from dpresnet.ops import optimizer as ops
from dpresnet.plan import CONTROL

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


@pytest.mark.parametrize(("name", "dtype"), [("Hyper", ops.HYPER), ("Control", CONTROL)])
def test_host_and_kernels_agree_on_structs(name, dtype):
    struct = struct_in("optimizer", name)
    assert struct.descr == dtype.descr and struct.itemsize == dtype.itemsize
