"""Max pooling and global average pooling: kernels/pool.cl appended to a plan."""

import numpy as np

from dpresnet.plan import Plan, Tensor


def max_forward(plan: Plan, name: str, x: Tensor, y: Tensor, index: Tensor, kernel: int, stride: int, padding: int) -> None:
    """y = maxima of the windows; index (u8) = position of the first maximum within its window, row by row."""
    sizes = [np.int32(v) for v in (x.height, x.width, y.width, stride, padding)]
    plan.launch(name, "pool_max_forward", (y.height, y.images * y.blocks), [x, y, index, *sizes], [y, index],
                WINDOW=kernel)  # fmt: skip


def max_backward(plan: Plan, name: str, dy: Tensor, index: Tensor, dx: Tensor, kernel: int, stride: int, padding: int) -> None:
    """dx collects dy from the windows whose maximum a pixel is."""
    sizes = [np.int32(v) for v in (dx.width, dy.height, dy.width, stride, padding)]
    plan.launch(name, "pool_max_backward", (dx.height, dx.images * dx.blocks), [dy, index, dx, *sizes], [dx],
                WINDOW=kernel)  # fmt: skip


def average_forward(plan: Plan, name: str, x: Tensor, y: Tensor) -> None:
    """y [N, C, 1, 1] = mean over the pixels of x."""
    plan.launch(name, "pool_average_forward", (x.images * x.blocks,), [x, y, np.int32(x.height * x.width)], [y])


def average_backward(plan: Plan, name: str, dy: Tensor, dx: Tensor) -> None:
    """dx = dy / pixels, everywhere."""
    plan.launch(name, "pool_average_backward", (dx.images * dx.blocks,), [dy, dx, np.int32(dx.height * dx.width)], [dx])
