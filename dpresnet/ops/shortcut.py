"""The shortcut without parameters: kernels/shortcut.cl appended to a plan."""

import numpy as np

from dpresnet.plan import Plan, Tensor


def forward(plan: Plan, name: str, x: Tensor, y: Tensor, stride: int) -> None:
    """y [N, O, H / stride, W / stride] = every stride-th pixel of x [N, C, H, W], zeros for channels from C on."""
    sizes = [np.int32(v) for v in (x.blocks, x.height, x.width, y.width, stride)]
    plan.launch(name, "shortcut_forward", (y.height, y.blocks, y.images), [x, y, *sizes], [y])


def backward(plan: Plan, name: str, dy: Tensor, dx: Tensor, stride: int) -> None:
    """dx gets dy at every stride-th pixel, zero elsewhere."""
    sizes = [np.int32(v) for v in (dy.blocks, dx.channels, dx.width, dy.height, dy.width, stride)]
    plan.launch(name, "shortcut_backward", (dx.height, dx.blocks, dx.images), [dy, dx, *sizes], [dx])
