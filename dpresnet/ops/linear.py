"""The classifier: kernels/linear.cl appended to a plan. Inputs are pooled images [N, C, 1, 1], outputs fp32 [N, padded K]."""

import numpy as np

from dpresnet.device import BLOCK
from dpresnet.plan import Plan, Tensor

LANES = 8  # of every device: part of the order of the sums
IMAGES = 4  # whose sums a CPU holds in registers; without vectors a work-item has one image and one output
GROUP = 4 * IMAGES  # images that share a pass over the weights, in the gradient of the inputs
STRIP = 16  # vectors of inputs that stay in L1 meanwhile


def pack(plan: Plan, name: str, master: Tensor, packed: Tensor, features: int) -> None:
    """Refreshes the working copy [K, padded C] from the fp32 master [K, C]."""
    args = [master, packed, np.int32(features), np.int32(packed.shape[1])]
    plan.launch(name, "linear_pack", (packed.shape[0],), args, [packed], VEC=LANES)


def forward(plan: Plan, name: str, x: Tensor, packed: Tensor, bias: Tensor, y: Tensor) -> None:
    """y [N, padded K] = x w^T + b, zeros in the padding."""
    (outputs, in_pad), out_pad = packed.shape, y.shape[1]
    images, tile = (min(IMAGES, x.images), 3) if plan.device.vector > 1 else (1, 1)
    args = [x, packed, bias, y, *(np.int32(v) for v in (x.images, in_pad, outputs, out_pad))]
    size, flops = (-(-x.images // images), -(-out_pad // tile)), 2 * x.images * x.channels * outputs
    plan.launch(name, "linear_forward", size, args, [y], flops, VEC=LANES, IMAGES=images, OUTPUTS=tile)


def backward_data(plan: Plan, name: str, dy: Tensor, packed: Tensor, dx: Tensor) -> None:
    """dx [N, C, 1, 1] = dy w."""
    outputs, in_pad = packed.shape
    images, group, strip = (min(IMAGES, dx.images), GROUP, STRIP) if plan.device.vector > 1 else (1, 1, 2)
    group = min(group, -(-dx.images // images) * images)
    args = [dy, packed, dx, *(np.int32(v) for v in (dx.images, in_pad, outputs, dy.shape[1]))]
    size, flops = (-(-in_pad // (strip * LANES)), -(-dx.images // group)), 2 * dx.images * dx.channels * outputs
    defines = {"VEC": LANES, "IMAGES": images, "GROUP": group, "STRIP": strip}
    plan.launch(name, "linear_backward_data", size, args, [dx], flops, **defines)


def backward_weight(plan: Plan, name: str, dy: Tensor, x: Tensor, dw: Tensor, db: Tensor, outputs: int) -> None:
    """dw [K, C] = dy^T x and db [K] = sum of dy, in fp32."""
    in_pad, out_pad = x.blocks * BLOCK, dy.shape[1]
    tile, strip = (4, in_pad // LANES) if plan.device.vector > 1 else (1, 2)
    args = [dy, x, dw, db, *(np.int32(v) for v in (x.images, x.channels, in_pad, outputs, out_pad))]
    size, flops = (in_pad // (strip * LANES), -(-outputs // tile)), 2 * x.images * x.channels * outputs
    plan.launch(name, "linear_backward_weight", size, args, [dw, db], flops, VEC=LANES, OUTPUTS=tile, STRIP=strip)
