"""The formats in which gradients travel, against numpy in float64."""

import numpy as np
import pytest

from dpresnet.wire import BLOCK, WIRES

WIDE = np.ldexp(np.random.default_rng(0).standard_normal(40 * BLOCK), np.random.default_rng(1).integers(-60, 60, 40 * BLOCK))
GRADIENTS = [
    np.zeros(BLOCK), np.random.default_rng(2).standard_normal(8 * BLOCK), WIDE, 1e-45 * np.ones(BLOCK), 3e38 * np.ones(BLOCK),
    -np.arange(BLOCK), np.finfo(np.float32).max * np.ones(BLOCK),
]  # fmt: skip
each = pytest.mark.parametrize("values", [g.astype(np.float32) for g in GRADIENTS], ids=range(len(GRADIENTS)))


def sent(name: str, values: np.ndarray) -> np.ndarray:
    message = WIRES[name].encode(values.copy())
    assert message.dtype == np.uint8 and message.size == WIRES[name].nbytes(values.size)
    return WIRES[name].decode(message).copy()


@each
def test_fp32_is_exact_and_copies_nothing(values):
    np.testing.assert_array_equal(sent("fp32", values), values)
    assert np.shares_memory(WIRES["fp32"].decode(WIRES["fp32"].encode(values)), values)


@each
def test_bf16_rounds_to_nearest(values):
    """Within half a unit of the last of 8 bits; what rounds beyond the largest number is infinite."""
    arrived = sent("bf16", values)
    assert not (arrived.view(np.uint32) & 0xFFFF).any()
    exponent = np.frexp(values.astype(np.float64))[1]
    half_unit = np.ldexp(1.0, np.maximum(exponent - 8, -134) - 1)
    finite = np.abs(values) < 3.39e38
    assert (np.abs(arrived[finite].astype(np.float64) - values[finite]) <= half_unit[finite]).all()
    assert np.isinf(arrived[~finite]).all()


def test_bf16_takes_the_even_one_of_two_neighbours():
    values = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 1 + 2.0**-8 + 2.0**-20], np.float32)
    np.testing.assert_array_equal(sent("bf16", values), np.float32([1, 1 + 2.0**-6, -1, 1 + 2.0**-7]))


@each
def test_fp16_has_eleven_bits_of_the_largest_in_a_block(values):
    """Within half a unit of each value, or of the smallest fp16 number at the scale of its block; nothing overflows but what
    rounds beyond the largest fp32 number.
    """
    arrived = sent("fp16", values).reshape(-1, BLOCK).astype(np.float64)
    rows = values.reshape(-1, BLOCK).astype(np.float64)
    scale = np.ldexp(1.0, np.maximum(np.frexp(np.abs(rows).max(axis=1))[1], -112) - 15)[:, None]
    half_unit = np.ldexp(1.0, np.maximum(np.frexp(rows / scale)[1] - 11, -24) - 1) * scale
    finite = np.abs(rows) < 3.4e38
    assert np.isfinite(arrived[finite]).all() and np.isinf(arrived[~finite]).all()
    assert (np.abs(arrived - rows)[finite] <= np.maximum(half_unit, 2.0**-150)[finite]).all()


@pytest.mark.parametrize("name", ["fp16", "bf16"])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_bad_values_arrive(name, bad):
    """The step is dropped wherever they come from."""
    values = np.ones(2 * BLOCK, np.float32)
    values[3] = bad
    arrived = sent(name, values)
    np.testing.assert_equal(arrived[3], np.float32(bad))
    assert np.isfinite(arrived[BLOCK:]).all()


def test_a_payload_of_nan_is_no_infinity():
    values = np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(sent("bf16", values)).all()


@pytest.mark.parametrize("name", WIRES)
def test_a_message_is_those_of_its_parts(name):
    wire, values = WIRES[name], WIDE.astype(np.float32)
    parts = [wire.encode(part) for part in np.split(values, [3 * BLOCK, 10 * BLOCK])]
    np.testing.assert_array_equal(np.concatenate(parts), wire.encode(values))


@each
@pytest.mark.parametrize("name", WIRES)
def test_what_is_rounded_once_stays(name, values):
    """A replica's contribution may travel twice."""
    once = sent(name, values)
    np.testing.assert_array_equal(sent(name, once).view(np.uint32), once.view(np.uint32))


@pytest.mark.parametrize("largest", [np.nextafter(np.float32(1), np.float32(0)), 1.0, np.nan, np.inf])
def test_a_largest_value_that_is_rounded_up_keeps_the_power_of_two_of_its_block(largest):
    """The smallest of its neighbours would be rounded once more, at a step twice as wide, if they travelled again."""
    values = np.full(BLOCK, 3 * 2.0**-39, np.float32)
    values[0] = largest
    once = sent("fp16", values)
    np.testing.assert_array_equal(sent("fp16", once), once)
    if np.isfinite(largest):
        assert once[0] == 1 and once[1] == values[1]
