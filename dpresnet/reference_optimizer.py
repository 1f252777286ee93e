"""The mathematics of the optimizers in float64 numpy, as `dpresnet.reference` is for all else: ``optimizer_adamw`` of
``kernels/optimizer.cl`` and ``ops/optimizer.py`` computes `optimizer_adamw`.

Arguments of any dtype are taken to float64 first, and nothing is changed in place.
"""

import numpy as np
from numpy.typing import ArrayLike


def _f64(values: ArrayLike) -> np.ndarray:
    return np.asarray(values, dtype=np.float64)


def optimizer_sgd(
    param: ArrayLike,
    grad: ArrayLike,
    momentum_buffer: ArrayLike,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """(param, momentum_buffer) after one step of PyTorch's rule: g += weight_decay * p; m = momentum * m + g;
    p -= lr * (g + momentum * m if nesterov else m). The buffer starts at zero.

    Sutskever et al. 2013, section 2, rearranged: lr multiplies the buffer instead of entering it.
    """
    param = _f64(param)
    grad = _f64(grad) + weight_decay * param
    buffer = momentum * _f64(momentum_buffer) + grad
    step = grad + momentum * buffer if nesterov else buffer
    return param - lr * step, buffer


def optimizer_lars(
    param: ArrayLike,
    grad: ArrayLike,
    momentum_buffer: ArrayLike,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust: float = 0.001,
) -> tuple[np.ndarray, np.ndarray]:
    """(param, momentum_buffer) of one layer after one step: m = momentum * m + lr * rate * (g + weight_decay * p); p -= m, with
    rate = trust * |p| / (|g| + weight_decay * |p|), 1 where |p| or |g| is 0. The buffer starts at zero.

    You et al. 2017 (arXiv:1708.03888), algorithm 1.
    """
    param, grad = _f64(param), _f64(grad)
    size, slope = np.sqrt((param**2).sum()), np.sqrt((grad**2).sum())
    rate = trust * size / (slope + weight_decay * size) if size > 0 and slope > 0 else 1.0
    buffer = momentum * _f64(momentum_buffer) + lr * rate * (grad + weight_decay * param)
    return param - buffer, buffer


def optimizer_adamw(
    param: ArrayLike,
    grad: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    update: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(param, first moment, second moment) after the ``update``-th step, counted from 1. Moments start at zero.

    Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2, with lr for their eta * alpha and weight_decay for their
    lambda / alpha, as in PyTorch.
    """
    param, grad = _f64(param), _f64(grad)
    first = beta1 * _f64(first) + (1 - beta1) * grad
    second = beta2 * _f64(second) + (1 - beta2) * grad**2
    unbiased, square = first / (1 - beta1**update), second / (1 - beta2**update)
    return param - lr * (unbiased / (np.sqrt(square) + eps) + weight_decay * param), first, second


def optimizer_average(average: ArrayLike, values: ArrayLike, decay: float) -> np.ndarray:
    """decay * average + (1 - decay) * values."""
    return decay * _f64(average) + (1 - decay) * _f64(values)


def optimizer_squares(values: ArrayLike) -> float:
    """The sum of the squares of all values."""
    return float((_f64(values) ** 2).sum())


def clipped(grads: list[ArrayLike], largest: float) -> list[np.ndarray]:
    """All gradients, scaled down together if their common norm exceeds ``largest`` (Pascanu et al. 2013, algorithm 1)."""
    norm = np.sqrt(sum(optimizer_squares(grad) for grad in grads))
    return [_f64(grad) * min(1.0, largest / norm) if norm > 0 else _f64(grad) for grad in grads]
