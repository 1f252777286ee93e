"""The reference of the optimizers against steps computed by hand."""

import numpy as np
import pytest

from dpresnet import reference_optimizer as ref

ROUNDING = 1e-12


def close(actual: object, expected: object) -> bool:
    return np.allclose(np.array(actual, np.float64), np.array(expected, np.float64), rtol=0, atol=ROUNDING)


# (p, m) after each of two steps from p = 1, m = 0 with gradients 0.5, -0.2, lr 0.1, momentum 0.9, decay 0.1:
# g = 0.5 + 0.1 = 0.6, m = 0.6, p = 1 - 0.06; then g = -0.2 + 0.094 = -0.106, m = 0.54 - 0.106, p = 0.94 - 0.0434.
# Nesterov: p = 1 - 0.1 (0.6 + 0.54); then g = -0.2 + 0.0886 = -0.1114, m = 0.54 + g, p = 0.886 - 0.1 (g + 0.9 m).
BY_HAND = [(False, (0.94, 0.6), (0.8966, 0.434)), (True, (0.886, 0.6), (0.858566, 0.4286))]


@pytest.mark.parametrize(("nesterov", "first", "second"), BY_HAND)
def test_sgd_by_hand(nesterov, first, second):
    state = ref.optimizer_sgd(1.0, 0.5, 0.0, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=nesterov)
    assert close(state, first)
    assert close(ref.optimizer_sgd(state[0], -0.2, state[1], 0.1, 0.9, 0.1, nesterov), second)


def test_lars_by_hand():
    """|p| = 5, |g| = 10, decay 0.5: rate 0.1 * 5 / (10 + 2.5) = 0.04; m = 0.5 m + 0.04 (g + 0.5 p), lr 1."""
    param, buffer = ref.optimizer_lars([3.0, 4.0], [-6.0, 8.0], [1.0, 0.0], 1.0, 0.5, 0.5, trust=0.1)
    assert close(buffer, [0.5 - 0.04 * 4.5, 0.04 * 10]) and close(param, [3 - 0.32, 4 - 0.4])


@pytest.mark.parametrize(("param", "grad"), [([0.0, 0.0], [3.0, 4.0]), ([3.0, 4.0], [0.0, 0.0])])
def test_lars_has_no_rate_of_its_own_where_a_norm_is_zero(param, grad):
    moved, buffer = ref.optimizer_lars(param, grad, [0.0, 0.0], 0.5, weight_decay=0.1, trust=0.001)
    assert close(buffer, 0.5 * (np.array(grad) + 0.1 * np.array(param))) and close(moved, np.array(param) - buffer)


def test_adamw_by_hand():
    """The first step is one of size lr whatever the gradient, beside the decay: p = 1 - 0.1 (1 + 0.5); the second, with the
    gradient twice as large: m = (0.1 * 0.9 * 1 + 0.1 * 2) / 0.19, v = (0.01 * 0.99 + 0.01 * 4) / 0.0199.
    """
    param, first, second = ref.optimizer_adamw(1.0, 1.0, 0.0, 0.0, 1, lr=0.1, beta2=0.99, eps=0.0, weight_decay=0.5)
    assert close((param, first, second), (0.85, 0.1, 0.01))
    again, *_ = ref.optimizer_adamw(param, 2.0, first, second, 2, lr=0.1, beta2=0.99, eps=0.0, weight_decay=0.5)
    unbiased, square = (0.09 + 0.2) / 0.19, (0.0099 + 0.04) / 0.0199
    assert close(again, 0.85 - 0.1 * (unbiased / np.sqrt(square) + 0.5 * 0.85))


def test_averages_and_clipping_by_hand():
    assert close(ref.optimizer_average([1.0, 2.0], [3.0, 0.0], 0.75), [1.5, 1.5])
    assert ref.optimizer_squares([[3.0], [4.0]]) == 25
    assert [each.tolist() for each in ref.clipped([[6.0], [8.0]], 5.0)] == [[3.0], [4.0]]  # norm 10
    assert [each.tolist() for each in ref.clipped([[0.6], [0.8]], 5.0)] == [[0.6], [0.8]]
    assert [each.tolist() for each in ref.clipped([[0.0]], 5.0)] == [[0.0]]
