"""The classifier: kernels/linear.cl appended to a plan. Inputs are pooled images [N, C, 1, 1], outputs fp32 [N, padded K]."""

import numpy as np

from dpresnet.device import BLOCK
from dpresnet.plan import Plan, Tensor

LANES = 8  # of every device: part of the order of the sums


def pack(plan: Plan, name: str, master: Tensor, packed: Tensor, features: int) -> None:
    """Refreshes the working copy [K, padded C] from the fp32 master [K, C]."""
    args = [master, packed, np.int32(features), np.int32(packed.shape[1])]
    plan.launch(name, "linear_pack", (packed.shape[0],), args, [packed], VEC=LANES)


def forward(plan: Plan, name: str, x: Tensor, packed: Tensor, bias: Tensor, y: Tensor) -> None:
    """y [N, padded K] = x w^T + b, zeros in the padding."""
    outputs, in_pad = packed.shape
    args = [x, packed, bias, y, np.int32(in_pad), np.int32(outputs)]
    plan.launch(name, "linear_forward", (y.shape[1], x.images), args, [y], 2 * x.images * x.channels * outputs, VEC=LANES)


def backward_data(plan: Plan, name: str, dy: Tensor, packed: Tensor, dx: Tensor) -> None:
    """dx [N, C, 1, 1] = dy w."""
    outputs, in_pad = packed.shape
    args = [dy, packed, dx, np.int32(outputs), np.int32(dy.shape[1])]
    size, flops = (in_pad // LANES, dx.images), 2 * dx.images * dx.channels * outputs
    plan.launch(name, "linear_backward_data", size, args, [dx], flops, VEC=LANES)


def backward_weight(plan: Plan, name: str, dy: Tensor, x: Tensor, dw: Tensor, db: Tensor, outputs: int) -> None:
    """dw [K, C] = dy^T x and db [K] = sum of dy, in fp32."""
    args = [dy, x, dw, db, np.int32(x.images), np.int32(x.channels), np.int32(dy.shape[1])]
    size, flops = (x.blocks * BLOCK // LANES, outputs), 2 * x.images * x.channels * outputs
    plan.launch(name, "linear_backward_weight", size, args, [dw, db], flops, VEC=LANES)
